// What the CUDA kernels, their launches and their bindings call things. Kernels are written so that a host
// compiler takes them too.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MM_DEVICE __device__ __forceinline__
#define MM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MM_DEVICE inline
#define MM_HOST_DEVICE inline
#endif

namespace mmfast {

enum class Type : int32_t { float32, float16, bfloat16 };

}  // namespace mmfast
