// Kernels of a softmax on tiles of logits, as csrc/cpu/simd/attention.cpp compiles them for each instruction
// set. Types and pointers only: see rows.h.
#pragma once

#include "rows.h"

namespace mmfast {

// A row's logits for one block of keys, x = scale * s + bias in units of ln 2, with s as products leave it:
// the row of one panel's tile, and a tile [rows, columns] further on that of the next.
template <class T, class A = typename wide<T>::type>
struct AttentionKernels {
  static constexpr int64_t MOST_KEYS = sizeof(T) == 2 ? 128 : 64;  // in any instruction set

  int64_t keys;   // of a block: whole panels
  int64_t lanes;  // of a vector of A
  // One step of an online softmax for some rows of a tile, whose max, sum [lanes] and bias lie at row[i]: p =
  // 2^(x - max) for the first keys[i] of the block, 0 for the rest of it; sum += p. factor[i] is what all
  // before has to be multiplied with, since max grew. scale >= 0.
  void (*softmax)(T* p, const A* s, int64_t rows, const int64_t* row, const int64_t* keys, A scale,
                  const A* bias, A* max, A* sum, A* factor);
  // p = 2^(x - max) * inverse, ds = p * (dp - delta), both 0 from `count` on. Unless sums is null, sums[0] +=
  // the sum of ds and sums[1] += that of p. With `alone` these are all keys that the row sees: p is made to
  // add up to 1 and ds = p * (dp - the sum of p * dp - delta), which needs no rounded output: for one key it
  // is exact.
  void (*softmax_backward)(T* p, T* ds, const A* s, const A* dp, int64_t count, A scale, A bias, A max,
                           A inverse, A delta, bool alone, A* sums);
  // x *= factor
  void (*scale)(A* x, A factor, int64_t n);
};

}  // namespace mmfast
