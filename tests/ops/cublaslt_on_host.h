// cuBLASLt for a host compiler: the functions that concat_linear_product.cpp calls, as NVIDIA's documentation
// describes them, on tensors of the CPU. What the library would refuse is refused, and so is a pointer that
// is not aligned as the caller said.
#pragma once

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace on_host {

struct Layout {
  cudaDataType type;
  int32_t batch;
  uint64_t rows, columns;
  int64_t step, next;
};
struct Product {
  cublasComputeType_t compute;
  cudaDataType scale;
  cublasOperation_t of_a, of_b;
  cublasLtEpilogue_t epilogue;
  const void* bias;
  int64_t next_bias;
};
struct Preference {
  uint64_t workspace;
  uint32_t aligned[4], reduction;
};
// The last product's, for Matmul to hold the pointers against and for tests to look at.
inline Preference asked;
inline cublasComputeType_t computed;
inline int algorithms = 1 << 30;  // for so many more products
inline int launches = 1 << 30;    // that are not refused

template <class Own, class Opaque>
Own& own(Opaque* opaque) {
  static_assert(sizeof(Own) <= sizeof(Opaque));
  return *reinterpret_cast<Own*>(opaque);
}
template <class Own, class Opaque>
const Own& own(const Opaque* opaque) {
  return own<Own>(const_cast<Opaque*>(opaque));
}
template <class V>
cublasStatus_t put(V& to, const void* from, size_t size) {
  if (size != sizeof to) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&to, from, size);
  return CUBLAS_STATUS_SUCCESS;
}

inline size_t bytes(cudaDataType type) { return type == CUDA_R_32F ? 4 : 2; }
inline float get(const void* data, cudaDataType type, int64_t i) {
  return type == CUDA_R_32F   ? static_cast<const float*>(data)[i]
         : type == CUDA_R_16F ? __half2float(static_cast<const __half*>(data)[i])
                              : __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
}
inline void set(void* data, cudaDataType type, int64_t i, float value) {
  if (type == CUDA_R_32F)
    static_cast<float*>(data)[i] = value;
  else if (type == CUDA_R_16F)
    static_cast<__half*>(data)[i] = __float2half_rn(value);
  else
    static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16_rn(value);
}

}  // namespace on_host

extern "C" {

const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED ? "not supported" : "invalid value";
}

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t, cudaDataType type,
                                                 uint64_t rows, uint64_t columns, int64_t step) {
  on_host::own<on_host::Layout>(layout) = {type, 1, rows, columns, step, 0};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t name, const void* value,
                                                size_t size) {
  auto& own = on_host::own<on_host::Layout>(layout);
  if (name == CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) return on_host::put(own.batch, value, size);
  if (name == CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET) return on_host::put(own.next, value, size);
  return CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t product, size_t,
                                               cublasComputeType_t compute, cudaDataType scale) {
  on_host::own<on_host::Product>(product) = {
      compute, scale, CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr, 0};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product,
                                              cublasLtMatmulDescAttributes_t name, const void* value,
                                              size_t size) {
  auto& own = on_host::own<on_host::Product>(product);
  if (name == CUBLASLT_MATMUL_DESC_TRANSA) return on_host::put(own.of_a, value, size);
  if (name == CUBLASLT_MATMUL_DESC_EPILOGUE) return on_host::put(own.epilogue, value, size);
  if (name == CUBLASLT_MATMUL_DESC_BIAS_POINTER) return on_host::put(own.bias, value, size);
  if (name == CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE) return on_host::put(own.next_bias, value, size);
  return CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t preference, size_t) {
  on_host::own<on_host::Preference>(preference) = {
      0, {256, 256, 256, 256}, CUBLASLT_REDUCTION_SCHEME_MASK};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t name,
                                                    const void* value, size_t size) {
  auto& own = on_host::own<on_host::Preference>(preference);
  switch (name) {
    case CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK:
      return on_host::put(own.reduction, value, size);
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
      return on_host::put(own.workspace, value, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES:
      return on_host::put(own.aligned[0], value, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
      return on_host::put(own.aligned[1], value, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES:
      return on_host::put(own.aligned[2], value, size);
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
      return on_host::put(own.aligned[3], value, size);
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatmulPreference_t preference,
                                              int, cublasLtMatmulHeuristicResult_t*, int* found) {
  on_host::asked = on_host::own<on_host::Preference>(preference);
  *found = on_host::algorithms-- > 0;
  return *found ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

// d = alpha op(a) op(b) + beta c + bias, where matrices lie column by column
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t product, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t of_a, const void* b,
                              cublasLtMatrixLayout_t of_b, const void* beta, const void* c,
                              cublasLtMatrixLayout_t of_c, void* d, cublasLtMatrixLayout_t of_d,
                              const cublasLtMatmulAlgo_t*, void*, size_t workspace, cudaStream_t) {
  using namespace on_host;
  const auto& p = own<Product>(product);
  const Layout &A = own<Layout>(of_a), &B = own<Layout>(of_b), &C = own<Layout>(of_c), &D = own<Layout>(of_d);
  computed = p.compute;
  if (launches-- <= 0) return CUBLAS_STATUS_NOT_SUPPORTED;
  const void* const pointers[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i)
    if (asked.aligned[i] == 0 || reinterpret_cast<uint64_t>(pointers[i]) % asked.aligned[i])
      return CUBLAS_STATUS_NOT_SUPPORTED;
  if (asked.reduction & ~CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE) return CUBLAS_STATUS_NOT_SUPPORTED;
  // kernels are known that take 16 bytes of the bias at once, whatever its address
  if (reinterpret_cast<uint64_t>(p.bias) % 16 || p.next_bias * bytes(own<Layout>(of_d).type) % 16)
    return CUBLAS_STATUS_NOT_SUPPORTED;
  const bool has_bias = p.epilogue == CUBLASLT_EPILOGUE_BIAS;
  const bool half_tf32 = p.compute == CUBLAS_COMPUTE_32F_FAST_TF32 && A.type != CUDA_R_32F;
  if (half_tf32 || p.scale != CUDA_R_32F || has_bias != (p.bias != nullptr) || workspace > asked.workspace)
    return CUBLAS_STATUS_NOT_SUPPORTED;
  // of half precision it makes the same or float32
  if (B.type != A.type || C.type != D.type || (D.type != A.type && D.type != CUDA_R_32F))
    return CUBLAS_STATUS_NOT_SUPPORTED;
  for (const Layout* l : {&A, &B, &C, &D})
    if (l->batch != D.batch || l->step < static_cast<int64_t>(l->rows))
      return CUBLAS_STATUS_INVALID_VALUE;
  if (c == d && std::memcmp(&C, &D, sizeof C)) return CUBLAS_STATUS_INVALID_VALUE;
  const bool flipped = p.of_a == CUBLAS_OP_T;
  const uint64_t m = flipped ? A.columns : A.rows, k = flipped ? A.rows : A.columns, n = B.columns;
  if (p.of_b != CUBLAS_OP_N || B.rows != k || C.rows != m || C.columns != n || D.rows != m || D.columns != n)
    return CUBLAS_STATUS_INVALID_VALUE;
  const float scale = *static_cast<const float*>(alpha), keep = *static_cast<const float*>(beta);
  for (int64_t batch = 0; batch < D.batch; ++batch)
    for (uint64_t j = 0; j < n; ++j)
      for (uint64_t i = 0; i < m; ++i) {
        double sum = 0;
        for (uint64_t l = 0; l < k; ++l)
          sum += double(get(a, A.type, batch * A.next + (flipped ? l + i * A.step : i + l * A.step))) *
                 get(b, B.type, batch * B.next + l + j * B.step);
        float value = scale * static_cast<float>(sum);
        if (keep != 0) value += keep * get(c, C.type, batch * C.next + i + j * C.step);  // else c is not read
        if (has_bias) value += get(p.bias, D.type, batch * p.next_bias + i);
        set(d, D.type, batch * D.next + i + j * D.step, value);
      }
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
