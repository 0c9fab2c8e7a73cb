// What the ops have in common: optional tensors, their memory, and the kernels on one row.
#pragma once

#include <optional>
#include <vector>

#include "matrix.h"
#include "simd/dispatch.h"

MM_DISPATCH(mmfast_rows, const void*, mmfast::RowType)

namespace mmfast {

using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

// For sums that are made once and used by every row: their error is the same in all of them and adds up.
template <class A>
using Wider = std::conditional_t<std::is_same_v<A, float>, double, long double>;

template <class T>
constexpr RowType row_type = std::is_same_v<T, double>  ? RowType::f64
                             : std::is_same_v<T, float> ? RowType::f32
                                                        : RowType::bf16;

template <class T>
const RowKernels<T>& row_kernels() {
  return *static_cast<const RowKernels<T>*>(mmfast_rows()(row_type<T>));
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
const T* data(const Maybe& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

// float16 goes through float32 copies: CPU GEMMs in float16 run at a tenth of the speed.
inline Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == ScalarType::Bool ? t : torch::stable::to(t, type);
}
inline Maybe cast(const Maybe& t, ScalarType type) { return t ? Maybe(cast(*t, type)) : t; }
inline Tensors cast(const Tensors& ts, ScalarType type) {
  Tensors out;
  for (const auto& t : ts) out.push_back(cast(t, type));
  return out;
}

// Calls run(zero of the type, cast) for a dtype; `what` has it.
template <class F>
Tensors by_type(const char* what, ScalarType type, const F& run) {
  const auto as_is = [](const auto& t) { return t; };
  switch (type) {
    case ScalarType::Float:
      return run(float{}, as_is);
    case ScalarType::Double:
      return run(double{}, as_is);
    case ScalarType::BFloat16:
      return run(bf16{}, as_is);
    case ScalarType::Half:
      return run(float{}, [](const auto& t) { return cast(t, ScalarType::Float); });
    default:
      STD_TORCH_CHECK(false, what, "'s dtype is not supported");
  }
}

}  // namespace mmfast
