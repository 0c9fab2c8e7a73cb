// Kernels of contrastive_loss on a tile of products s [rows, columns], as csrc/cpu/simd/contrastive_loss.cpp
// compiles them for each instruction set. Types and pointers only: see rows.h.
#pragma once

#include "rows.h"

namespace mmfast {

// Of a tile the first `rows` and `columns` count. Row i's own pair is in column own + i, if that is in the
// tile. A softmax has its logits in units of ln 2: its scale holds the factor log2 e, a sigmoid's does not.
template <class T, class A = typename wide<T>::type>
struct ContrastiveKernels {
  int64_t lanes;  // of a vector of A
  // One step of two online softmaxes: of each row and of each column max and the sum of 2^(x - max), which
  // for a row is [lanes], x = scale * s. A max may lag behind the true one.
  void (*softmax)(const A* s, int64_t rows, int64_t columns, A scale, int64_t own, A* row_max, A* row_sum,
                  A* column_max, A* column_sum);
  // The sum of softplus(x), x = scale * s + bias, and of softplus(-x) for the own pairs.
  A (*sigmoid)(const A* s, int64_t rows, int64_t columns, A scale, A bias, int64_t own);
  // g [rows, stride] = factor * the slope of the loss in each logit, which with x = scale * s is half of 2^(x
  // - row_lse) + 2^(x - column_lse), less 1 for an own pair; sums[0] += the sum of slope * s, sums[1] += that
  // of the slopes. An lse is the sum of two arrays: subtracted one after the other, they leave a weight near
  // 1 its digits.
  void (*softmax_backward)(T* g, int64_t stride, const A* s, int64_t rows, int64_t columns, A scale,
                           const A* const* row_lse, const A* const* column_lse, int64_t own, A factor,
                           double* sums);
  // The same for the loss of `sigmoid`.
  void (*sigmoid_backward)(T* g, int64_t stride, const A* s, int64_t rows, int64_t columns, A scale, A bias,
                           int64_t own, A factor, double* sums);
  // For sums of three bytes, the upper two in T: those of [rows, columns] += more, a tile; and n of them as
  // A. Each time they are rounded to 16 significant bits. Null where T holds all.
  void (*add_to_split)(T* const* upper, uint8_t* const* lower, const A* more, int64_t rows, int64_t columns);
  void (*join_split)(A* to, const T* upper, const uint8_t* lower, int64_t n);
};

}  // namespace mmfast
