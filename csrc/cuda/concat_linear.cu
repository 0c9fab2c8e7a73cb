// Launches of concat_linear's epilogue; epilogue.h says what a thread does.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "epilogue.h"

namespace mmfast {

namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads, 8) forward_kernel(const __grid_constant__ Forward f) {
  const int64_t column = blockIdx.y * int64_t(kThreads) + threadIdx.x;
  if (column >= f.width) return;
  for (int64_t row = blockIdx.x; row < f.rows; row += gridDim.x) forward_element<T>(f, row, column);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 8) backward_kernel(const __grid_constant__ Backward b) {
  const int64_t column = blockIdx.y * int64_t(kThreads) + threadIdx.x;
  if (column < b.width) backward_column<T>(b, blockIdx.x, column);
}

dim3 grid(int64_t blocks, int64_t width) {
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>((width + kThreads - 1) / kThreads));
}

const char* outcome() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch(const Forward& f, Type type, void* stream) {
  const dim3 blocks = grid(std::min<int64_t>(f.rows, 1 << 20), f.width);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (type) {
    case Type::float32:
      forward_kernel<float><<<blocks, kThreads, 0, s>>>(f);
      break;
    case Type::float16:
      forward_kernel<__half><<<blocks, kThreads, 0, s>>>(f);
      break;
    case Type::bfloat16:
      forward_kernel<__nv_bfloat16><<<blocks, kThreads, 0, s>>>(f);
      break;
  }
  return outcome();
}

const char* launch(const Backward& b, Type type, void* stream) {
  const dim3 blocks = grid((b.rows + b.rows_each - 1) / b.rows_each, b.width);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (type) {
    case Type::float32:
      backward_kernel<float><<<blocks, kThreads, 0, s>>>(b);
      break;
    case Type::float16:
      backward_kernel<__half><<<blocks, kThreads, 0, s>>>(b);
      break;
    case Type::bfloat16:
      backward_kernel<__nv_bfloat16><<<blocks, kThreads, 0, s>>>(b);
      break;
  }
  return outcome();
}

}  // namespace mmfast
