// contrastive_loss on the CPU: tiles of the matrix of logits, each made, used and forgotten. Forward, a tile
// moves the online softmax of its rows and that of its columns; backward, the slopes in its logits go at once
// into the gradients of both sides.
#include "simd/contrastive_loss.h"

#include <array>
#include <cmath>
#include <limits>
#include <numeric>

#include "box.h"
#include "tiles.h"

namespace mmfast {

MM_KERNELS(contrastive_kernels, ContrastiveKernels)

namespace {

struct Range {
  int64_t first, end;
  int64_t count() const { return end - first; }
};

// The pairs that are present, numbered without the others, and the matrix of their logits in blocks x blocks
// squares: about as many tasks however many pairs, unless they are few.
template <class T>
struct Pairs {
  Tensor held_a, held_b;
  int64_t samples, depth, count, blocks, side;
  std::vector<int64_t> sample;  // [count]
  Rows<T> a, b;                 // [count]
  Right<T> columns;             // b.T

  Pairs(const Tensor& a_, const Tensor& b_, const Maybe& present)
      : held_a(dense(a_)), held_b(dense(b_)), samples(a_.size(0)), depth(a_.size(1)) {
    const Matrix<const T> all_a = matrix<T>(held_a), all_b = matrix<T>(held_b);
    const Elements<bool> there(present, true);
    for (int64_t s = 0; s < samples; ++s)
      if (there(s)) {
        sample.push_back(s);
        a.push_back(all_a.row(s));
        b.push_back(all_b.row(s));
      }
    columns = Right<T>::of_columns(b, depth);
    count = sample.size();
    constexpr int64_t LEAST = 128, MOST_COLUMNS = TileKernels<T>::MOST_COLUMNS;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = std::clamp<int64_t>(parts(count, LEAST), 1, threads * parts(16, threads));
    side = std::max<int64_t>(parts(parts(count, wanted), MOST_COLUMNS), 1) * MOST_COLUMNS;
    blocks = parts(count, side);
  }
  Range block(int64_t k) const { return {k * side, std::min((k + 1) * side, count)}; }
  int64_t cost() const { return std::min(side, count) * std::min(side, count) * depth; }
};

// Makes tiles of a @ b.T, in one thread.
template <class T, class A = typename wide<T>::type>
class LogitTiles {
 public:
  const TileKernels<T>& k = tile_kernels<T>();

  LogitTiles(const Pairs<T>& pairs, int64_t panels)
      : pairs_(pairs), packed_(panels, panel_bytes<T>(pairs.depth)), made_(k.rows, k.columns) {}

  void pack(int64_t slot, int64_t panel) const { pairs_.columns.pack(packed_.row(slot), panel); }
  // rows first ... first + count of the panel in a slot
  const A* tile(int64_t slot, int64_t first, int64_t count) const {
    const T* left[TileKernels<T>::MOST_ROWS];
    for (int64_t i = 0; i < k.rows; ++i) left[i] = pairs_.a[first + std::min(i, count - 1)];
    k.multiply(made_.data(), nullptr, left, k.group, count, packed_.row(slot), k.columns, pairs_.depth);
    return made_.data();
  }

 private:
  const Pairs<T>& pairs_;
  Buffer<char> packed_;
  Buffer<A> made_;
};

// each(s, row, rows, column, columns) for the tiles of a block
template <class T, class F>
void each_tile(const Pairs<T>& pairs, const LogitTiles<T>& tiles, Range rows, Range columns, F each) {
  const auto& k = tiles.k;
  for (int64_t c = columns.first; c < columns.end; c += k.columns) {
    tiles.pack(0, c / k.columns);
    for (int64_t r = rows.first; r < rows.end; r += k.rows) {
      const int64_t count = std::min(k.rows, rows.end - r);
      each(tiles.tile(0, r, count), r, count, c, std::min(k.columns, columns.end - c));
    }
  }
}

// Online softmaxes of the rows, or of the columns, each over the pairs of one block: max and sum of 2^(x -
// max).
template <class A>
struct Softmaxes {
  Buffer<A> max, sum;  // [blocks, pairs]

  Softmaxes(int64_t blocks, int64_t pairs) : max(blocks, pairs), sum(blocks, pairs) {}

  struct Total {
    Wider<A> max, log_sum;  // in units of ln 2
  };
  Total total(int64_t i, int64_t blocks) const {
    Wider<A> most = max.row(0)[i], all = 0;
    for (int64_t k = 1; k < blocks; ++k) most = std::max<Wider<A>>(most, max.row(k)[i]);
    for (int64_t k = 0; k < blocks; ++k) all += sum.row(k)[i] * std::exp2(max.row(k)[i] - most);
    return {most, std::log2(all)};
  }
};

template <class T, class A = typename wide<T>::type>
Tensors softmax_loss(const Pairs<T>& pairs, A scale) {
  const auto& kernels = contrastive_kernels<T>();
  const int64_t padded = pairs.blocks * pairs.side;  // the last panel may be filled up
  const A scale2 = scale * LOG2_E<A>, lowest = std::numeric_limits<A>::lowest();
  Softmaxes<A> of_rows(pairs.blocks, padded), of_columns(pairs.blocks, padded);
  const Buffer<A> own(1, padded);  // the pairs' own x
  take_turns<T>(pairs.blocks, pairs.blocks, pairs.cost(), [&](auto take) {
    const LogitTiles<T> tiles(pairs, 1);
    const Buffer<A> row_sum(pairs.side, kernels.lanes);
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t y = task / pairs.blocks, x = task % pairs.blocks;
      const Range rows = pairs.block(y), columns = pairs.block(x);
      A* const row_max = of_rows.max.row(x);
      A* const column_max = of_columns.max.row(y);
      A* const column_sum = of_columns.sum.row(y);
      std::fill_n(row_max + rows.first, pairs.side, lowest);
      std::fill_n(column_max + columns.first, pairs.side, lowest);
      std::fill_n(column_sum + columns.first, pairs.side, A(0));
      std::fill_n(row_sum.data(), rows.count() * kernels.lanes, A(0));
      const auto tile = [&](const A* s, int64_t r, int64_t height, int64_t c, int64_t width) {
        kernels.softmax(s, height, width, scale2, r - c, row_max + r, row_sum.row(r - rows.first),
                        column_max + c, column_sum + c);
        for (int64_t i = std::max(r, c); i < std::min(r + height, c + width); ++i)
          own.data()[i] = s[(i - r) * tiles.k.columns + i - c] * scale2;
      };
      each_tile(pairs, tiles, rows, columns, tile);
      for (int64_t r = rows.first; r < rows.end; ++r) {
        const A* const sums = row_sum.row(r - rows.first);
        of_rows.sum.row(x)[r] = std::accumulate(sums, sums + kernels.lanes, A(0));
      }
    }
  });

  const Tensor loss = empty({}, scalar_type<A>), lse = empty({2, 2, pairs.samples}, scalar_type<A>);
  std::fill_n(data<A>(lse), 4 * pairs.samples, A(0));
  std::vector<Wider<A>> losses(pairs.count);
  parallel_rows(pairs.count, pairs.blocks * 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (const auto* const of : {&of_rows, &of_columns}) {
        const auto [max, log_sum] = of->total(i, pairs.blocks);
        losses[i] += (max - own.data()[i] + log_sum) / 2;
        A* const to = data<A>(lse) + (of == &of_columns) * 2 * pairs.samples + pairs.sample[i];
        to[0] = max + log_sum;
        to[pairs.samples] = max + log_sum - to[0];
      }
  });
  *data<A>(loss) = std::accumulate(losses.begin(), losses.end(), Wider<A>(0)) / LOG2_E<Wider<A>>;
  return {loss, lse};
}

template <class T, class A = typename wide<T>::type>
Tensors sigmoid_loss(const Pairs<T>& pairs, A scale, A bias) {
  std::vector<Wider<A>> losses(pairs.blocks * pairs.blocks);
  take_turns<T>(pairs.blocks, pairs.blocks, pairs.cost(), [&](auto take) {
    const LogitTiles<T> tiles(pairs, 1);
    for (int64_t task; (task = take()) >= 0;)
      each_tile(pairs, tiles, pairs.block(task / pairs.blocks), pairs.block(task % pairs.blocks),
                [&](const A* s, int64_t r, int64_t rows, int64_t c, int64_t columns) {
                  losses[task] += contrastive_kernels<T>().sigmoid(s, rows, columns, scale, bias, r - c);
                });
  });
  const Tensor loss = empty({}, scalar_type<A>);
  *data<A>(loss) = std::accumulate(losses.begin(), losses.end(), Wider<A>(0));
  return {loss};
}

// The gradient of one side, in which its rows are added up. Where it is narrower than sums are, it holds the
// upper two bytes of each, and `lower_` a third: 171 steps, of 32,768 pairs, that each round to 16
// significant bits lose less than the last, which rounds to 8, at the worst, and by chance those of many
// million pairs. A fourth byte would be a quarter of all memory.
template <class T, class A = typename wide<T>::type>
class Gradient {
 public:
  static constexpr bool SPLIT = !std::is_same_v<T, A>;

  Gradient(const Pairs<T>& pairs, bool needed)
      : needed_(needed),
        depth_(pairs.depth),
        lower_(needed && SPLIT ? pairs.count : 0, pairs.depth),
        rows_(needed ? pairs.count : 0) {
    if (!needed) return;
    made_.emplace(empty({pairs.samples, pairs.depth}, scalar_type<T>));
    clear(data<T>(*made_), pairs.samples);
    if (SPLIT) clear(lower_.data(), pairs.count);
    for (int64_t i = 0; i < pairs.count; ++i) rows_[i] = data<T>(*made_) + pairs.sample[i] * pairs.depth;
  }

  bool needed() const { return needed_; }
  int64_t panels() const { return parts(depth_, tile_kernels<T>().columns); }
  // Rows first ... first + count take on left @ right, for columns of panel p.
  void add(int64_t first, int64_t count, int64_t p, const T* const* left, int64_t step, const char* right,
           int64_t depth) const {
    constexpr int64_t MOST_ROWS = TileKernels<T>::MOST_ROWS;
    const auto& k = tile_kernels<T>();
    const int64_t column = p * k.columns, used = std::min(k.columns, depth_ - column);
    alignas(64) A c[MOST_ROWS * TileKernels<T>::MOST_COLUMNS];
    T* to[MOST_ROWS];
    for (int64_t i = 0; i < count; ++i) {
      to[i] = rows_[first + i] + column;
      fetch_to_write(to[i], used);
    }
    if constexpr (SPLIT) {
      uint8_t* lower[MOST_ROWS];
      for (int64_t i = 0; i < count; ++i) {
        lower[i] = lower_.row(first + i) + column;
        fetch_to_write(lower[i], used);
      }
      k.multiply(c, nullptr, left, step, count, right, used, depth);
      contrastive_kernels<T>().add_to_split(to, lower, c, count, used);
    } else {
      const A* start[MOST_ROWS];
      std::fill_n(start, k.rows, Sums<T>::zeros);
      for (int64_t i = 0; i < count; ++i)
        if (used == k.columns) {
          start[i] = to[i];
        } else {  // a whole tile's width cannot be read there
          start[i] = c + i * k.columns;
          std::fill_n(std::copy_n(to[i], used, c + i * k.columns), k.columns - used, A(0));
        }
      k.multiply(c, start, left, step, count, right, used, depth);
      for (int64_t i = 0; i < count; ++i) std::copy_n(c + i * k.columns, used, to[i]);
    }
  }
  Tensor finish() const {
    if constexpr (SPLIT)
      parallel_rows(rows_.size(), depth_, [&](int64_t begin, int64_t end) {
        const Buffer<A> sums(1, depth_);
        for (int64_t i = begin; i < end; ++i) {
          contrastive_kernels<T>().join_split(sums.data(), rows_[i], lower_.row(i), depth_);
          row_kernels<T>().narrow(rows_[i], sums.data(), depth_);
        }
      });
    return *made_;
  }

 private:
  template <class X>
  void clear(X* to, int64_t rows) {
    parallel_rows(rows, depth_, [&](int64_t begin, int64_t end) {
      std::fill_n(to + begin * depth_, (end - begin) * depth_, X{});
    });
  }

  bool needed_;
  int64_t depth_;
  Buffer<uint8_t> lower_;
  std::vector<T*> rows_;
  Maybe made_;
};

// Makes the slopes of a part of a block and adds what they are to both sides.
template <class T, class A = typename wide<T>::type>
class Worker {
 public:
  // Slopes, and what they are multiplied with, stay in a core's second cache.
  static constexpr int64_t ROWS = 192, COLUMNS = 256;

  Worker(const Pairs<T>& pairs, const Gradient<T>& d_a, const Gradient<T>& d_b)
      : pairs_(pairs),
        d_a_(d_a),
        d_b_(d_b),
        tiles_(pairs, COLUMNS / k_.columns),
        slopes_(ROWS, COLUMNS),
        left_(1, whole_groups<T>(ROWS) * k_.rows),
        a_(d_b.needed() ? d_b.panels() : 0, panel_bytes<T>(ROWS)),
        b_(d_a.needed() ? d_a.panels() : 0, panel_bytes<T>(COLUMNS)) {}

  // slope(g, s, r, rows, c, columns) writes the slopes of a tile to g, in rows of COLUMNS.
  template <class F>
  void block(Range rows, Range columns, F slope) {
    for (int64_t c = columns.first; c < columns.end; c += COLUMNS) {
      const Range some{c, std::min(c + COLUMNS, columns.end)};
      for (int64_t p = 0; p * k_.columns < some.count(); ++p) tiles_.pack(p, c / k_.columns + p);
      if (d_a_.needed()) pack(b_, pairs_.b, some);
      for (int64_t r = rows.first; r < rows.end; r += ROWS)
        part({r, std::min(r + ROWS, rows.end)}, some, slope);
    }
  }

 private:
  void pack(const Buffer<char>& to, const Rows<T>& from, Range of) const {
    for (int64_t p = 0; p * k_.columns < pairs_.depth; ++p)
      k_.pack_rows(to.row(p), from.data() + of.first, p * k_.columns, of.count(),
                   std::min(k_.columns, pairs_.depth - p * k_.columns));
  }

  template <class F>
  void part(Range rows, Range columns, F slope) {
    for (int64_t c = 0; c < columns.count(); c += k_.columns)
      for (int64_t r = 0; r < rows.count(); r += k_.rows) {
        const int64_t height = std::min(k_.rows, rows.count() - r);
        const A* const s = tiles_.tile(c / k_.columns, rows.first + r, height);
        slope(slopes_.row(r) + c, s, rows.first + r, height, columns.first + c,
              std::min(k_.columns, columns.count() - c));
      }
    const T* left[TileKernels<T>::MOST_ROWS];
    if (d_a_.needed())
      for (int64_t p = 0; p < d_a_.panels(); ++p)
        for (int64_t r = 0; r < rows.count(); r += k_.rows) {
          const int64_t height = std::min(k_.rows, rows.count() - r);
          for (int64_t i = 0; i < k_.rows; ++i) left[i] = slopes_.row(r + std::min(i, height - 1));
          d_a_.add(rows.first + r, height, p, left, k_.group, b_.row(p), columns.count());
        }
    if (!d_b_.needed()) return;
    pack(a_, pairs_.a, rows);
    const T* from[ROWS];
    for (int64_t r = 0; r < rows.count(); ++r) from[r] = slopes_.row(r);
    for (int64_t i = 0; i < k_.rows; ++i) left[i] = left_.data() + i * k_.group;
    for (int64_t c = 0; c < columns.count(); c += k_.rows) {
      const int64_t height = std::min(k_.rows, columns.count() - c);
      k_.pack_left(left_.data(), from, c, rows.count(), height);
      for (int64_t p = 0; p < d_b_.panels(); ++p)
        d_b_.add(columns.first + c, height, p, left, k_.rows * k_.group, a_.row(p), rows.count());
    }
  }

  const TileKernels<T>& k_ = tile_kernels<T>();
  const Pairs<T>& pairs_;
  const Gradient<T>&d_a_, &d_b_;
  LogitTiles<T> tiles_;
  Buffer<T> slopes_, left_;
  Buffer<char> a_, b_;
};

// lse is the softmax's alone.
template <class T, class A = typename wide<T>::type>
Tensors backward(const Pairs<T>& pairs, bool softmax, A grad, A scale, A bias, const A* lse,
                 const std::vector<bool>& needs) {
  const auto& kernels = contrastive_kernels<T>();
  const Gradient<T> d_a(pairs, needs[0]), d_b(pairs, needs[1]);
  const Buffer<A> present_lse(4, softmax ? pairs.blocks * pairs.side : 0);  // the last panel may be filled up
  for (int64_t k = 0; softmax && k < 4; ++k)
    for (int64_t i = 0; i < pairs.count; ++i)
      present_lse.row(k)[i] = lse[k * pairs.samples + pairs.sample[i]];
  std::vector<std::array<double, 2>> sums(pairs.blocks * pairs.blocks);  // of slopes: weighted, and all
  // The blocks of one step share no rows and no columns, so nobody else writes to their gradients, and each
  // row of a gradient adds up in the same order always.
  const bool anything = needs[0] || needs[1] || needs[2] || (needs[3] && !softmax);
  for (int64_t step = 0; anything && step < pairs.blocks; ++step)
    take_turns<T>(pairs.blocks, 1, 3 * pairs.cost(), [&](auto take) {
      Worker<T> worker(pairs, d_a, d_b);
      for (int64_t y; (y = take()) >= 0;) {
        const int64_t x = (y + step) % pairs.blocks;
        double* const to = sums[y * pairs.blocks + x].data();
        worker.block(pairs.block(y), pairs.block(x),
                     [&](T* g, const A* s, int64_t r, int64_t rows, int64_t c, int64_t columns) {
                       constexpr int64_t STRIDE = Worker<T>::COLUMNS;
                       if (!softmax)
                         return kernels.sigmoid_backward(g, STRIDE, s, rows, columns, scale, bias, r - c,
                                                         grad * scale, to);
                       const A* const row_lse[] = {present_lse.row(0) + r, present_lse.row(1) + r};
                       const A* const column_lse[] = {present_lse.row(2) + c, present_lse.row(3) + c};
                       kernels.softmax_backward(g, STRIDE, s, rows, columns, scale * LOG2_E<A>, row_lse,
                                                column_lse, r - c, grad * scale, to);
                     });
      }
    });

  Tensors made;
  if (needs[0]) made.push_back(d_a.finish());
  if (needs[1]) made.push_back(d_b.finish());
  double weighted = 0, all = 0;
  for (const auto& s : sums) weighted += s[0], all += s[1];
  const auto put = [&](double x) { *data<A>(made.emplace_back(empty({}, scalar_type<A>))) = x; };
  // Without pairs both are 0 whatever grad is: that of loss / count is infinite then.
  if (needs[2]) put(pairs.count ? grad * weighted : 0);
  if (needs[3]) put(pairs.count && !softmax ? grad * all : 0);
  return made;
}

Tensors contrastive_loss(Tensor a, Tensor b, Tensor logit_scale, Maybe logit_bias, std::string kind,
                         Maybe present) {
  return by_type("contrastive_loss: a", a.scalar_type(), 0, [&](auto zero, auto to) {
    using T = decltype(zero);
    using A = typename wide<T>::type;
    const Pairs<T> pairs(to(a), to(b), present);
    const A scale = *data<A>(logit_scale);
    return kind == "softmax" ? softmax_loss(pairs, scale)
                             : sigmoid_loss(pairs, scale, logit_bias ? *data<A>(logit_bias) : A(0));
  });
}

Tensors contrastive_loss_backward(Tensor grad, Tensor a, Tensor b, Tensor logit_scale, Maybe logit_bias,
                                  std::string kind, Maybe present, Maybe lse, std::vector<bool> needs) {
  return by_type("contrastive_loss: a", a.scalar_type(), needs[0] + needs[1], [&](auto zero, auto to) {
    using T = decltype(zero);
    using A = typename wide<T>::type;
    const Maybe whole = lse ? Maybe(as_contiguous(*lse)) : lse;
    return backward(Pairs<T>(to(a), to(b), present), kind == "softmax", *data<A>(grad), *data<A>(logit_scale),
                    logit_bias ? *data<A>(logit_bias) : A(0), data<A>(whole), needs);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  bind<&contrastive_loss>(m, "contrastive_loss.cpu");
  bind<&contrastive_loss_backward>(m, "contrastive_loss_backward.cpu");
}

}  // namespace mmfast
