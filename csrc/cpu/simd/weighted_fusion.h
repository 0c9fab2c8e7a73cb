// Kernels of weighted_fusion on one row, as csrc/cpu/simd/weighted_fusion.cpp compiles them for each
// instruction set. Types and pointers only: see rows.h.
#pragma once

#include "rows.h"

namespace mmfast {

template <class T, class A = typename wide<T>::type>
struct WeightedKernels {
  // out = sum over the `count` rows of weight * x
  void (*mix)(T* out, const T* const* x, const A* weight, int64_t count, int64_t n);
  // dx = weight * grad, unless dx is null;  returns grad . x
  A (*backward)(T* dx, A weight, const T* grad, const T* x, int64_t n);
};

}  // namespace mmfast
