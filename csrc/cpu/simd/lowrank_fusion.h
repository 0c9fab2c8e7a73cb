// Kernels of lowrank_fusion on one row, as csrc/cpu/simd/lowrank_fusion.cpp compiles them for each
// instruction set. Types and pointers only: see rows.h.
#pragma once

#include "rows.h"

namespace mmfast {

template <class T, class A = typename wide<T>::type>
struct LowrankKernels {
  // product = factor if `first`, else product * factor;  kept = factor, unless null
  void (*multiply)(A* product, T* kept, const A* factor, bool first, int64_t n);
  // Of the product of `count` factors, with g = scale * grad: dfactors[i] = g * product of the others and
  // sums[i] += that, for each i that is not null. Returns the sum of grad * product of all.
  A (*backward)(T* const* dfactors, A* const* sums, const T* const* factors, int64_t count, A scale,
                const T* grad, int64_t n);
};

}  // namespace mmfast
