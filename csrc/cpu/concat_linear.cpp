// concat_linear on the CPU: residual + tanh(gate) * activation(norm(cat(inputs)) @ weight.T + bias).
#include "concat_linear.h"

namespace mmfast {
namespace {

template <class T>
Tensors forward(const Tensors& inputs, const Tensor& weight, const Maybe& bias, const Maybe& present,
                std::optional<double> norm_eps, const Maybe& norm_weight, const Maybe& norm_bias,
                Activation activation, const Maybe& residual_, const Maybe& gate_, bool save) {
  using A = typename wide<T>::type;
  const auto& wide_kernels = row_kernels<A>();
  Problem<T> p(inputs, weight, present, norm_eps.has_value(), norm_weight, norm_bias);
  const Maybe residual = dense(residual_);
  const int64_t n = activation == Activation::swiglu ? p.width / 2 : p.width;
  const std::vector<A> gate = tanh_of<T>(gate_, n);

  const auto shape = [&](auto... last) { return output_shape(inputs, p.lead, {last...}); };
  const ScalarType type = scalar_type<T>, wide_type = scalar_type<A>;
  Tensors made{empty(shape(n), type)};
  T* const y = data<T>(made[0]);
  T* const z = save ? data<T>(made.emplace_back(empty(shape(p.width), type))) : nullptr;
  A* const m = p.norm ? data<A>(made.emplace_back(empty(shape(), wide_type))) : nullptr;
  A* const v = p.norm ? data<A>(made.emplace_back(empty(shape(), wide_type))) : nullptr;

  // [width], what every row starts from: bias + W @ norm_bias
  std::vector<A> base = bias ? widened<T>(*bias) : std::vector<A>(p.width, 0);
  if (p.norm) {
    p.statistics(*norm_eps, m, v);
    std::vector<Wider<A>> sum(base.begin(), base.end());
    if (p.norm_bias)
      for (const auto& s : p.sources) {
        const auto c = p.project(s, p.norm_bias);
        for (int64_t o = 0; o < p.width; ++o) sum[o] += c[o];
      }
    base.assign(sum.begin(), sum.end());
  }
  // pooled sources that broadcast alike, and what they add to a row [own rows, width]
  std::vector<std::vector<size_t>> alike;
  for (size_t i = 0; i < p.sources.size(); ++i) {
    const auto& s = p.sources[i];
    if (s.full) continue;
    const auto same = std::find_if(alike.begin(), alike.end(), [&](const auto& others) {
      const auto& other = p.sources[others[0]];
      return other.sizes == s.sizes && !other.shared() && !s.shared();
    });
    (same == alike.end() ? alike.emplace_back() : *same).push_back(i);
  }
  struct Pooled {
    const Source<T>* source;
    Buffer<A> sum;
  };
  std::vector<Pooled> pooled;
  for (const auto& which : alike) pooled.push_back({&p.sources[which[0]], p.pooled_product(which)});

  std::optional<Source<T>> skip;
  if (residual) skip = source<T>(*residual, 0, p.lead);
  const Rows<T> skip_rows = skip ? row_pointers(*skip) : Rows<T>();

  const int64_t halves = activation == Activation::swiglu ? 2 : 1;  // made at once
  std::vector<Term<T>> terms;
  std::vector<Centring<T>> centrings(p.sources.size());
  for (size_t i = 0; i < p.sources.size(); ++i) {
    const auto& s = p.sources[i];
    if (!s.full) continue;
    centrings[i] = {m, v, p.norm_weight_of(s)};
    terms.push_back({row_pointers(s), p.transposed_columns(s, halves), p.norm ? &centrings[i] : nullptr});
  }
  // Where one table says what a row starts from, it is read in place.
  const bool table = !p.norm && (pooled.empty() || (pooled.size() == 1 && !pooled[0].source->shared()));
  if (table && !pooled.empty())
    for (int64_t q = 0; q < pooled[0].source->rows; ++q)
      wide_kernels.accumulate(pooled[0].sum.row(q), 1, base.data(), p.width);
  const int64_t tile_width = tile_kernels<T>().columns;
  const auto begin = [&](int64_t r, int64_t first, int64_t count, int64_t half, A* c) -> const A* {
    fetch_to_write(y + r * n + first, count);
    first += half * n;
    if (table) {
      const A* row = pooled.empty() ? base.data() : pooled[0].sum.row(pooled[0].source->row(r));
      return count == tile_width ? row + first : std::copy_n(row + first, count, c) - count;
    }
    std::copy_n(base.data() + first, count, c);
    for (const auto& [s, sum] : pooled)
      if (!s->shared() || p.visible(*s, r))
        wide_kernels.accumulate(c, p.norm ? v[r] : 1, sum.row(s->row(r)) + first, count);
    if (p.norm)
      for (size_t i = 0; i < p.sources.size(); ++i)
        if (const auto& s = p.sources[i]; !(s.full && p.visible(s, r)))
          wide_kernels.accumulate(c, v[r] * (p.mean(i, r) - m[r]), p.u[i].data() + first, count);
    return c;
  };
  const auto end = [&](int64_t r, int64_t first, int64_t count, const A* c, const A* other) {
    if (save) {
      p.kernels.narrow(z + r * p.width + first, c, count);
      if (other) p.kernels.narrow(z + r * p.width + n + first, other, count);
    }
    p.kernels.epilogue(y + r * n + first, c, other, gate.empty() ? nullptr : gate.data() + first,
                       skip ? skip_rows[skip->row(r)] + first : nullptr, activation, count);
  };
  // gate, residual and a second sum would not fit into the registers beside a tile's sums
  const bool plain = !skip && gate.empty() && activation != Activation::swiglu;
  sum_of_products(p.rows, n, halves, terms, begin, end, Into<T>{plain ? y : nullptr, z, activation});
  return made;
}

Tensors concat_linear(Tensors inputs, Tensor weight, Maybe bias, Maybe present,
                      std::optional<double> norm_eps, Maybe norm_weight, Maybe norm_bias,
                      std::string activation, Maybe residual, Maybe gate, bool save) {
  return by_type("concat_linear: weight", weight.scalar_type(), 1 + save, [&](auto zero, auto to) {
    return forward<decltype(zero)>(to(inputs), to(weight), to(bias), present, norm_eps, to(norm_weight),
                                   to(norm_bias), activation_of(activation), to(residual), to(gate), save);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { bind<&concat_linear>(m, "concat_linear.cpu"); }

}  // namespace mmfast
