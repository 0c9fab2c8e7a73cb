// What the ops have in common: optional tensors, their memory and dtypes, and the kernels on one row.
#pragma once

#include <optional>
#include <vector>

#include "matrix.h"
#include "simd/dispatch.h"

namespace mmfast {

using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

// For sums that are made once and used by every row: their error is the same in all of them and adds up.
template <class A>
using Wider = std::conditional_t<std::is_same_v<A, float>, double, long double>;

// [columns]. One chain of float32 over many rows would lose as many eps as there are rows.
template <class A>
std::vector<A> sum_of_rows(const std::vector<A>& x, int64_t rows, int64_t columns) {
  std::vector<Wider<A>> sum(columns, 0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = 0; o < columns; ++o) sum[o] += x[r * columns + o];
  return {sum.begin(), sum.end()};
}

template <class T>
constexpr RowType row_type = std::is_same_v<T, double>  ? RowType::f64
                             : std::is_same_v<T, float> ? RowType::f32
                                                        : RowType::bf16;

MM_KERNELS(row_kernels, RowKernels)

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
const T* data(const Maybe& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

template <class T>
Matrix<const T> matrix(const Tensor& t) {
  return {data<T>(t), t.size(0), t.size(1), t.stride(0)};
}

// The elements of a tensor of at most three dimensions, or what stands for them where there is none. Where
// they lie is asked once: data_ptr() and stride() are calls into another library, which look for errors.
template <class T>
class Elements {
 public:
  Elements(const Maybe& t, T otherwise) : data_(data<T>(t)), otherwise_(otherwise) {
    for (int64_t d = 0; t && d < t->dim(); ++d) strides_[d] = t->stride(d);
  }
  T operator()(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return data_ ? data_[i * strides_[0] + j * strides_[1] + k * strides_[2]] : otherwise_;
  }

 private:
  const T* data_;
  T otherwise_;
  int64_t strides_[3] = {};
};

// `t` itself, or a copy; torch's own goes through the dispatcher to find that out.
inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// `t` with a dense last dimension: itself, or a copy.
inline Tensor dense(const Tensor& t) {
  return t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1
             ? t
             : torch::stable::contiguous(t);
}
inline Maybe dense(const Maybe& t) { return t ? Maybe(dense(*t)) : t; }

// A parameter's elements as wide as sums.
template <class T, class A = typename wide<T>::type>
std::vector<A> widened(const Tensor& t) {
  std::vector<A> out(t.numel());
  const Tensor flat = as_contiguous(t);
  row_kernels<T>().widen(out.data(), data<T>(flat), out.size());
  return out;
}

inline Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == ScalarType::Bool ? t : torch::stable::to(t, type);
}
inline Maybe cast(const Maybe& t, ScalarType type) { return t ? Maybe(cast(*t, type)) : t; }
inline Tensors cast(const Tensors& ts, ScalarType type) {
  Tensors out;
  for (const auto& t : ts) out.push_back(cast(t, type));
  return out;
}

constexpr size_t ALL = -1;

// run(zero of the type, cast) for a dtype; `what` names the tensor that has it, for the error. float16, for
// which there are no kernels, goes through float32 copies; then the first `narrow` of the results are cast
// back: those which are not as wide as sums.
template <class F>
Tensors by_type(const char* what, ScalarType type, size_t narrow, const F& run) {
  const auto as_is = [](const auto& t) { return t; };
  switch (type) {
    case ScalarType::Float:
      return run(float{}, as_is);
    case ScalarType::Double:
      return run(double{}, as_is);
    case ScalarType::BFloat16:
      return run(bf16{}, as_is);
    case ScalarType::Half: {
      Tensors made = run(float{}, [](const auto& t) { return cast(t, ScalarType::Float); });
      for (size_t i = 0; i < std::min(narrow, made.size()); ++i) made[i] = cast(made[i], type);
      return made;
    }
    default:
      STD_TORCH_CHECK(false, what, "'s dtype is not supported");
  }
}

}  // namespace mmfast
