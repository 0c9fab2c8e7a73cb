// Kernels on one row, as csrc/cpu/simd/rows.cpp compiles them for each instruction set.
//
// Types and pointers only: an inline function here could be kept by the linker in its widest copy, for
// everyone.
#pragma once

#include <cstdint>

namespace mmfast {

struct bf16 {
  uint16_t bits;
};

template <class T>
struct wide {
  using type = float;
};
template <>
struct wide<double> {
  using type = double;
};

// Exponentials are made as powers of 2.
template <class A>
constexpr A LOG2_E = A(1.4426950408889634074L);

enum class Activation : int { none, relu, gelu, silu, swiglu };
enum class RowType : int { f32, f64, bf16 };

// What sums are made in whose terms cancel against each other. For bfloat16 what they lose is nothing beside
// its own rounding.
template <class T>
struct exact_sum {
  using type = typename wide<T>::type;
};
template <>
struct exact_sum<float> {
  using type = double;
};

// T is what memory holds, A what sums are made in. n counts elements. A null pointer leaves its term out.
template <class T, class A = typename wide<T>::type, class Sum = typename exact_sum<T>::type>
struct RowKernels {
  // out = x
  void (*narrow)(T* out, const A* x, int64_t n);
  void (*widen)(A* out, const T* x, int64_t n);
  // sum += scale * x
  void (*accumulate)(A* sum, A scale, const T* x, int64_t n);
  A (*dot)(const T* x, const A* y, int64_t n);
  // out = residual + gate * activation(preact), for swiglu times `other`
  void (*epilogue)(T* out, const A* preact, const A* other, const A* gate, const T* residual,
                   Activation activation, int64_t n);
  // dpreact = grad * gate * activation'(preact);  dgate += grad * activation(preact)
  void (*epilogue_backward)(T* dpreact, A* dgate, const T* grad, const T* preact, const A* gate,
                            Activation activation, int64_t n);
  // out = 0, where there are vectors past the caches: a plain store would first read what it overwrites
  void (*stream_zeros)(T* out, int64_t n);
  // mean and sum of squared deviations from it
  void (*moments)(const T* x, A* mean, A* m2, int64_t n);
  // out = (x - mean) * rstd * weight
  void (*normalize)(T* out, const T* x, A mean, A rstd, const T* weight, int64_t n);
  // sums[0] += sum dy * weight;  sums[1] += sum dy * weight * (x - mean) * rstd
  void (*norm_sums)(Sum* sums, const T* dy, const T* x, Sum mean, Sum rstd, const T* weight, int64_t n);
  // dx = rstd * (dy * weight - a - (x - mean) * rstd * b), dy in dx
  void (*norm_backward)(T* dx, const T* x, Sum mean, Sum rstd, const T* weight, Sum a, Sum b, int64_t n);
  // z += k;  dweight += w * z;  z = z * weight + c * bias: one output's row of the weight gradient under a
  // norm
  void (*norm_weights)(T* z, A* dweight, const T* w, A k, A c, const T* weight, const T* bias, int64_t n);
};

}  // namespace mmfast

#define MM_JOIN_(name, isa) name##_##isa
#define MM_JOIN(name, isa) MM_JOIN_(name, isa)

// A simd file's entry in the copy that is being compiled: a pointer to kernels<T> for each type of row.
#define MM_KERNELS_ENTRY(name)                                                      \
  extern "C" const void* MM_JOIN(mmfast_##name, MMFAST_ISA)(mmfast::RowType type) { \
    switch (type) {                                                                 \
      case mmfast::RowType::f32:                                                    \
        return &kernels<float>;                                                     \
      case mmfast::RowType::f64:                                                    \
        return &kernels<double>;                                                    \
      default:                                                                      \
        return &kernels<mmfast::bf16>;                                              \
    }                                                                               \
  }
