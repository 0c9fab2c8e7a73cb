// lowrank_fusion on the CPU: sum over r of rank_weight[r] * product over i of ([x_i, 1] @ factors_i[r]), +
// bias.
//
// A task is some rows and a panel of columns: each factor is made in tiles, multiplied into the product of
// its rank and kept for the backward, and the ranks are added up, all in a core's own cache. What is absent
// is left out of the tiles.
#include "simd/lowrank_fusion.h"

#include "box.h"
#include "tiles.h"

namespace mmfast {

MM_KERNELS(lowrank_kernels, LowrankKernels)

namespace {

template <class T, class A = typename wide<T>::type>
struct Problem {
  const LowrankKernels<T>& kernels = lowrank_kernels<T>();
  Tensors held;                       // keeps copies alive that were made for their strides
  int64_t count, rows, ranks, width;  // n, B, R, O
  std::vector<Rows<T>> x;             // [n][B]; null where it is absent
  std::vector<int64_t> there;         // rows of each that are there
  std::vector<int64_t> depth;         // D_i
  std::vector<A> weight;              // [R]
  struct Factor {                     // [R, D_i + 1, O]
    const T* data;
    int64_t rank_stride, row_stride;
  };
  std::vector<Factor> factors;

  static constexpr T nothing{};  // the row of a modality without features, which is there all the same

  Problem(const Tensors& inputs, const Tensors& factors_, const Tensor& rank_weight, const Maybe& present)
      : count(inputs.size()),
        rows(inputs[0].size(0)),
        ranks(rank_weight.size(0)),
        width(factors_[0].size(2)),
        weight(widened<T>(rank_weight)) {
    const Elements<bool> is_there(present, true);
    for (int64_t i = 0; i < count; ++i) {
      const Matrix<const T> own = matrix<T>(held.emplace_back(dense(inputs[i])));
      Rows<T>& to = x.emplace_back(rows, nullptr);
      for (int64_t b = 0; b < rows; ++b)
        if (is_there(b, i)) to[b] = own.columns ? own.row(b) : &nothing;
      there.push_back(rows - std::count(to.begin(), to.end(), nullptr));
      depth.push_back(own.columns);
      const Tensor& factor = held.emplace_back(dense(factors_[i]));
      factors.push_back({data<T>(factor), factor.stride(0), factor.stride(1)});
    }
  }

  // Row d of a factor's rank; row D_i belongs to the 1.
  const T* factor_row(int64_t i, int64_t r, int64_t d) const {
    const Factor& f = factors[i];
    return f.data + r * f.rank_stride + d * f.row_stride;
  }
  Rows<T> factor_rows(int64_t i, int64_t r) const {  // without the last
    Rows<T> out(depth[i]);
    for (int64_t d = 0; d < depth[i]; ++d) out[d] = factor_row(i, r, d);
    return out;
  }
};

// What every factor is where it is kept: [n, B, R, O].
template <class T>
struct Kept {
  T* data;
  int64_t B, R, O;
  T* at(int64_t i, int64_t b, int64_t r) const { return data + ((i * B + b) * R + r) * O; }
};

template <class T>
Tensors forward(const Tensors& inputs, const Tensors& factors, const Tensor& rank_weight, const Maybe& bias_,
                const Maybe& present, bool save) {
  using A = typename wide<T>::type;
  const Problem<T> p(inputs, factors, rank_weight, present);
  const int64_t n = p.count, B = p.rows, R = p.ranks, O = p.width;
  std::vector<const TileKernels<T>*> tile;  // [n]
  for (int64_t i = 0; i < n; ++i) tile.push_back(&tile_kernels<T>(B, p.depth[i], O));
  const bool large = std::any_of(tile.begin(), tile.end(), [](auto* k) { return are_large(*k); });
  const TileKernels<T>& most = large ? *tile_kernels<T>().large : tile_kernels<T>();
  const int64_t width = most.columns, height = most.rows;
  Tensors made{empty({B, O}, scalar_type<T>)};
  T* const out = data<T>(made[0]);
  if (save) made.push_back(empty({n, B, R, O}, scalar_type<T>));
  const Kept<T> kept{save ? data<T>(made[1]) : nullptr, B, R, O};
  const std::vector<A> bias = bias_ ? widened<T>(*bias_) : std::vector<A>(O, 0);

  // Rows of a task. What is packed for large products is dear: there are no more tasks than threads need.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t panels = parts(O, width), tiles = std::max<int64_t>(parts(B, height), 1);
  const int64_t wanted = parts(large ? threads : 4, std::max<int64_t>(panels, 1));
  const int64_t most_tiles = std::clamp<int64_t>(tiles / wanted, 1, (large ? 256 : 96) / height);
  const int64_t task_rows = parts(tiles, parts(tiles, most_tiles)) * height, blocks = parts(B, task_rows);

  std::vector<Right<T>> right;       // [n, R]
  std::vector<int64_t> place = {0};  // of each once packed, in bytes
  int64_t longest = 0, depth = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t bytes = panel_bytes(p.depth[i], *tile[i]);
    for (int64_t r = 0; r < R; ++r) {
      right.push_back(Right<T>::of_rows(p.factor_rows(i, r), O)), right.back().kernels = tile[i];
      place.push_back(place.back() + bytes);
    }
    longest = std::max(longest, bytes);
    depth += p.depth[i];
  }
  // A panel's factors are packed once for all tasks that a thread makes with them, unless they are many.
  constexpr int64_t MOST_PACKED = 4 << 20;
  const bool once = place.back() <= MOST_PACKED;
  // Rows of a thread, halved: packing all ranks was seen to pay from twice as many rows on as packing one.
  const auto in_place = [&](const Right<T>& factor, int64_t i, int64_t panel, int64_t rows) {
    return factor.in_place(once ? parts(p.there[i], 2 * parts(threads, panels)) : rows, panel);
  };

  take_turns(most, panels, blocks, task_rows * width * R * (depth + MEMORY), [&](auto take) {
    const Buffer<A> product(task_rows, width), sum(task_rows, width);
    // whole rows are added up, columns past the last too
    for (const auto* all : {&product, &sum}) std::fill_n(all->data(), task_rows * width, A(0));
    const Buffer<char> packed(1, once ? place.back() : longest);
    alignas(64) A base[TileKernels<T>::MOST_COLUMNS] = {}, ones[TileKernels<T>::MOST_COLUMNS];
    std::fill_n(ones, width, A(1));
    Sums<T> c;
    std::fill_n(c.at, TileKernels<T>::LARGE_ROWS, base);
    struct Share {   // of a modality: what is there of the task's rows, then what is not
      Rows<T> left;  // whole tiles of what is there: the last row fills them up
      std::vector<A*> product;
      std::vector<T*> kept;
      int64_t there;
    };
    std::vector<Share> shares(n);
    int64_t packed_panel = -1;
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t panel = task / blocks, first = panel * width, used = std::min(width, O - first);
      const int64_t begin = task % blocks * task_rows, end = std::min(begin + task_rows, B);
      for (int64_t i = 0; i < n; ++i) {
        Share& own = shares[i];
        own.left.clear(), own.product.clear(), own.kept.clear();
        const auto add = [&](int64_t b) {
          own.product.push_back(product.row(b - begin));
          if (save) own.kept.push_back(kept.at(i, b, 0) + first);
        };
        for (int64_t b = begin; b < end; ++b)
          if (p.x[i][b]) add(b), own.left.push_back(p.x[i][b]);
        own.there = own.left.size();
        if (own.there) own.left.resize(parts(own.there, tile[i]->rows) * tile[i]->rows, own.left.back());
        for (int64_t b = begin; b < end; ++b)
          if (!p.x[i][b]) add(b);
      }
      for (int64_t b = begin; b < end; ++b) std::copy_n(bias.data() + first, used, sum.row(b - begin));
      for (int64_t r = 0; r < R; ++r) {
        for (int64_t i = 0; i < n; ++i) {
          const Share& own = shares[i];
          const auto join = [&](int64_t from, int64_t count, const A* factor, int64_t stride) {
            p.kernels.multiply(own.product.data() + from, save ? own.kept.data() + from : nullptr, r * O,
                               factor, stride, i == 0, count, used);
          };
          if (i == 0 || save) join(own.there, own.product.size() - own.there, ones, 0);
          const Right<T>& factor = right[i * R + r];
          char* const to =
              in_place(factor, i, panel, own.there) ? nullptr : packed.data() + (once ? place[i * R + r] : 0);
          if (to && !(once && panel == packed_panel)) factor.pack(to, panel);
          if (own.there == 0) continue;
          row_kernels<T>().widen(base, p.factor_row(i, r, p.depth[i]) + first, used);
          const int64_t height = tile[i]->rows;
          for (int64_t k = 0; k < own.there; k += height) {
            const int64_t count = std::min(height, own.there - k);
            factor.multiply(c.of, c.at, own.left.data() + k, count, panel, to);
            join(k, count, c.of, width);
          }
        }
        row_kernels<A>().accumulate(sum.data(), p.weight[r], product.data(), (end - begin) * width);
      }
      packed_panel = panel;
      for (int64_t b = begin; b < end; ++b)
        row_kernels<T>().narrow(out + b * O + first, sum.row(b - begin), used);
    }
  });
  return made;
}

// With d_i[b, r] = grad[b] * rank_weight[r] * product of the factors other than i:
//   dx_i = sum over r of d_i[:, r] @ factors_i[r].T;  dfactors_i[r] = [x_i, 1].T @ d_i[:, r]
template <class T>
Tensors backward(const Tensor& grad_, const Tensors& inputs, const Tensors& factors,
                 const Tensor& rank_weight, const Maybe& present, const Tensor& kept_,
                 const std::vector<bool>& needs) {
  using A = typename wide<T>::type;
  constexpr int64_t PART = 8;  // rows, summed one after the other: the same bits for any number of threads
  const Problem<T> p(inputs, factors, rank_weight, present);
  const int64_t n = p.count, B = p.rows, R = p.ranks, O = p.width;
  Tensors made;
  std::vector<T*> grads(needs.size());
  const auto make = [&](int64_t k, const Shape& shape) {
    if (needs[k]) grads[k] = data<T>(made.emplace_back(empty(shape, scalar_type<T>)));
  };
  for (int64_t i = 0; i < n; ++i) make(i, {B, p.depth[i]});
  for (int64_t i = 0; i < n; ++i) make(n + i, {R, p.depth[i] + 1, O});
  make(2 * n, {R});
  make(2 * n + 1, {O});
  const Tensor grad = as_contiguous(grad_), tensor = as_contiguous(kept_);
  const Kept<T> kept{data<T>(tensor), B, R, O};
  const T* const g = data<T>(grad);

  // d where it is needed, and the ranks' sums over the rows of each part
  const Buffer<T> memory(n * B * R, O);
  const Kept<T> d{memory.data(), B, R, O};
  const int64_t count = parts(B, PART);
  std::vector<A> rank_sums(count * R, 0);
  parallel_rows(count, PART * n * R * O, [&](int64_t begin, int64_t end) {
    std::vector<T*> to(n);
    for (int64_t part = begin; part < end; ++part)
      for (int64_t b = part * PART; b < std::min((part + 1) * PART, B); ++b) {
        for (int64_t i = 0; i < n; ++i)
          to[i] = (needs[i] || needs[n + i]) && p.x[i][b] ? d.at(i, b, 0) : nullptr;
        p.kernels.backward(to.data(), rank_sums.data() + part * R, g + b * O, p.weight.data(),
                           kept.at(0, b, 0), B * R * O, n, R, O);
      }
  });
  const auto narrow = [](T* to, const std::vector<Wider<A>>& from) {
    const std::vector<A> narrowed(from.begin(), from.end());
    row_kernels<T>().narrow(to, narrowed.data(), narrowed.size());
  };
  if (needs[2 * n]) {
    std::vector<Wider<A>> total(R, 0);
    for (size_t k = 0; k < rank_sums.size(); ++k) total[k % R] += rank_sums[k];
    narrow(grads[2 * n], total);
  }
  const auto bias_grad = [&] {
    std::vector<Wider<A>> total(O, 0);
    add_rows(total.data(), row_pointers<T>({g, B, O, O}), 0, O);
    narrow(grads[2 * n + 1], total);
  };

  const auto rows_of = [&](int64_t i) {  // of d, [R, O] each
    Rows<T> rows(B, nullptr);
    for (int64_t b = 0; b < B; ++b)
      if (p.x[i][b]) rows[b] = d.at(i, b, 0);
    return rows;
  };
  const auto input_grad = [&](int64_t i) {
    const int64_t depth = p.depth[i];
    Rows<T> rows = rows_of(i);
    std::vector<Right<T>> right;
    for (int64_t r = 0; r < R; ++r) right.push_back(Right<T>::of_columns(p.factor_rows(i, r), O));
    std::vector<Term<T>> terms;
    if (R > 0 && O % TileKernels<T>::MOST_GROUP == 0 && !right[0].in_place(B, 0)) {
      Rows<T> columns;  // one product over all ranks, where they are packed anyway
      for (const auto& of_rank : right)
        columns.insert(columns.end(), of_rank.rows.begin(), of_rank.rows.end());
      terms.push_back({std::move(rows), {Right<T>::of_runs(std::move(columns), O, R)}, nullptr});
    } else {
      for (auto& of_rank : right) {
        terms.push_back({rows, {std::move(of_rank)}, nullptr});
        for (const T*& row : rows)
          if (row) row += O;
      }
    }
    sum_of_products(
        B, depth, 1, terms,
        [&](int64_t b, int64_t first, int64_t count, int64_t, A*) -> const A* {
          fetch_to_write(grads[i] + b * depth + first, count);
          return nullptr;
        },
        [&](int64_t b, int64_t first, int64_t count, const A* c, const A*) {
          row_kernels<T>().narrow(grads[i] + b * depth + first, c, count);
        },
        Into<T>{grads[i], nullptr, Activation::none});
  };
  const auto factor_grad = [&](int64_t i) {
    const int64_t depth = p.depth[i];
    std::vector<A> total(R * O);
    product_over_rows({grads[n + i], O, O, (depth + 1) * O}, p.x[i], depth, rows_of(i), R * O,
                      static_cast<const Centring<T>*>(nullptr), total.data());
    for (int64_t r = 0; r < R; ++r)  // of the 1
      row_kernels<T>().narrow(grads[n + i] + (r * (depth + 1) + depth) * O, total.data() + r * O, O);
  };
  std::vector<Job> jobs;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t cost = B * R * O * (p.depth[i] + MEMORY);
    if (needs[i]) jobs.push_back({cost, [&, i] { input_grad(i); }});
    if (needs[n + i]) jobs.push_back({cost, [&, i] { factor_grad(i); }});
  }
  if (needs[2 * n + 1]) jobs.push_back({B * O, bias_grad});
  run_jobs(std::move(jobs));
  return made;
}

Tensors lowrank_fusion(Tensors inputs, Tensors factors, Tensor rank_weight, Maybe bias, Maybe present,
                       bool save) {
  return by_type("lowrank_fusion: rank_weight", rank_weight.scalar_type(), ALL, [&](auto zero, auto to) {
    return forward<decltype(zero)>(to(inputs), to(factors), to(rank_weight), to(bias), present, save);
  });
}

Tensors lowrank_fusion_backward(Tensor grad, Tensors inputs, Tensors factors, Tensor rank_weight,
                                Maybe present, Tensor kept, std::vector<bool> needs) {
  return by_type("lowrank_fusion: rank_weight", rank_weight.scalar_type(), ALL, [&](auto zero, auto to) {
    return backward<decltype(zero)>(to(grad), to(inputs), to(factors), to(rank_weight), present, to(kept),
                                    needs);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  bind<&lowrank_fusion>(m, "lowrank_fusion.cpu");
  bind<&lowrank_fusion_backward>(m, "lowrank_fusion_backward.cpu");
}

}  // namespace mmfast
