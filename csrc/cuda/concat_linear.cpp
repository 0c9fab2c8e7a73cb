// Binds concat_linear's epilogue; its schemas are in kernels/concat_linear_cuda.py.
#include "binding.h"
#include "epilogue.h"

using torch::stable::Tensor;

namespace mmfast {

namespace {

Activation activation_of(const std::string& name) {
  constexpr const char* names[] = {"none", "relu", "gelu", "silu", "swiglu"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, "concat_linear: activation ", name, " is unknown");
}

int64_t step_of(const std::optional<Tensor>& gate) { return gate && gate->numel() > 1 ? 1 : 0; }

// walks: the three leading sizes, then three strides of every product, of every mean and of the residual if
// it is there.
void epilogue(const std::vector<Tensor>& products, const std::vector<int64_t>& sources,
              const std::vector<Tensor>& means, const std::vector<Tensor>& along,
              const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd,
              const std::vector<int64_t>& walks, const std::optional<Tensor>& present,
              const std::optional<Tensor>& bias, const std::string& activation,
              const std::optional<Tensor>& residual, const std::optional<Tensor>& gate, const Tensor& out,
              const std::optional<Tensor>& preact) {
  STD_TORCH_CHECK(products.size() <= kProducts, "concat_linear: got ", products.size(),
                  " products, wanted at most ", kProducts);
  const size_t walked = products.size() + means.size() + (residual ? 1 : 0);
  STD_TORCH_CHECK(sources.size() == products.size() && walks.size() == 3 * (walked + 1),
                  "concat_linear: sources and walks do not fit the products");
  STD_TORCH_CHECK(
      means.size() <= products.size() && along.size() == means.size() && (means.empty() || (mean && rstd)),
      "concat_linear: the norm does not fit the products");
  Forward f{};
  f.rows = walks[0] * walks[1] * walks[2];
  f.n1 = walks[1];
  f.n2 = walks[2];
  f.width = out.size(out.dim() - 1);
  f.activation = activation_of(activation);
  if (f.rows == 0 || f.width == 0) return;
  const auto rows_of = [&](const Tensor& tensor, size_t i) {
    return Rows{tensor.mutable_data_ptr(), walks[3 * i + 3], walks[3 * i + 4], walks[3 * i + 5]};
  };
  f.num_products = static_cast<int32_t>(products.size());
  for (size_t i = 0; i < products.size(); ++i) {
    f.products[i] = rows_of(products[i], i);
    f.sources[i] = sources[i];
  }
  f.num_centred = static_cast<int32_t>(means.size());
  for (size_t i = 0; i < means.size(); ++i) {
    f.means[i] = rows_of(means[i], products.size() + i);
    f.along[i] = static_cast<const float*>(along[i].mutable_data_ptr());
  }
  f.mean = static_cast<const float*>(data_of(mean));
  f.rstd = static_cast<const float*>(data_of(rstd));
  if (residual) f.residual = rows_of(*residual, walked - 1);
  f.present = static_cast<const bool*>(data_of(present));
  f.num_sources = present ? present->size(1) : 1;
  f.per_sample = present ? f.rows / present->size(0) : 1;
  f.bias = data_of(bias);
  f.gate = data_of(gate);
  f.gate_step = step_of(gate);
  f.out = out.mutable_data_ptr();
  f.preact = data_of(preact);
  run(f, out, "concat_linear");
}

void epilogue_backward(const Tensor& grad, const std::optional<Tensor>& preact,
                       const std::optional<Tensor>& gate, const std::string& activation, int64_t rows_each,
                       const std::optional<Tensor>& grad_preact, const Tensor& bias_sum,
                       const std::optional<Tensor>& gate_sum) {
  Backward b{};
  b.rows = grad.size(0);
  b.width = grad.size(1);
  b.rows_each = rows_each;
  b.activation = activation_of(activation);
  if (b.rows == 0 || b.width == 0) return;
  b.grad = grad.mutable_data_ptr();
  b.preact = data_of(preact);
  b.gate = data_of(gate);
  b.gate_step = step_of(gate);
  b.grad_preact = data_of(grad_preact);
  b.bias_sum = static_cast<float*>(bias_sum.mutable_data_ptr());
  b.gate_sum = static_cast<float*>(data_of(gate_sum));
  run(b, grad, "concat_linear");
}

}  // namespace

}  // namespace mmfast

STABLE_TORCH_LIBRARY_IMPL(mmfast, CUDA, m) {
  mmfast::bind<mmfast::epilogue>(m, "concat_linear_epilogue.cuda");
  mmfast::bind<mmfast::epilogue_backward>(m, "concat_linear_epilogue_backward.cuda");
}
