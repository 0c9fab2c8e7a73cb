// Kernels of lowrank_fusion on some rows, as csrc/cpu/simd/lowrank_fusion.cpp compiles them for each
// instruction set. Types and pointers only: see rows.h.
#pragma once

#include "rows.h"

namespace mmfast {

template <class T, class A = typename wide<T>::type>
struct LowrankKernels {
  // Of `count` rows: product[i] [n] = factor if `first`, else product[i] * factor; kept[i] + at = factor,
  // unless kept is null. Row i of the factor lies at factor + i * stride.
  void (*multiply)(A* const* product, T* const* kept, int64_t at, const A* factor, int64_t stride, bool first,
                   int64_t count, int64_t n);
  // Of `count` factors, each [ranks, n] and `stride` apart: dfactors[i] [ranks, n] = grad [n] * weight[r] *
  // product of the others, for each i that is not null. sums [ranks] += sum of grad * product of all.
  void (*backward)(T* const* dfactors, A* sums, const T* grad, const A* weight, const T* factors,
                   int64_t stride, int64_t count, int64_t ranks, int64_t n);
};

}  // namespace mmfast
