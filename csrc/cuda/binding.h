// What the bindings of the CUDA kernels share.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "../cpu/box.h"
#include "types.h"

namespace mmfast {

inline Type type_of(const torch::stable::Tensor& tensor, const char* op) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::Half:
      return Type::float16;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    default:
      STD_TORCH_CHECK(false, op, ": backend cuda is for float32, float16 and bfloat16");
  }
}

inline void* data_of(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor ? tensor->mutable_data_ptr() : nullptr;
}

// Launches on the device of a tensor and the current stream there.
template <class Arguments>
void run(const Arguments& arguments, const torch::stable::Tensor& tensor, const char* op) {
  torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  const char* error = launch(arguments, type_of(tensor, op), stream);
  STD_TORCH_CHECK(error == nullptr, op, ": CUDA refused the launch: ", error);
}

}  // namespace mmfast
