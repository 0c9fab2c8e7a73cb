// concat_linear's products by cuBLASLt, which adds bias, broadcast sources and residual where it makes them.
// The schema is in kernels/concat_linear_cuda.py.
#include <cublasLt.h>

#include <algorithm>

#include "binding.h"

using torch::stable::Tensor;

namespace mmfast {

namespace {

void require(cublasStatus_t status, const char* what) {
  STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "concat_linear: cuBLASLt refused ", what, ": ",
                  cublasLtGetStatusString(status));
}

cudaDataType_t cuda_type(const Tensor& tensor) {
  switch (type_of(tensor, "concat_linear")) {
    case Type::float16:
      return CUDA_R_16F;
    case Type::bfloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_32F;
  }
}

// The bytes that a pointer is surely a multiple of, up to what cuBLASLt asks for at most.
uint32_t alignment(const void* pointer) {
  const auto place = reinterpret_cast<uint64_t>(pointer) | 256;
  return static_cast<uint32_t>(place & -place);
}

// A matrix [rows, columns] or a batch of them. cuBLASLt counts along columns, so to it each is transposed.
struct Matrix {
  cublasLtMatrixLayoutOpaque_t layout;

  Matrix(const Tensor& t, int64_t batch) {
    const int64_t rows = t.size(t.dim() - 2), columns = t.size(t.dim() - 1);
    const int64_t step = std::max(t.stride(t.dim() - 2), columns);  // of a single row it may be anything
    const int64_t next = t.dim() == 3 ? t.stride(0) : 0;
    const int32_t count = static_cast<int32_t>(batch);
    require(cublasLtMatrixLayoutInit(&layout, cuda_type(t), columns, rows, step), "a matrix");
    set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, count);
    set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, next);
  }
  template <class V>
  void set(cublasLtMatrixLayoutAttribute_t name, const V& value) {
    require(cublasLtMatrixLayoutSetAttribute(&layout, name, &value, sizeof value), "a batch of matrices");
  }
};

// Launches, where cuBLASLt has an algorithm for it,
// out [batch, rows, width] = x [batch, rows, depth] @ weight [width, depth] transposed + added [batch, rows,
// width], which may be out itself, + bias, [1 or batch, width]
bool multiply(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& added,
              const std::optional<Tensor>& bias, bool tf32, const Tensor& workspace, const Tensor& out,
              cublasLtHandle_t handle, cudaStream_t stream) {
  const int64_t batch = out.size(0);
  const Tensor& c = added ? *added : out;
  Matrix a(weight, batch), b(x, batch), from(c, batch), to(out, batch);

  cublasLtMatmulDescOpaque_t product;
  require(
      cublasLtMatmulDescInit(&product, tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F, CUDA_R_32F),
      "a product");
  const auto set = [&](cublasLtMatmulDescAttributes_t name, const auto& value) {
    require(cublasLtMatmulDescSetAttribute(&product, name, &value, sizeof value), "how to multiply");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  if (bias) {
    const void* const first = bias->data_ptr();
    const int64_t next = bias->size(0) > 1 ? bias->stride(0) : 0;
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, first);
    set(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, next);
  }

  cublasLtMatmulPreferenceOpaque_t preference;
  require(cublasLtMatmulPreferenceInit(&preference), "a preference");
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t name, const auto& value) {
    require(cublasLtMatmulPreferenceSetAttribute(&preference, name, &value, sizeof value), "a preference");
  };
  // Parts of a long K are added up in float32 too, and in an order.
  const uint32_t reduction = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction);
  const size_t bytes = workspace.numel();
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, bytes);
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(weight.data_ptr()));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(x.data_ptr()));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(c.data_ptr()));
  prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(out.data_ptr()));

  // By size and device, never by a measurement; cuBLASLt keeps what it has chosen.
  cublasLtMatmulHeuristicResult_t chosen{};
  int found = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(handle, &product, &a.layout, &b.layout, &from.layout,
                                                     &to.layout, &preference, 1, &chosen, &found);
  if (status != CUBLAS_STATUS_SUCCESS || found == 0 || chosen.state != CUBLAS_STATUS_SUCCESS) return false;
  const float one = 1, keep = added ? 1 : 0;
  // It may refuse what the heuristic proposes, too.
  return cublasLtMatmul(handle, &product, &one, weight.data_ptr(), &a.layout, x.data_ptr(), &b.layout, &keep,
                        c.data_ptr(), &from.layout, out.mutable_data_ptr(), &to.layout, &chosen.algo,
                        workspace.mutable_data_ptr(), bytes, stream) == CUBLAS_STATUS_SUCCESS;
}

// False where cuBLASLt cannot, which leaves anything in out, but what was there where there is one input:
// out [batch, rows, width] = residual, which may be out itself, + the sum of inputs [batch, rows, depth] @
// weights [width, depth] transposed + bias [1 or batch, width]
bool products(const std::vector<Tensor>& inputs, const std::vector<Tensor>& weights,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, bool tf32,
              const Tensor& workspace, const Tensor& out) {
  STD_TORCH_CHECK(inputs.size() == weights.size(), "concat_linear: got ", weights.size(), " weights for ",
                  inputs.size(), " inputs");
  torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  void *stream = nullptr, *handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(out.get_device_index(), &stream));
  // A handle of cuBLAS is one of cuBLASLt too.
  TORCH_ERROR_CODE_CHECK(torch_get_current_cuda_blas_handle(&handle));
  for (size_t i = 0; i < inputs.size(); ++i)
    if (!multiply(inputs[i], weights[i], i ? std::optional(out) : residual,
                  i + 1 < inputs.size() ? std::nullopt : bias, tf32, workspace, out,
                  static_cast<cublasLtHandle_t>(handle), static_cast<cudaStream_t>(stream)))
      return false;
  return true;
}

}  // namespace

}  // namespace mmfast

STABLE_TORCH_LIBRARY_IMPL(mmfast, CUDA, m) {
  mmfast::bind<mmfast::products>(m, "concat_linear_products.cuda");
}
