// Kernels of group_norm on a dense [rows, n] matrix whose columns have their own parameters, as
// csrc/cpu/simd/group_norm.cpp compiles them for each instruction set. Types and pointers only: see rows.h.
#pragma once

#include "rows.h"

namespace mmfast {

// A null residual, out, dx or dresidual leaves its term out.
template <class T, class A = typename wide<T>::type>
struct NormKernels {
  // of each column: mean, and sum of squared deviations from it
  void (*moments)(A* mean, A* m2, const T* x, int64_t rows, int64_t n);
  // y = max((x - mean) * scale + bias + residual, 0), the max if relu
  void (*apply)(T* y, const T* x, const T* residual, const A* mean, const A* scale, const A* bias, bool relu,
                int64_t rows, int64_t n);
  // g += sum of grad;  gx += sum of grad * (x - mean); grad counts where out > 0
  void (*sums)(A* g, A* gx, const T* grad, const T* out, const T* x, const A* mean, int64_t rows, int64_t n);
  // dx = grad * a + (x - mean) * b + c;  dresidual = grad
  void (*backward)(T* dx, T* dresidual, const T* grad, const T* out, const T* x, const A* mean, const A* a,
                   const A* b, const A* c, int64_t rows, int64_t n);
};

}  // namespace mmfast
