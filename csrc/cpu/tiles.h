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

// worker(take) on every thread, where take() is the next of lines * of_line tasks, or -1 after the last:
// whoever is free goes on, since absence makes some tasks short, and another process may have a core for a
// while. A thread follows a line of tasks to its end, each starts at another one. `cost` of a task: in
// multiplications.
template <class F>
void take_turns(int64_t lines, int64_t of_line, int64_t cost, const F& worker) {
  std::vector<std::atomic<int64_t>> next(lines);
  const int64_t worthwhile = (1 << 18) / std::max<int64_t>(cost, 1) + 1;  // tasks for one thread
  if (lines * of_line == 0) return;
  torch::stable::parallel_for(0, lines * of_line, worthwhile, [&](int64_t begin, int64_t) {
    int64_t line = begin / of_line, ended = 0;
    worker([&]() -> int64_t {
      for (; ended < lines; ++ended, line = (line + 1) % lines)
        if (const int64_t task = next[line]++; task < of_line) return line * of_line + task;
      return -1;
    });
  });
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

// The right-hand side of products, [depth, columns], in panels as wide as a tile.
template <class T, class A = typename wide<T>::type>
struct Right {
  Rows<T> rows;  // the matrix's, or its transpose's
  bool transposed;
  int64_t depth, columns;

  static Right of_rows(Rows<T> rows, int64_t columns) {
    const int64_t depth = rows.size();
    return {std::move(rows), false, depth, columns};
  }
  static Right of_columns(Rows<T> rows, int64_t depth) {
    const int64_t columns = rows.size();
    return {std::move(rows), true, depth, columns};
  }

  static int64_t width() { return tile_kernels<T>().columns; }
  int64_t used(int64_t p) const { return std::min(width(), columns - p * width()); }
  int64_t packed_bytes() const {  // of a panel
    const auto& k = tile_kernels<T>();
    return parts(depth, k.group) * k.group * k.columns * k.bytes;
  }
  void pack(char* to, int64_t p) const {
    const auto& k = tile_kernels<T>();
    if (transposed)
      k.pack_columns(to, rows.data() + p * width(), depth, used(p));
    else
      k.pack_rows(to, rows.data(), p * width(), depth, used(p));
  }
  // `count` rows of c = start + left @ panel p, which is read where it lies if `packed` is null
  void multiply(A* c, const A* const* start, const T* const* left, int64_t count, int64_t p,
                const char* packed) const {
    const auto& k = tile_kernels<T>();
    if (packed)
      k.multiply(c, start, left, k.group, packed, depth);
    else if (transposed)
      k.multiply_columns(c, start, left, count, rows.data() + p * width(), used(p), depth);
    else
      k.multiply_rows(c, start, left, count, rows.data(), p * width(), depth);
  }
  // Part of a row cannot be read in vectors.
  bool readable(int64_t p) const { return transposed || used(p) == width(); }
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
  constexpr int64_t FEW = 64;   // rows, for which packing takes longer than it saves
  constexpr int64_t TILES = 8;  // of a task: its rows stay in a core's second cache
  const auto& kernels = tile_kernels<T>();
  const int64_t height = kernels.rows, width = kernels.columns;
  const Order order(rows, terms, height);
  int64_t depth = 0, centred = 0, bytes = 0;  // of a row, of it what is centred first, of a packed panel
  for (const auto& t : terms) {
    depth += sums * t.right[0].depth;
    bytes += sums * t.right[0].packed_bytes();
    if (t.centring) centred += t.right[0].depth;
  }
  const int64_t group = rows > 512 ? 4 : 1;  // panels of a task: those after the first find its rows near
  const int64_t panels = parts(columns, width), blocks = parts(order.tiles.size(), TILES);
  const int64_t cost = std::min(rows, TILES * height) * group * width * depth;

  take_turns(parts(panels, group), blocks, cost, [&](auto take) {
    const Buffer<A> c(sums * height, width);
    std::fill_n(c.data(), sums * height * width, A(0));
    std::vector<const A*> at(sums * height);  // where the tile's rows stand
    const std::vector<A> zeros(width, 0);
    Rows<T> left(height);
    std::vector<Rows<T>> ready(terms.size(), Rows<T>(TILES * height));
    const Buffer<T> memory(std::min(rows, TILES * height), centred);
    const Buffer<char> packed(group, bytes);
    std::vector<const char*> panel(group * terms.size() * sums);  // null: read in place
    int64_t held = -1;                                            // the first panel that is packed
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t first_panel = task / blocks * group, end_panel = std::min(first_panel + group, panels);
      if (held != first_panel) {
        held = first_panel;
        auto* to = packed.data();
        auto next = panel.begin();
        for (int64_t p = first_panel; p < end_panel; ++p)
          for (const auto& t : terms)
            for (const auto& right : t.right) {
              const bool in_place = rows <= FEW && right.readable(p);
              *next++ = in_place ? nullptr : to;
              if (!in_place) right.pack(to, p), to += right.packed_bytes();
            }
      }
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
      for (int64_t p = first_panel; p < end_panel; ++p) {
        const int64_t column = p * width, used = std::min(width, columns - column);
        for (const auto* tile = first; tile < last; ++tile) {
          const int64_t begun = tile->first - first->first;
          // a short tile's last row fills it up
          const auto row = [&](int64_t i) { return begun + std::min(i, tile->count - 1); };
          for (int64_t i = 0; i < sums * height; ++i) {
            const A* const start = begin(own[row(i % height)], column, used, i / height, c.row(i));
            at[i] = start ? start : zeros.data();
          }
          auto next = panel.begin() + (p - first_panel) * terms.size() * sums;
          for (size_t k = 0; k < terms.size(); ++k) {
            if (!ready[k][begun]) {
              next += sums;
              continue;
            }
            for (int64_t i = 0; i < height; ++i) left[i] = ready[k][row(i)];
            for (int64_t s = 0; s < sums; ++s) {
              terms[k].right[s].multiply(c.row(s * height), &at[s * height], left.data(), tile->count, p,
                                         *next++);
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

  const int64_t most = std::min<int64_t>(there.size(), DEPTH);
  const bool once = there.size() <= DEPTH;
  const Buffer<A> c(once ? 0 : tiles * panels, tile);
  const Buffer<T> centred(centring ? most : 0, n);
  const auto bytes = parts(most, kernels.group) * kernels.group * width * kernels.bytes;
  const Buffer<char> whole(panels, bytes);
  size_t first = 0;
  do {
    const int64_t* const k = there.data() + first;
    const int64_t depth = std::min<int64_t>(DEPTH, there.size() - first);
    const bool begins = first == 0, ends = first + depth == there.size();
    Rows<T> a(depth), b(depth);
    for (int64_t i = 0; i < depth; ++i) a[i] = left[k[i]], b[i] = centring ? centred.row(i) : right[k[i]];
    if (centring)
      parallel_rows(depth, n, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) centring->apply(centred.row(i), right[k[i]], k[i], n);
      });
    parallel_rows(panels, depth * width, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p)
        kernels.pack_rows(whole.row(p), b.data(), p * width, depth, std::min(width, n - p * width));
    });
    take_turns(parts(tiles, TILES), 1, TILES * tile * panels * depth, [&](auto take) {
      const Buffer<T> packed(TILES, parts(depth, kernels.group) * kernels.group * height);
      const Buffer<A> own(once, tile);
      const std::vector<A> zeros(width, 0);
      Rows<T> rows(height);
      std::vector<const A*> at(height, zeros.data());
      for (int64_t task; (task = take()) >= 0;) {
        const int64_t begin = task * TILES, end_ = std::min(begin + TILES, tiles);
        for (int64_t t = begin; t < end_; ++t)
          kernels.pack_left(packed.row(t - begin), a.data(), t * height, depth,
                            std::min(height, m - t * height));
        for (int64_t p = 0; p < panels; ++p)
          for (int64_t t = begin; t < end_; ++t) {
            A* const sums = once ? own.data() : c.row(t * panels + p);
            for (int64_t i = 0; i < height; ++i) {
              rows[i] = packed.row(t - begin) + i * kernels.group;
              if (!begins) at[i] = sums + i * width;
            }
            kernels.multiply(sums, at.data(), rows.data(), height * kernels.group, whole.row(p), depth);
            for (int64_t i = 0; ends && i < std::min(height, m - t * height); ++i)
              end(t * height + i, p * width, std::min(width, n - p * width), sums + i * width);
          }
      }
    });
    first += depth;
  } while (first < there.size());
}

}  // namespace mmfast
