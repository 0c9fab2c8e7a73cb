// Matrices on memory that somebody else owns, and their products by PyTorch's own GEMM.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "simd/rows.h"

namespace mmfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

template <class T>
constexpr ScalarType scalar_type = std::is_same_v<T, double>  ? ScalarType::Double
                                   : std::is_same_v<T, float> ? ScalarType::Float
                                                              : ScalarType::BFloat16;

inline int64_t product(const Shape& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

inline Tensor empty(const Shape& shape, const Shape& strides, ScalarType type) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(const Shape& shape, ScalarType type) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  return empty(shape, strides, type);
}

template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns;
  int64_t row_stride, column_stride = 1;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  Matrix rows_from(int64_t first, int64_t count) const {
    return {data + first * row_stride, count, columns, row_stride, column_stride};
  }
  Matrix columns_from(int64_t first, int64_t count) const {
    return {data + first * column_stride, rows, count, row_stride, column_stride};
  }
  T* row(int64_t r) const { return data + r * row_stride; }

  Tensor tensor() const {
    const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
        const_cast<void*>(static_cast<const void*>(data)), 2, sizes, strides, 0,
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type<std::remove_const_t<T>>)),
        aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
  }
};

// f(begin, end) over rows of `width` elements, in parts that are worth a thread
template <class F>
void parallel_rows(int64_t rows, int64_t width, const F& f) {
  if (rows > 0)
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)), f);
}

// out = a b, or out += a b. The shims see neither autocast nor autograd, and `out` may be a slice.
template <class T, class U>
void gemm(const Matrix<T>& out, const Matrix<U>& a, const Matrix<U>& b, bool accumulate) {
  if (out.rows == 0 || out.columns == 0) return;
  if (a.columns == 0) {
    if (!accumulate)
      for (int64_t r = 0; r < out.rows; ++r) std::fill_n(out.row(r), out.columns, T{});
    return;
  }
  const Tensor to = out.tensor(), left = a.tensor(), right = b.tensor();
  STABLE_TORCH_ERROR_CODE_CHECK(
      accumulate ? aoti_torch_cpu_addmm_out(to.get(), to.get(), left.get(), right.get(), 1, 1)
                 : aoti_torch_cpu_mm_out(to.get(), left.get(), right.get()));
}

// Memory for one call, uninitialised.
template <class T>
class Buffer {
 public:
  Buffer(int64_t rows, int64_t columns)
      : tensor_(empty({rows, columns}, scalar_type<T>)), rows_(rows), columns_(columns) {}
  T* data() const { return static_cast<T*>(tensor_.data_ptr()); }
  Matrix<T> matrix() const { return {data(), rows_, columns_, columns_}; }
  T* row(int64_t r) const { return data() + r * columns_; }

 private:
  Tensor tensor_;
  int64_t rows_, columns_;
};

}  // namespace mmfast
