// concat_linear on the CPU: residual + tanh(gate) * activation(norm(cat(inputs)) @ weight.T + bias).
#include "concat_linear.h"

namespace mmfast {
namespace {

template <class T>
Tensors forward(const Tensors& inputs, const Tensor& weight, const Maybe& bias_, const Maybe& present,
                std::optional<double> norm_eps, const Maybe& norm_weight, const Maybe& norm_bias,
                Activation activation, const Maybe& residual_, const Maybe& gate_, bool save) {
  using A = typename wide<T>::type;
  const Problem<T> p(inputs, weight, present, norm_eps.has_value(), norm_weight, norm_bias);
  const Maybe bias = dense(bias_), residual = dense(residual_);
  const int64_t n = activation == Activation::swiglu ? p.width / 2 : p.width;
  const std::vector<A> gate = tanh_of<A, T>(gate_, n);
  const bool bent = activation != Activation::none || gate_;

  Shape lead;  // as PyTorch has it: possibly none
  for (const auto& t : inputs)
    if (static_cast<int64_t>(lead.size()) < t.dim() - 1) lead = p.lead;
  const auto shape = [&](int64_t last) {
    Shape out = lead;
    out.push_back(last);
    return out;
  };
  const ScalarType type = scalar_type<T>, wide_type = scalar_type<A>;
  Tensor out = empty(shape(n), type);
  Tensor mean = empty(p.norm ? lead : Shape{0}, wide_type), rstd = empty(p.norm ? lead : Shape{0}, wide_type);
  Tensor preact = empty(bent && save ? shape(p.width) : Shape{0}, type);
  Tensor linear = preact;  // where the products go
  if (!(bent && save)) linear = p.width == n ? out : empty(shape(p.width), type);
  const Matrix<T> z{data<T>(linear), p.rows, p.width, p.width};

  // [width], what every row starts from: bias + W @ norm_bias
  std::vector<A> base(p.width, 0);
  if (bias) p.kernels.accumulate(base.data(), 1, data<T>(*bias), p.width);
  if (p.norm) {
    p.statistics(*norm_eps, data<A>(mean), data<A>(rstd));
    if (p.norm_bias)
      for (const auto& s : p.sources) {
        const std::vector<A> c = p.project(s, p.norm_bias);
        for (int64_t o = 0; o < p.width; ++o) base[o] += c[o];
      }
  }
  std::vector<std::optional<Buffer<A>>> pooled(p.sources.size());
  for (size_t i = 0; i < p.sources.size(); ++i)
    if (!p.sources[i].full) pooled[i] = p.pooled_product(i);
  const A* const m = data<A>(mean);
  const A* const v = data<A>(rstd);

  std::optional<Source<T>> skip;
  if (residual) skip = source<T>(*residual, 0, p.lead);
  const auto skip_rows = skip ? row_pointers(*skip) : std::vector<const T*>();
  parallel_rows(p.rows, p.width, [&](int64_t begin, int64_t end) {
    std::vector<const A*> terms(2 * p.sources.size() + 1);
    std::vector<A> scales(terms.size());
    for (int64_t r = begin; r < end; ++r) {
      int64_t count = 0;
      const auto term = [&](const A* row, A scale) { terms[count] = row, scales[count++] = scale; };
      term(base.data(), 1);
      for (size_t i = 0; i < p.sources.size(); ++i) {
        const auto& s = p.sources[i];
        const bool visible = p.visible(s, r);
        if (visible && !s.full) term(pooled[i]->row(s.row(r)), p.norm ? v[r] : 1);
        if (p.norm && !(visible && s.full)) term(p.u[i].data(), v[r] * (p.mean(i, r) - m[r]));
      }
      const T* extra = residual && !bent ? skip_rows[skip->row(r)] : nullptr;
      p.kernels.combine(z.row(r), extra, count, terms.data(), scales.data(), p.width);
    }
  });
  for (const auto& s : p.sources) {
    if (!s.full) continue;
    const Centring<T> centring{p.kernels, m, v, p.norm_weight_of(s)};
    each_block(s, p.norm ? &centring : nullptr, false,
               [&](const Block<T>& block) { p.scatter(z, block, p.columns(s).transposed(), true); });
  }
  if (bent)
    parallel_rows(p.rows, p.width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        p.kernels.epilogue(data<T>(out) + r * n, z.row(r), gate.empty() ? nullptr : gate.data(),
                           residual ? skip_rows[skip->row(r)] : nullptr, activation, n);
    });
  return {out, preact, mean, rstd};
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Outputs concat_linear(Tensors inputs, Tensor weight, Maybe bias, Maybe present,
                      std::optional<double> norm_eps, Maybe norm_weight, Maybe norm_bias,
                      std::string activation, Maybe residual, Maybe gate, bool save) {
  const auto run = [&](auto zero, auto to) {
    return forward<decltype(zero)>(to(inputs), to(weight), to(bias), present, norm_eps, to(norm_weight),
                                   to(norm_bias), activation_of(activation), to(residual), to(gate), save);
  };
  const auto as_is = [](const auto& t) { return t; };
  Tensors r;
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      r = run(float{}, as_is);
      break;
    case ScalarType::Double:
      r = run(double{}, as_is);
      break;
    case ScalarType::BFloat16:
      r = run(bf16{}, as_is);
      break;
    case ScalarType::Half:
      r = run(float{}, [](const auto& t) { return cast(t, ScalarType::Float); });
      r[0] = cast(r[0], ScalarType::Half), r[1] = cast(r[1], ScalarType::Half);
      break;
    default:
      STD_TORCH_CHECK(false, "concat_linear: weight's dtype is not supported");
  }
  return {r[0], r[1], r[2], r[3]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { bind<&concat_linear>(m, "concat_linear.cpu"); }

}  // namespace mmfast
