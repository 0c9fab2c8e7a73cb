// Products of matrices whose rows lie anywhere: PyTorch's GEMMs want one stride, take one pair of matrices a
// call and leave bias, activation and the sum over several sources to further passes over memory.
#pragma once

#include <atomic>
#include <map>
#include <vector>

#include "simd/tiles.h"
#include "tensors.h"

MM_DISPATCH(mmfast_tiles, const void*, mmfast::RowType)

namespace mmfast {

template <class T>
const TileKernels<T>& tile_kernels() {
  return *static_cast<const TileKernels<T>*>(mmfast_tiles()(row_type<T>));
}

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// worker(take) on every thread, where take() is the next task, or -1 after the last: whoever is free goes on,
// since absence makes some tasks short, and another process may have a core for a while.
template <class F>
void take_turns(int64_t tasks, const F& worker) {
  std::atomic<int64_t> next = 0;
  const auto take = [&] {
    const int64_t task = next++;
    return task < tasks ? task : -1;
  };
  if (tasks > 0) torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) { worker(take); });
}

// A pointer to each row of a matrix; in what follows a null pointer is a row that is not there.
template <class T>
using Rows = std::vector<const T*>;

template <class T>
Rows<T> row_pointers(const Matrix<const T>& m) {
  Rows<T> out(m.rows);
  for (int64_t r = 0; r < m.rows; ++r) out[r] = m.row(r);
  return out;
}

// What is done to a row before it is multiplied: (x - mean) * rstd * weight.
template <class T, class A = typename wide<T>::type>
struct Centring {
  const A *mean, *rstd;  // of each row; rstd null: 1
  const T* weight;       // may be null

  void apply(T* out, const T* x, int64_t r, int64_t n) const {
    row_kernels<T>().normalize(out, x, mean[r], rstd ? rstd[r] : 1, weight, n);
  }
};

// Ask for the cache lines of to[0 .. n) while a tile is being made: its rows are written far apart.
template <class T>
void fetch_to_write(const T* to, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(to + i, 1);
}

// The right-hand side of products, [depth, columns], packed for the tiles.
template <class T>
class Right {
 public:
  int64_t depth, columns;

  Right(int64_t depth_, int64_t columns_)
      : depth(depth_),
        columns(columns_),
        memory_(parts(columns, kernels().columns),
                parts(parts(depth, kernels().group) * kernels().group * kernels().columns * kernels().bytes,
                      sizeof(float))) {}

  // rows[k][0 ...], at most `depth` of them
  void fill(const Rows<T>& rows) {
    each_panel([&](void* to, int64_t first, int64_t count) {
      kernels().pack_rows(to, rows.data(), first, rows.size(), count);
    });
  }
  static Right of_rows(const Rows<T>& rows, int64_t columns) {
    Right right(rows.size(), columns);
    right.fill(rows);
    return right;
  }
  // the transposed matrix of these rows
  static Right of_columns(const Rows<T>& rows, int64_t depth) {
    Right right(depth, rows.size());
    right.each_panel([&](void* to, int64_t first, int64_t count) {
      kernels().pack_columns(to, rows.data() + first, depth, count);
    });
    return right;
  }
  const void* panel(int64_t p) const { return memory_.row(p); }

 private:
  template <class Pack>
  void each_panel(const Pack& pack) {
    const int64_t width = kernels().columns;
    parallel_rows(parts(columns, width), depth * width, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        pack(memory_.row(p), p * width, std::min(width, columns - p * width));
    });
  }
  static const TileKernels<T>& kernels() { return tile_kernels<T>(); }

  Buffer<float> memory_;  // a row for each panel
};

// One term of a sum of products: left @ right, left out of the rows whose pointer is null.
template <class T>
struct Term {
  Rows<T> left;
  std::vector<Right<T>> right;  // for each of the sums that are made at once
  const Centring<T>* centring;  // of left; may be null
};

// The rows of a sum of products in an order in which the rows of a tile have the same terms.
struct Order {
  struct Tile {
    int64_t first, count;  // in `rows`
  };
  std::vector<int64_t> rows;
  std::vector<Tile> tiles;

  template <class T>
  Order(int64_t count, const std::vector<Term<T>>& terms, int64_t tile) {
    std::map<std::vector<bool>, std::vector<int64_t>> alike;
    std::vector<bool> there(terms.size());
    std::vector<int64_t>* list = nullptr;
    for (int64_t r = 0; r < count; ++r) {
      bool changed = !list;
      for (size_t i = 0; i < terms.size(); ++i)
        if (there[i] != (terms[i].left[r] != nullptr)) there[i] = !there[i], changed = true;
      if (changed) list = &alike[there];
      list->push_back(r);
    }
    for (const auto& [_, list] : alike) {
      for (size_t k = 0; k < list.size(); k += tile)
        tiles.push_back({static_cast<int64_t>(rows.size() + k), std::min<int64_t>(tile, list.size() - k)});
      rows.insert(rows.end(), list.begin(), list.end());
    }
  }
};

// out [rows, columns] = a start + the terms, `sums` of them at once, tile by tile. begin(row, first, count,
// sum, c) says where columns first ... first + count of the start lie: in c, once it has written them there,
// or elsewhere if a whole tile's width can be read; null is zeros. end(row, first, count, c, other) takes the
// sums, `other` those of the second. The order of a sum's terms does not depend on the number of threads.
template <class T, class Begin, class End>
void sum_of_products(int64_t rows, int64_t columns, int64_t sums, const std::vector<Term<T>>& terms,
                     Begin begin, End end) {
  using A = typename wide<T>::type;
  constexpr int64_t TILES = 8, PANELS = 4;  // of a task: its rows stay in a core's second cache
  const auto& kernels = tile_kernels<T>();
  const int64_t height = kernels.rows, width = kernels.columns;
  const Order order(rows, terms, height);
  int64_t centred = 0;  // elements of a row that are centred first
  for (const auto& t : terms)
    if (t.centring) centred += t.right[0].depth;
  const int64_t panels = parts(columns, width), blocks = parts(order.tiles.size(), TILES);
  const int64_t group = centred ? panels : PANELS,
                tasks = blocks * parts(panels, std::max<int64_t>(group, 1));

  take_turns(tasks, [&](auto take) {
    const Buffer<A> c(sums * height, width);
    std::fill_n(c.data(), sums * height * width, A(0));
    std::vector<const A*> at(sums * height);  // where the tile's rows stand
    const std::vector<A> zeros(width, 0);
    Rows<T> left(height);
    std::vector<Rows<T>> ready(terms.size(), Rows<T>(TILES * height));
    std::vector<T> memory(TILES * height * centred);
    for (int64_t task; (task = take()) >= 0;) {
      const auto* const first = order.tiles.data() + task % blocks * TILES;
      const auto* const last = std::min(first + TILES, order.tiles.data() + order.tiles.size());
      const int64_t* const own = order.rows.data() + first->first;
      const int64_t count = (last - 1)->first + (last - 1)->count - first->first;
      T* to = memory.data();
      for (size_t k = 0; k < terms.size(); ++k)
        for (int64_t i = 0; i < count; ++i) {
          const auto& t = terms[k];
          ready[k][i] = t.left[own[i]];
          if (!t.centring || !ready[k][i]) continue;
          t.centring->apply(to, ready[k][i], own[i], t.right[0].depth);
          ready[k][i] = to;
          to += t.right[0].depth;
        }
      const int64_t first_panel = task / blocks * group;
      for (int64_t p = first_panel; p < std::min(first_panel + group, panels); ++p) {
        const int64_t column = p * width, used = std::min(width, columns - column);
        for (const auto* tile = first; tile < last; ++tile) {
          const int64_t begun = tile->first - first->first;
          // a short tile's last row fills it up
          const auto row = [&](int64_t i) { return begun + std::min(i, tile->count - 1); };
          for (int64_t i = 0; i < sums * height; ++i) {
            const A* const start = begin(own[row(i % height)], column, used, i / height, c.row(i));
            at[i] = start ? start : zeros.data();
          }
          for (size_t k = 0; k < terms.size(); ++k) {
            if (!ready[k][begun]) continue;
            for (int64_t i = 0; i < height; ++i) left[i] = ready[k][row(i)];
            for (int64_t s = 0; s < sums; ++s) {
              const auto& right = terms[k].right[s];
              kernels.multiply(c.row(s * height), &at[s * height], left.data(), kernels.group, right.panel(p),
                               right.depth);
              for (int64_t i = s * height; i < (s + 1) * height; ++i) at[i] = c.row(i);
            }
          }
          for (int64_t i = 0; i < tile->count; ++i)
            end(own[begun + i], column, used, at[i], sums > 1 ? at[height + i] : nullptr);
        }
      }
    }
  });
}

// out [m, n] = sum over k of left[k][0 .. m).T @ right[k][0 .. n), over the k where both are there, in parts
// one after the other; end(row, first, count, c) takes columns first ... of a row of it. `centring`, of
// right, may be null.
template <class T, class End>
void product_over_rows(const Rows<T>& left, int64_t m, const Rows<T>& right, int64_t n,
                       const Centring<T>* centring, End end) {
  using A = typename wide<T>::type;
  // a panel, and a task's tiles, stay in a core's second cache
  constexpr int64_t DEPTH = 1024 / sizeof(T), TILES = 8;
  const auto& kernels = tile_kernels<T>();
  const int64_t height = kernels.rows, width = kernels.columns, tile = height * width;
  const int64_t tiles = parts(m, height), panels = parts(n, width);
  std::vector<int64_t> there;
  for (size_t k = 0; k < left.size(); ++k)
    if (left[k] && right[k]) there.push_back(k);

  Buffer<A> c(tiles * panels, tile);
  Buffer<T> centred(centring ? DEPTH : 0, n);
  Right<T> whole(DEPTH, n);
  parallel_rows(tiles * panels, tile,
                [&](int64_t from, int64_t to) { std::fill_n(c.row(from), (to - from) * tile, A(0)); });
  for (size_t first = 0; first < there.size(); first += DEPTH) {
    const int64_t* const k = there.data() + first;
    const int64_t depth = std::min<int64_t>(DEPTH, there.size() - first);
    Rows<T> a(depth), b(depth);
    for (int64_t i = 0; i < depth; ++i) a[i] = left[k[i]], b[i] = centring ? centred.row(i) : right[k[i]];
    if (centring)
      parallel_rows(depth, n, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) centring->apply(centred.row(i), right[k[i]], k[i], n);
      });
    whole.fill(b);
    take_turns(parts(tiles, TILES), [&](auto take) {
      const Buffer<T> packed(TILES, DEPTH * height);
      Rows<T> rows(height);
      std::vector<const A*> at(height);
      for (int64_t task; (task = take()) >= 0;) {
        const int64_t begin = task * TILES, end = std::min(begin + TILES, tiles);
        for (int64_t t = begin; t < end; ++t)
          kernels.pack_left(packed.row(t - begin), a.data(), t * height, depth,
                            std::min(height, m - t * height));
        for (int64_t p = 0; p < panels; ++p)
          for (int64_t t = begin; t < end; ++t) {
            A* const sums = c.row(t * panels + p);
            for (int64_t i = 0; i < height; ++i) {
              rows[i] = packed.row(t - begin) + i * kernels.group;
              at[i] = sums + i * width;
            }
            kernels.multiply(sums, at.data(), rows.data(), height * kernels.group, whole.panel(p), depth);
          }
      }
    });
  }
  parallel_rows(tiles, panels * tile, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t)
      for (int64_t i = 0; i < std::min(height, m - t * height); ++i)
        for (int64_t p = 0; p < panels; ++p)
          end(t * height + i, p * width, std::min(width, n - p * width), c.row(t * panels + p) + i * width);
  });
}

}  // namespace mmfast
