// Kernels of a matrix product, as csrc/cpu/simd/tiles.cpp compiles them for each instruction set. Types and
// pointers only: see rows.h.
#pragma once

#include "rows.h"

namespace mmfast {

// A product is made of tiles [rows, columns] whose sums stay in registers. Consecutive k lie together in
// groups of `group`, the most that an instruction takes at once: what is packed has as many elements as
// [depth / group, width, group], the last group and the last columns filled up with zeros.
template <class T, class A = typename wide<T>::type>
struct TileKernels {
  // In any instruction set.
  static constexpr int64_t MOST_ROWS = sizeof(T) == 2 ? 32 : 6, MOST_COLUMNS = 256 / sizeof(A);
  static constexpr int64_t WHOLE_TILES = 96;  // rows
  static constexpr int64_t MOST_GROUP = 32;
  static constexpr int64_t LARGE_ROWS = sizeof(T) == 8 ? MOST_ROWS : 32;  // the most that `large` has too

  int64_t rows, columns, group;
  int64_t few;  // rows, for which packing what they are multiplied with takes longer than it saves
  int64_t left_bytes, right_bytes;  // of an element once packed
  // What a thread has to do before and after its products; null: nothing.
  void (*begin)();
  void (*end)();
  // The left-hand side for one tile, [depth / group, rows, group], of elements of left_bytes: element (k, i)
  // is from[k][first + i].
  void (*pack_left)(void* to, const T* const* from, int64_t first, int64_t depth, int64_t count);
  // The right-hand side for one tile, width `columns`: element (k, j) is from[k][first + j].
  void (*pack_rows)(void* to, const T* const* from, int64_t first, int64_t depth, int64_t count);
  // The same of a transposed one: element (k, j) is from[j][k].
  void (*pack_columns)(void* to, const T* const* from, int64_t depth, int64_t count);
  // sums [count] = the sum over `depth` rows of from[k][first ...]
  void (*add_rows)(A* sums, const T* const* from, int64_t first, int64_t depth, int64_t count);
  // c [rows, columns] = start + left @ right: start's row i lies at start[i], which may be c's own, and
  // left's element (i, k) is left[i][k / group * step + k % group]. A null start is zeros. All rows
  // of left and start can be read, but only the first `count` rows and `used` columns of c are wanted: the
  // others may be written or not.
  void (*multiply)(A* c, const A* const* start, const T* const* left, int64_t step, int64_t count,
                   const void* right, int64_t used, int64_t depth);
  // The same of a whole tile whose sums are complete: activation(sums) goes to the rows of `out`, the sums to
  // those of `preact` if that is not null. c is only memory for sums on the way. Null where there is no such
  // kernel.
  void (*multiply_into)(T* const* out, T* const* preact, Activation activation, A* c, const A* const* start,
                        const T* const* left, int64_t step, const void* right, int64_t depth);
  // multiply with a right-hand side that is not packed: (k, j) is right[k][first + j] ... Rows from `count`
  // on are neither read nor written.
  void (*multiply_rows)(A* c, const A* const* start, const T* const* left, int64_t count,
                        const T* const* right, int64_t first, int64_t depth);
  // ... or right[j][k], for the first `columns` columns
  void (*multiply_columns)(A* c, const A* const* start, const T* const* left, int64_t count,
                           const T* const* right, int64_t columns, int64_t depth);
  // Others for large products, as wide; null: none.
  const TileKernels* large;
};

}  // namespace mmfast
