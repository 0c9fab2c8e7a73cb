// Launches of cross_attention's forward; cross_attention_kernel.h says what a block does.
#include <cuda_runtime.h>

#include "cross_attention_kernel.h"

namespace mmfast {

namespace {

// As many blocks as shared memory has room for on sm_80.
template <class T, int DEPTH>
__global__ void __launch_bounds__(kThreads, DEPTH == 256 ? 1 : 2)
    attend_kernel(const __grid_constant__ Attention a) {
  extern __shared__ __align__(128) char shared[];
  attend(a, blockIdx.x, static_cast<int>(blockIdx.y), *reinterpret_cast<Shared<T, DEPTH>*>(shared));
}

template <class T>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Attention a) {
  __shared__ float weights[kWarps][kSlots];
  const int64_t warp = threadIdx.x / 32, row = int64_t(blockIdx.x) * kWarps + warp;
  if (row < a.batch * a.kv_heads * rows_of(a)) merge<T>(a, row, weights[warp]);
}

}  // namespace

const char* launch(const Attention& a, Type type, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int64_t both = a.batch * a.kv_heads, rows = both * rows_of(a);
  cudaError_t error = cudaSuccess;
  with_kernel(a, type, [&](auto kernel) {
    using T = typename decltype(kernel)::Element;
    using Memory = typename decltype(kernel)::Memory;
    static_assert(sizeof(Memory) <= 163 * 1024, "what a block may ask for on sm_80");
    const auto attend = attend_kernel<T, Memory::kDepth>;
    error = cudaFuncSetAttribute(attend, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Memory));
    if (error != cudaSuccess) {
      cudaGetLastError();  // so that it is told here, and not by whoever asks next
      return;
    }
    const dim3 blocks(static_cast<unsigned>(both * blocks_of(a)), static_cast<unsigned>(a.splits));
    attend<<<blocks, kThreads, sizeof(Memory), s>>>(a);
    merge_kernel<T><<<static_cast<unsigned>((rows + kWarps - 1) / kWarps), kThreads, 0, s>>>(a);
    error = cudaGetLastError();
  });
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mmfast
