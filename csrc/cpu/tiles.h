// Products of matrices whose rows lie anywhere: PyTorch's GEMMs want one stride, take one pair of matrices a
// call and leave bias, activation and the sum over several sources to further passes over memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <optional>
#include <vector>

#include "simd/tiles.h"
#include "tensors.h"

namespace mmfast {

MM_KERNELS(tile_kernels, TileKernels)

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }

// The kernels for the product of [rows, depth] and [depth, columns].
template <class T>
const TileKernels<T>& tile_kernels(int64_t rows, int64_t depth, int64_t columns) {
  constexpr int64_t ROWS = 128, DEPTH = 128, COLUMNS = 128;
  const auto& usual = tile_kernels<T>();
  return usual.large && rows >= ROWS && depth >= DEPTH && columns >= COLUMNS ? *usual.large : usual;
}

template <class T>
bool are_large(const TileKernels<T>& kernels) {
  return &kernels != &tile_kernels<T>();
}

// A thread that makes products: some instruction sets want to be told.
template <class T>
struct Multiplying {
  const TileKernels<T>& kernels;

  explicit Multiplying(const TileKernels<T>& kernels) : kernels(kernels) {
    if (kernels.begin) kernels.begin();
  }
  ~Multiplying() {
    if (kernels.end) kernels.end();
  }
  Multiplying(const Multiplying&) = delete;
};

// worker(take) on every thread, where take() is the next of lines * of_line tasks, or -1 after the last:
// whoever is free goes on, since absence makes some tasks short, and another process may have a core for a
// while. A thread follows a line of tasks to its end, each starts at another one. Lines are circles, each
// begun elsewhere: lines often read the same, and on a busy machine two threads that are at nearly the same
// place were seen to hinder each other. `cost` of a task: in multiplications. Products of T are made in here
// only.
template <class T, class F>
void take_turns(const TileKernels<T>& kernels, int64_t lines, int64_t of_line, int64_t cost,
                const F& worker) {
  std::vector<std::atomic<int64_t>> next(lines);
  const int64_t worthwhile = (1 << 18) / std::max<int64_t>(cost, 1) + 1;  // tasks for one thread
  if (lines * of_line == 0) return;
  torch::stable::parallel_for(0, lines * of_line, worthwhile, [&](int64_t begin, int64_t) {
    const Multiplying<T> multiplying(kernels);
    int64_t line = begin / of_line, ended = 0;
    worker([&]() -> int64_t {
      for (; ended < lines; ++ended, line = (line + 1) % lines)
        if (const int64_t task = next[line]++; task < of_line)
          return line * of_line + (task + line * of_line / lines) % of_line;
      return -1;
    });
  });
}

template <class T, class F>
void take_turns(int64_t lines, int64_t of_line, int64_t cost, const F& worker) {
  take_turns(tile_kernels<T>(), lines, of_line, cost, worker);
}

// Independent work, its cost in multiplications.
struct Job {
  int64_t cost;
  std::function<void()> run;
};

// Runs them one after the other, each on all threads; or, where they are small and none is longer than a
// thread's share, side by side, each on one thread: a parallel region has its price.
inline void run_jobs(std::vector<Job> jobs) {
  constexpr int64_t SMALL = 1 << 26;
  int64_t total = 0, longest = 0;
  for (const Job& job : jobs) {
    total += job.cost;
    longest = std::max(longest, job.cost);
  }
  if (total > SMALL || longest * torch::stable::get_num_threads() > total) {
    for (const Job& job : jobs) job.run();
    return;
  }
  std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.cost > b.cost; });
  std::atomic<size_t> next = 0;
  torch::stable::parallel_for(0, jobs.size(), 1, [&](int64_t, int64_t) {
    for (size_t k; (k = next++) < jobs.size();) jobs[k].run();
  });
}

// Reading or writing an element takes as long as this many multiplications.
constexpr int64_t MEMORY = 16;

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

// Ask for them in the second cache: they are read soon, but not now.
template <class T>
void fetch_ahead(const T* from, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
}

// Packed elements of a line of k: whole groups of them.
template <class T>
int64_t whole_groups(int64_t depth, const TileKernels<T>& kernels = tile_kernels<T>()) {
  return parts(depth, kernels.group) * kernels.group;
}

template <class T>
int64_t panel_bytes(int64_t depth, const TileKernels<T>& kernels = tile_kernels<T>()) {
  return whole_groups(depth, kernels) * kernels.columns * kernels.right_bytes;
}

// The right-hand side of products, [depth, columns], in panels as wide as a tile.
template <class T, class A = typename wide<T>::type>
struct Right {
  Rows<T> rows;  // the matrix's, or its transpose's
  bool transposed;
  int64_t depth, columns;
  int64_t runs = 1;  // of each column, one after the other: run r of column j begins at rows[r * columns + j]
  const TileKernels<T>* kernels = &tile_kernels<T>();

  static Right of_rows(Rows<T> rows, int64_t columns) {
    const int64_t depth = rows.size();
    return {std::move(rows), false, depth, columns};
  }
  static Right of_columns(Rows<T> rows, int64_t depth) {
    const int64_t columns = rows.size();
    return {std::move(rows), true, depth, columns};
  }
  // Each column in some runs of `depth`, a multiple of MOST_GROUP.
  static Right of_runs(Rows<T> rows, int64_t depth, int64_t runs) {
    const int64_t columns = rows.size() / runs;
    return {std::move(rows), true, depth * runs, columns, runs};
  }

  int64_t width() const { return kernels->columns; }
  int64_t used(int64_t p) const { return std::min(width(), columns - p * width()); }
  int64_t packed_bytes() const { return panel_bytes(depth, *kernels); }
  void pack(char* to, int64_t p) const {
    const int64_t run = depth / runs;
    if (transposed)
      for (int64_t r = 0; r < runs; ++r)
        kernels->pack_columns(to + r * panel_bytes(run, *kernels), rows.data() + r * columns + p * width(),
                              run, used(p));
    else
      kernels->pack_rows(to, rows.data(), p * width(), depth, used(p));
  }
  // `count` rows of c = start + left @ panel p, which is read where it lies if `packed` is null
  void multiply(A* c, const A* const* start, const T* const* left, int64_t count, int64_t p,
                const char* packed) const {
    if (packed)
      kernels->multiply(c, start, left, kernels->group, count, packed, used(p), depth);
    else if (transposed)
      kernels->multiply_columns(c, start, left, count, rows.data() + p * width(), used(p), depth);
    else
      kernels->multiply_rows(c, start, left, count, rows.data(), p * width(), depth);
  }
  // Whether `rows` rows take less time to multiply with panel p where it lies than to pack it too. Part of a
  // row cannot be read in vectors; of a column each product's lanes have to be added up.
  bool in_place(int64_t rows, int64_t p) const {
    constexpr int64_t ADDING = 48;  // as long as packing these bytes of a column
    if (rows > kernels->few || runs > 1) return false;
    return transposed ? rows * ADDING <= depth * int64_t{sizeof(T)} : used(p) == width();
  }
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
    rows.reserve(count);
    // rows that lack a term, by the terms they have; mostly a row has those of the one before
    std::map<std::vector<bool>, std::vector<int64_t>> others;
    std::vector<int64_t>* alike = nullptr;
    std::vector<bool> which(terms.size()), before;
    for (int64_t r = 0; r < count; ++r) {
      bool all = true;
      for (size_t k = 0; k < terms.size(); ++k) {
        const bool there = terms[k].left[r] != nullptr;
        which[k] = there;
        all &= there;
      }
      if (all) {
        rows.push_back(r);
        continue;
      }
      if (!alike || which != before) alike = &others[which], before = which;
      alike->push_back(r);
    }
    const auto make_tiles = [&](size_t first) {
      for (size_t k = first; k < rows.size(); k += tile)
        tiles.push_back({static_cast<int64_t>(k), std::min<int64_t>(tile, rows.size() - k)});
    };
    make_tiles(0);
    for (const auto& [_, list] : others) {
      rows.insert(rows.end(), list.begin(), list.end());
      make_tiles(rows.size() - list.size());
    }
  }
};

// The right-hand sides of a sum's terms in the few panels that a thread is at.
template <class T>
class Panels {
 public:
  Panels(const std::vector<Term<T>>& terms, int64_t rows, int64_t sums, int64_t group)
      : terms_(terms), rows_(rows), sums_(sums), packed_(group * terms.size() * sums) {
    for (const auto& t : terms) bytes_ += group * sums * t.right[0].packed_bytes();
  }

  void go_to(int64_t first, int64_t end) {
    if (first == first_) return;
    first_ = first;
    char* to = memory_ ? memory_->data() : nullptr;
    auto next = packed_.begin();
    for (int64_t p = first; p < end; ++p)
      for (const auto& t : terms_)
        for (const auto& right : t.right) {
          const char*& packed = *next++ = nullptr;
          if (right.in_place(rows_, p)) continue;
          if (!to) to = memory_.emplace(1, bytes_).data();
          right.pack(to, p);
          packed = to;
          to += right.packed_bytes();
        }
  }
  // null: read where it lies
  const char* packed(int64_t p, size_t term, int64_t sum) const {
    return packed_[((p - first_) * terms_.size() + term) * sums_ + sum];
  }

 private:
  const std::vector<Term<T>>& terms_;
  int64_t rows_, sums_, bytes_ = 0, first_ = -1;
  std::vector<const char*> packed_;
  std::optional<Buffer<char>> memory_;
};

// The sums of a tile.
template <class T, class A = typename wide<T>::type>
struct Sums {
  using K = TileKernels<T>;
  alignas(64) A of[K::LARGE_ROWS * K::MOST_COLUMNS] = {};
  const A* at[K::LARGE_ROWS];  // where each row stands so far

  static inline const A zeros[K::MOST_COLUMNS] = {};
};

// Where a whole tile of a sum of products may go straight from the registers, instead of by way of end(),
// which has to do the same.
template <class T>
struct Into {
  T* out;     // activation(sums) [rows, columns]; null: nowhere
  T* preact;  // sums [rows, columns], or null
  Activation activation;
};

// out [rows, columns] = a start + the terms, `sums` of them at once, tile by tile. begin(row, first, count,
// sum, c) says where columns first ... first + count of the start lie: in c, once it has written them there,
// or elsewhere if a whole tile's width can be read; null is zeros. end(row, first, count, c, other) takes the
// sums, `other` those of the second, unless the tile has gone `into` its place. The order of a sum's terms
// does not depend on the number of threads.
template <class T, class Begin, class End>
void sum_of_products(int64_t rows, int64_t columns, int64_t sums, std::vector<Term<T>>& terms, Begin begin,
                     End end, const Into<T>& into = {}) {
  using A = typename wide<T>::type;
  if (rows == 0 || columns == 0) return;
  constexpr int64_t TILES = 8;                  // of a task: its rows stay in a core's second cache
  int64_t depth = 0, centred = 0, longest = 0;  // of a row, and what of it is centred first
  for (const auto& t : terms) {
    depth += sums * t.right[0].depth;
    longest = std::max(longest, t.right[0].depth);
    if (t.centring) centred += t.right[0].depth;
  }
  const auto& kernels = tile_kernels<T>(rows, longest, columns);
  for (auto& t : terms)
    for (auto& right : t.right) right.kernels = &kernels;
  const int64_t height = kernels.rows, width = kernels.columns;
  const Order order(rows, terms, height);
  const int64_t panels = parts(columns, width), blocks = parts(order.tiles.size(), TILES);
  // Columns of a task: panels after its first find its rows near. Some elements are larger once packed.
  const int64_t wide = rows <= 512 ? 64 : kernels.right_bytes > int64_t{sizeof(T)} ? 256 : 384;
  const int64_t most = parts(wide, width);
  const int64_t across = parts(panels, most), group = parts(panels, across);
  // A line for each thread: panels of its own, or else rows.
  const int64_t down = std::min(parts(torch::stable::get_num_threads(), across), blocks);
  const int64_t of_line = parts(blocks, down);
  const int64_t* const end_of_rows = order.rows.data() + rows;
  const bool direct = into.out && kernels.multiply_into && sums == 1 && !terms.empty();
  const int64_t cost = std::clamp(rows, MEMORY, TILES * height) * group * width * (depth + MEMORY);

  take_turns(kernels, across * down, of_line, cost, [&](auto take) {
    Panels<T> right(terms, rows, sums, group);
    Rows<T> ready(terms.size() * TILES * height);  // of the task, term by term
    const Buffer<T> memory(std::min(rows, TILES * height), centred);
    Sums<T> c[2];
    for (int64_t task; (task = take()) >= 0;) {
      const int64_t line = task / of_line, block = line / across * of_line + task % of_line;
      if (block >= blocks) continue;  // the last rows' lines may be shorter
      const int64_t first_panel = line % across * group, end_panel = std::min(first_panel + group, panels);
      right.go_to(first_panel, end_panel);
      const auto* const first = order.tiles.data() + block * TILES;
      const auto* const last = std::min(first + TILES, order.tiles.data() + order.tiles.size());
      const int64_t* const own = order.rows.data() + first->first;
      const int64_t count = (last - 1)->first + (last - 1)->count - first->first;
      T* to = memory.data();
      for (size_t k = 0; k < terms.size(); ++k)
        for (int64_t i = 0; i < count; ++i) {
          const auto& t = terms[k];
          const T*& x = ready[k * TILES * height + i] = t.left[own[i]];
          if (!t.centring || !x) continue;
          t.centring->apply(to, x, own[i], t.right[0].depth);
          x = to;
          to += t.right[0].depth;
        }
      for (int64_t p = first_panel; p < end_panel; ++p) {
        const int64_t column = p * width, used = std::min(width, columns - column);
        for (const auto* tile = first; tile < last; ++tile) {
          const int64_t begun = tile->first - first->first;
          // a short tile's last row fills it up
          const auto row = [&](int64_t i) { return begun + std::min(i, tile->count - 1); };
          for (int64_t s = 0; s < sums; ++s)
            for (int64_t i = 0; i < height; ++i) {
              const A* const start = begin(own[row(i)], column, used, s, c[s].of + i * width);
              c[s].at[i] = start ? start : Sums<T>::zeros;
            }
          // the last term's product ends in its place
          const bool straight = direct && tile->count == height && used == width &&
                                terms.back().left[own[begun]] && right.packed(p, terms.size() - 1, 0);
          for (size_t k = 0; k < terms.size(); ++k) {
            const T *left[TileKernels<T>::LARGE_ROWS], *const *const x = &ready[k * TILES * height];
            if (!x[begun]) continue;
            for (int64_t i = 0; i < height; ++i) left[i] = x[row(i)];
            // at each panel one row of this tile's place in the next task
            if (const int64_t* const next = own + count + begun + p - first_panel; next < end_of_rows)
              if (const T* const later = terms[k].left[*next]) fetch_ahead(later, terms[k].right[0].depth);
            if (straight && k + 1 == terms.size()) {
              T *out[TileKernels<T>::LARGE_ROWS], *preact[TileKernels<T>::LARGE_ROWS];
              for (int64_t i = 0; i < height; ++i) {
                const int64_t place = own[begun + i] * columns + column;
                out[i] = into.out + place;
                if (into.preact) preact[i] = into.preact + place;
              }
              kernels.multiply_into(out, into.preact ? preact : nullptr, into.activation, c[0].of, c[0].at,
                                    left, kernels.group, right.packed(p, k, 0), terms[k].right[0].depth);
              continue;
            }
            for (int64_t s = 0; s < sums; ++s) {
              terms[k].right[s].multiply(c[s].of, c[s].at, left, tile->count, p, right.packed(p, k, s));
              for (int64_t i = 0; i < height; ++i) c[s].at[i] = c[s].of + i * width;
            }
          }
          for (int64_t i = 0; !straight && i < tile->count; ++i)
            end(own[begun + i], column, used, c[0].at[i], sums > 1 ? c[1].at[i] : nullptr);
        }
      }
    }
  });
}

// A matrix whose columns lie in blocks of `width`, row after row in each.
template <class T>
struct Blocks {
  T* data;
  int64_t row_stride, width, block_stride;
  T* at(int64_t row, int64_t column) const {
    return data + row * row_stride + column / width * block_stride + column % width;
  }
};

// sums += the rows' columns first ... first + count, in parts: one chain of float32 over many rows would lose
// as many eps as there are rows.
template <class T, class A = typename wide<T>::type>
void add_rows(Wider<A>* sums, const Rows<T>& rows, int64_t first, int64_t count) {
  constexpr int64_t PART = 32;
  std::vector<A> part(count);
  for (int64_t begin = 0, height = rows.size(); begin < height; begin += PART) {
    tile_kernels<T>().add_rows(part.data(), rows.data() + begin, first, std::min(PART, height - begin),
                               count);
    for (int64_t j = 0; j < count; ++j) sums[j] += part[j];
  }
}

// out [m, n] = sum over k of left[k][0 .. m).T @ right[k][0 .. n), over the k where both are there, in parts
// one after the other. `centring`, of right, may be null; `total` [n], if it is not, takes the sums of
// right's rows that are multiplied.
template <class T>
void product_over_rows(const Blocks<T>& out, const Rows<T>& left, int64_t m, const Rows<T>& right, int64_t n,
                       const Centring<T>* centring, typename wide<T>::type* total = nullptr) {
  using A = typename wide<T>::type;
  // a panel, and a task's tiles, stay in a core's second cache
  constexpr int64_t DEPTH = 1024 / sizeof(T), LARGE_DEPTH = 384, MOST_TILES = 8;
  constexpr int64_t NEAR = 64;  // rows that stay in the first cache while each tile takes its part of them
  std::vector<int64_t> there;
  for (size_t k = 0; k < left.size(); ++k)
    if (left[k] && right[k]) there.push_back(k);
  const auto& kernels = tile_kernels<T>(m, there.size(), n);
  const int64_t height = kernels.rows, width = kernels.columns, tile = height * width;
  const int64_t tiles = parts(m, height), panels = parts(n, width);

  const bool large = are_large(kernels);
  const int64_t most_depth = large ? LARGE_DEPTH : DEPTH;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t of_task = large ? std::clamp<int64_t>(tiles / (2 * threads), 1, MOST_TILES) : MOST_TILES;
  const int64_t most = std::min<int64_t>(there.size(), most_depth);
  const bool once = static_cast<int64_t>(there.size()) <= most_depth;
  const Buffer<A> c(once ? 0 : tiles * panels, tile);
  const Buffer<T> centred(centring ? most : 0, n);
  std::vector<Wider<A>> totals(total ? n : 0, 0);
  const Buffer<char> whole(panels, panel_bytes(most, kernels));
  const int64_t step = height * kernels.group * kernels.left_bytes / static_cast<int64_t>(sizeof(T));
  size_t first = 0;
  do {
    const int64_t* const k = there.data() + first;
    const int64_t depth = std::min<int64_t>(most_depth, there.size() - first);
    const bool begins = first == 0, ends = first + depth == there.size();
    Rows<T> a(depth), b(depth);
    for (int64_t i = 0; i < depth; ++i) a[i] = left[k[i]], b[i] = centring ? centred.row(i) : right[k[i]];
    if (centring)
      parallel_rows(depth, n, [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; ++i) centring->apply(centred.row(i), right[k[i]], k[i], n);
      });
    parallel_rows(panels, depth * width, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) {
        const int64_t column = p * width, used = std::min(width, n - column);
        kernels.pack_rows(whole.row(p), b.data(), column, depth, used);
        if (total) add_rows(totals.data() + column, b, column, used);
      }
    });
    take_turns(
        kernels, parts(tiles, of_task), 1, of_task * tile * panels * std::max(depth, MEMORY), [&](auto take) {
          const Buffer<char> packed(of_task, whole_groups(depth, kernels) * height * kernels.left_bytes);
          Sums<T> own;
          for (int64_t task; (task = take()) >= 0;) {
            const int64_t from = task * of_task, until = std::min(from + of_task, tiles);
            for (int64_t i = 0; i < depth; i += NEAR)
              for (int64_t t = from; t < until; ++t)
                kernels.pack_left(packed.row(t - from) + i * height * kernels.left_bytes, a.data() + i,
                                  t * height, std::min(NEAR, depth - i), std::min(height, m - t * height));
            for (int64_t p = 0; p < panels; ++p) {
              const int64_t column = p * width, used = std::min(width, n - column);
              // where whole tiles go straight from the registers: columns may be those of two blocks
              T* const place =
                  ends && kernels.multiply_into && used == width && column % out.width + width <= out.width
                      ? out.at(0, column)
                      : nullptr;
              for (int64_t t = from; t < until; ++t) {
                A* const sums = once ? own.of : c.row(t * panels + p);
                const int64_t row = t * height, count = std::min(height, m - row);
                const T* rows[TileKernels<T>::LARGE_ROWS];
                for (int64_t i = 0; i < height; ++i) {
                  rows[i] = reinterpret_cast<const T*>(packed.row(t - from) +
                                                       i * kernels.group * kernels.left_bytes);
                  own.at[i] = sums + i * width;
                }
                const A* const* const start = begins ? nullptr : own.at;
                if (place && count == height) {
                  T* to[TileKernels<T>::LARGE_ROWS];
                  for (int64_t i = 0; i < height; ++i) to[i] = place + (row + i) * out.row_stride;
                  kernels.multiply_into(to, nullptr, Activation::none, sums, start, rows, step, whole.row(p),
                                        depth);
                  continue;
                }
                kernels.multiply(sums, start, rows, step, count, whole.row(p), used, depth);
                for (int64_t i = 0; ends && i < count; ++i)
                  for (int64_t done = 0, some; done < used; done += some) {
                    some = std::min(used - done, out.width - (column + done) % out.width);
                    row_kernels<T>().narrow(out.at(row + i, column + done), sums + i * width + done, some);
                  }
              }
            }
          }
        });
    first += depth;
  } while (first < there.size());
  if (total) std::copy(totals.begin(), totals.end(), total);
}

}  // namespace mmfast
