// cross_attention on the CPU: an online softmax over the keys of all sources, block by block.
#include "cross_attention.h"

namespace mmfast {
namespace {

// What a part of the keys comes to for some rows of one head: sums of 2^(x - max) * value, and those of
// 2^(x - max) for each source with the max of its time, x being a logit in units of ln 2.
template <class T, class A = typename wide<T>::type>
struct Partial {
  int64_t lanes = attention_kernels<T>().lanes, sources;
  RowSums<T> sums;
  Buffer<A> max, total;                // [rows], [rows, lanes]
  Buffer<A> source_total, source_max;  // [rows, n + 1], the joint last

  Partial(const Attention<T>& a, int64_t rows)
      : sources(a.sources + 1),
        sums(rows, a.value_depth),
        max(rows, 1),
        total(rows, lanes),
        source_total(rows, sources),
        source_max(rows, sources) {}

  void clear(int64_t rows) {
    sums.clear();
    std::fill_n(max.data(), rows, -std::numeric_limits<A>::infinity());
    std::fill_n(total.data(), rows * lanes, A(0));
    std::fill_n(source_total.data(), rows * sources, A(0));
  }
  void close_source(int64_t i, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      A* const t = total.row(r);
      source_total.row(r)[i] = std::accumulate(t, t + lanes, A(0));
      source_max.row(r)[i] = *max.row(r);
      std::fill_n(t, lanes, A(0));
    }
  }
};

// Rows first ... first + rows of one head, and blocks from ... until of its sample's keys.
struct Task {
  int64_t b, kv_head, first, rows, from, until;
};

template <class T, class A = typename wide<T>::type>
class Worker {
 public:
  Worker(const Attention<T>& a, int64_t rows)
      : a_(a),
        keys_(a.depth, rows <= FEW_ROWS<T>),
        values_(a.block_keys, a.value_depth, rows <= FEW_ROWS<T>),
        queries_(parts(rows, k_.rows) * k_.rows, a.depth),
        seen_(rows),
        bias_(rows),
        logits_(parts(a.block_keys, k_.columns), k_.rows * k_.columns),
        weights_(k_.rows, a.block_keys) {
    std::fill_n(queries_.data(), parts(rows, k_.rows) * k_.rows * a.depth, T{});
    std::fill_n(weights_.data(), k_.rows * a.block_keys, T{});
  }

  void run(const Task& task, Partial<T>& out) {
    out.clear(task.rows);
    for (int64_t r = 0; r < task.rows; ++r)
      std::copy_n(a_.query_row(task.b, task.kv_head, task.first + r), a_.depth, queries_.row(r));
    const auto& blocks = a_.blocks[task.b];
    const int64_t end = std::min<int64_t>(task.until, blocks.size());
    BlockWalk<T> walk(a_, task.b, task.kv_head, end);
    int64_t source = -1, least = 0, most = 0;
    for (int64_t n = task.from; n < end; ++n) {
      if (blocks[n].source != source) {
        if (source >= 0) out.close_source(source, task.rows);
        source = blocks[n].source;
        std::tie(least, most) = look(task, source);
      }
      if (blocks[n].first >= most) continue;
      const Block<T>& block = walk.go_to(n, 2 * parts(task.rows, k_.rows));
      keys_.take(block.key, block.count);
      values_.take(block.value, block.count);
      for (int64_t r = 0; r < task.rows; r += k_.rows)
        tile({seen_.data(), least, r, std::min(r + k_.rows, task.rows), block}, block, walk, out);
    }
    if (source >= 0) out.close_source(source, task.rows);
  }

 private:
  // What each row sees of a source, and its bias there; the least and the most that any sees.
  std::pair<int64_t, int64_t> look(const Task& task, int64_t i) {
    for (int64_t r = 0; r < task.rows; ++r) {
      seen_[r] = a_.seen(task.b, task.kv_head, i, task.first + r);
      bias_[r] = a_.bias(task.b, a_.head(task.kv_head, task.first + r), i) * LOG2_E<A>;
    }
    const auto [least, most] = std::minmax_element(seen_.begin(), seen_.begin() + task.rows);
    return {*least, *most};
  }

  void tile(const Viewers<T>& v, const Block<T>& block, BlockWalk<T>& walk, Partial<T>& out) {
    walk.step();
    if (v.count == 0) return;
    const T* left[TileKernels<T>::MOST_ROWS];
    for (int64_t i = 0; i < k_.rows; ++i) left[i] = queries_.row(v.row[i]);
    keys_.multiply(logits_.data(), left, v.count, v.most);
    // The kernel looks for the maximum before it scales.
    if (a_.scale2 < 0)
      softmax_.scale(logits_.data(), -1, parts(a_.block_keys, k_.columns) * k_.rows * k_.columns);
    A factor[TileKernels<T>::MOST_ROWS];
    softmax_.softmax(weights_.data(), logits_.data(), v.count, v.row, v.keys, std::abs(a_.scale2),
                     bias_.data(), out.max.data(), out.total.data(), factor);
    for (int64_t i = 0; i < v.count; ++i)
      if (factor[i] != 1) out.sums.scale(v.row[i], factor[i]);
    walk.step();
    out.sums.add(v, block.count, weights_, 0, values_);
  }

  const Attention<T>& a_;
  const TileKernels<T>& k_ = tile_kernels<T>();
  const AttentionKernels<T>& softmax_ = attention_kernels<T>();
  Columns<T> keys_;
  Lines<T> values_;
  Buffer<T> queries_;  // and rows of no use, up to whole tiles
  std::vector<int64_t> seen_;
  std::vector<A> bias_;
  Buffer<A> logits_;
  Buffer<T> weights_;
};

template <class T>
Tensors forward(const Attention<T>& a, bool want_mass) {
  using A = typename wide<T>::type;
  const Shape rows_shape{a.batch, a.heads, a.queries};
  Tensors made{empty({a.batch, a.heads, a.queries, a.value_depth}, scalar_type<T>),
               empty(rows_shape, scalar_type<A>), empty({a.batch, a.heads, a.queries, 2}, scalar_type<A>)};
  if (want_mass) made.push_back(empty({a.batch, a.heads, a.queries, a.sources}, scalar_type<A>));
  T* const out = data<T>(made[0]);
  A* const lse = data<A>(made[1]);
  A* const normalizers = data<A>(made[2]);
  A* const mass = want_mass ? data<A>(made[3]) : nullptr;

  // Adds up parts of the keys, which is one part where there is work enough without.
  const auto finish = [&](const Task& task, Partial<T>* partials, int64_t count) {
    std::vector<Wider<A>> of_source(a.sources + 1);
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t to = a.output_row(task.b, task.kv_head, task.first + r);
      A max = *partials[0].max.row(r);
      for (int64_t s = 1; s < count; ++s) max = std::max(max, *partials[s].max.row(r));
      std::fill(of_source.begin(), of_source.end(), 0);
      const auto factor = [max](A of) { return of == max ? A(1) : std::exp2(of - max); };
      for (int64_t s = 0; s < count; ++s)
        for (int64_t i = 0; i <= a.sources; ++i)
          if (const A sum = partials[s].source_total.row(r)[i]; sum != 0)
            of_source[i] += sum * factor(partials[s].source_max.row(r)[i]);
      const auto total = std::accumulate(of_source.begin(), of_source.end(), Wider<A>(0));
      const Wider<A> inverse = total == 0 ? 0 : 1 / total;
      lse[to] = total == 0 ? -std::numeric_limits<A>::infinity() : max / LOG2_E<Wider<A>> + std::log(total);
      normalizers[2 * to] = max;
      normalizers[2 * to + 1] = inverse;
      for (int64_t i = 0; mass && i < a.sources; ++i) mass[to * a.sources + i] = of_source[i] * inverse;
      auto& sums = partials[0].sums;
      if (count > 1) sums.scale(r, factor(*partials[0].max.row(r)));
      for (int64_t s = 1; s < count; ++s)
        if (const A f = factor(*partials[s].max.row(r)); f != 0)
          for (int64_t p = 0; p < sums.panels(); ++p)
            row_kernels<A>().accumulate(sums.row(r, p), f, partials[s].sums.row(r, p),
                                        tile_kernels<T>().columns);
      sums.put(out + to * a.value_depth, r, inverse, a.value_depth);
    }
  };

  // A task has rows enough to pack the keys for, or else all threads have something to do.
  constexpr int64_t LEAST_TILES = 16, MOST_TILES = 64, LEAST_KEYS = 256;
  const int64_t height = tile_kernels<T>().rows, wanted = 4 * torch::stable::get_num_threads();
  const int64_t heads = a.batch * a.kv_heads, tiles = parts(a.rows, height);
  const int64_t of_task = std::clamp(parts(heads * tiles, wanted), LEAST_TILES, MOST_TILES) * height;
  const int64_t row_blocks = parts(a.rows, of_task), rows = std::min(of_task, a.rows);
  const int64_t splits = heads * row_blocks >= wanted || heads * row_blocks == 0
                             ? 1
                             : std::clamp<int64_t>(a.most_blocks * a.block_keys / LEAST_KEYS, 1,
                                                   parts(wanted, heads * row_blocks));
  const int64_t span = std::max<int64_t>(parts(a.most_blocks, splits), 1), of_line = row_blocks * splits;
  const auto task_at = [&](int64_t k) {
    const int64_t line = k / of_line, first = k % of_line / splits * of_task, split = k % splits;
    return Task{line / a.kv_heads, line % a.kv_heads, first, std::min(of_task, a.rows - first),
                split * span,      (split + 1) * span};
  };
  std::vector<Partial<T>> partials;
  if (splits > 1)
    for (int64_t k = 0; k < heads * of_line; ++k) partials.emplace_back(a, task_at(k).rows);
  const int64_t cost = rows * std::min(span, a.most_blocks) * a.block_keys * (a.depth + a.value_depth);
  take_turns<T>(heads, of_line, cost, [&](auto take) {
    Worker<T> worker(a, rows);
    std::optional<Partial<T>> own;
    if (splits == 1) own.emplace(a, rows);
    for (int64_t k; (k = take()) >= 0;) {
      worker.run(task_at(k), splits == 1 ? *own : partials[k]);
      if (splits == 1) finish(task_at(k), &*own, 1);
    }
  });
  if (splits > 1)
    parallel_rows(heads * row_blocks, rows * splits * a.value_depth, [&](int64_t from, int64_t until) {
      for (int64_t k = from * splits; k < until * splits; k += splits)
        finish(task_at(k), partials.data() + k, splits);
    });
  return made;
}

Tensors cross_attention(Tensor query, Tensors keys, Tensors values, MaybeTensors lengths, MaybeTensors masks,
                        Maybe present, std::vector<bool> causal, Maybe source_bias,
                        std::optional<double> scale, bool mass) {
  return by_type("cross_attention: query", query.scalar_type(), 1, [&](auto zero, auto to) {
    return forward<decltype(zero)>(
        {to(query), to(keys), to(values), lengths, masks, present, causal, source_bias, scale, mass}, mass);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { bind<&cross_attention>(m, "cross_attention.cpu"); }

}  // namespace mmfast
