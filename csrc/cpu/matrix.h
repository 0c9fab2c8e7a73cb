// Matrices on memory that somebody else owns, memory for one call, and work for several threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <vector>

#include "simd/rows.h"

namespace mmfast {

using torch::headeronly::DeviceType;
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

// A block above glibc's largest threshold comes anew from the system each time, page by page as it is first
// written, which takes longer than to write it: so let the pages be of 2 MiB.
inline void in_huge_pages(void* block, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t THRESHOLD = 32 << 20, PAGE = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(block), first = (begin + PAGE - 1) / PAGE * PAGE;
  if (bytes > THRESHOLD)
    madvise(reinterpret_cast<void*>(first), (begin + bytes) / PAGE * PAGE - first, MADV_HUGEPAGE);
#endif
}

inline Tensor empty(const Shape& shape, const Shape& strides, ScalarType type) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor made(handle);
  in_huge_pages(made.data_ptr(), product(shape) * made.element_size());
  return made;
}

inline Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  return strides;
}

inline Tensor empty(const Shape& shape, ScalarType type) {
  return empty(shape, contiguous_strides(shape), type);
}

// Zeros that take neither time nor memory until they are written, since a mapping begins as zeros. None where
// the system is another, or the tensor is small.
template <class T>
std::optional<Tensor> untouched_zeros(const Shape& shape) {
#ifdef __linux__
  constexpr size_t LEAST = 1 << 20;
  const size_t bytes = product(shape) * sizeof(T);
  if (bytes < LEAST) return {};
  const auto unmap = [bytes](void* block) { munmap(block, bytes); };
  void* const block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) throw std::bad_alloc();
  std::unique_ptr<void, decltype(unmap)> held(block, unmap);
  const Tensor made = torch::stable::from_blob(block, shape, contiguous_strides(shape), {DeviceType::CPU},
                                               scalar_type<T>, unmap);
  held.release();
  return made;
#else
  return {};
#endif
}

template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride;

  Matrix columns_from(int64_t first, int64_t count) const { return {data + first, rows, count, row_stride}; }
  T* row(int64_t r) const { return data + r * row_stride; }
};

// f(begin, end) over rows of `width` elements, in parts that are worth a thread
template <class F>
void parallel_rows(int64_t rows, int64_t width, const F& f) {
  if (rows > 0)
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)), f);
}

// Memory for one call, uninitialised.
template <class T>
class Buffer {
 public:
  Buffer(int64_t rows, int64_t columns) : columns_(columns) {
    constexpr size_t LINE = 64;
    const size_t bytes = rows * columns * sizeof(T);
    if (bytes == 0) return;
    // aligned_alloc would want whole lines, and AddressSanitizer would miss what is read past the end.
    void* memory;
    if (posix_memalign(&memory, LINE, bytes)) throw std::bad_alloc();
    in_huge_pages(memory, bytes);
    memory_.reset(static_cast<T*>(memory));
  }
  T* data() const { return memory_.get(); }
  T* row(int64_t r) const { return data() + r * columns_; }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T[], Free> memory_;
  int64_t columns_;
};

}  // namespace mmfast
