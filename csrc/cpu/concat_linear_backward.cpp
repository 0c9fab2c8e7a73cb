// The gradients of concat_linear on the CPU; g stands for the gradient of the linear part's output.
#include <map>

#include "concat_linear.h"

namespace mmfast {
namespace {

// Sums over output rows that read the same own row: sums[q] = sum of scale(r) * g_r over r with row_of(r) =
// q, where row_of(r) = -1 leaves r out. Parts of fixed length, added in order: the same bits for any number
// of threads.
template <class T, class A, class RowOf, class Scale>
std::vector<A> row_sums(const RowKernels<T>& kernels, const Matrix<const T>& g, int64_t count, RowOf row_of,
                        Scale scale) {
  constexpr int64_t PART = 16;
  std::vector<int64_t> start(count + 1, 0), order, own(g.rows);
  for (int64_t r = 0; r < g.rows; ++r)
    if ((own[r] = row_of(r)) >= 0) ++start[own[r] + 1];
  for (int64_t q = 0; q < count; ++q) start[q + 1] += start[q];
  order.resize(start[count]);
  std::vector<int64_t> next(start.begin(), start.end() - 1);
  for (int64_t r = 0; r < g.rows; ++r)
    if (own[r] >= 0) order[next[own[r]]++] = r;

  struct Part {
    int64_t own, begin, end;
  };
  std::vector<Part> parts;
  for (int64_t q = 0; q < count; ++q)
    for (int64_t k = start[q]; k < start[q + 1]; k += PART)
      parts.push_back({q, k, std::min(k + PART, start[q + 1])});
  std::vector<A> partial(parts.size() * g.columns, 0);
  parallel_rows(parts.size(), PART * g.columns, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t i = parts[k].begin; i < parts[k].end; ++i)
        kernels.accumulate(partial.data() + k * g.columns, scale(order[i]), g.row(order[i]), g.columns);
  });
  std::vector<Wider<A>> sums(count * g.columns, 0);
  for (size_t k = 0; k < parts.size(); ++k)
    for (int64_t o = 0; o < g.columns; ++o) sums[parts[k].own * g.columns + o] += partial[k * g.columns + o];
  return {sums.begin(), sums.end()};
}

template <class T>
struct Backward {
  using A = typename wide<T>::type;
  using Sum = typename exact_sum<T>::type;
  const Problem<T>& p;
  Matrix<const T> g;  // of the linear part's output [rows, width]
  const A *mean, *rstd;
  const std::vector<bool>& needs;                    // [*inputs, weight, bias, norm_weight, norm_bias, gate]
  const std::vector<T*>& grads;                      // where each that is needed is written
  std::map<Shape, std::vector<A>> shared_sums = {};  // of g, by a source's own leading dimensions

  // sum of g over the output rows that read each own row of a source [own rows, width]
  const std::vector<A>& sums(const Source<T>& s) {
    const auto [at, fresh] = shared_sums.try_emplace(s.sizes);
    if (fresh)
      at->second = row_sums<T, A>(
          p.kernels, g, s.rows, [&](int64_t r) { return s.row(r); }, [](int64_t) { return A(1); });
    return at->second;
  }

  std::vector<A> pooled_sums(const Source<T>& s) {
    if (!p.norm && !s.shared()) return sums(s);  // rows of absent samples are there, and never read
    return row_sums<T, A>(
        p.kernels, g, s.rows, [&](int64_t r) { return p.visible(s, r) ? s.row(r) : -1; },
        [&](int64_t r) { return p.norm ? rstd[r] : A(1); });
  }

  std::vector<A> total() const {  // [width]: the bias's gradient
    if (shared_sums.empty())
      return row_sums<T, A>(p.kernels, g, 1, [](int64_t) { return 0; }, [](int64_t) { return A(1); });
    const auto& [sizes, sums] = *shared_sums.begin();
    return sum_of_rows(sums, mmfast::product(sizes), p.width);
  }

  // dx = rows @ W_i, 0 where the source is absent
  void input_product(const Source<T>& s, const Rows<T>& x, Rows<T> rows, T* dx) const {
    for (int64_t r = 0; r < s.rows; ++r)
      if (!x[r]) rows[r] = nullptr;
    std::vector<Term<T>> terms;
    terms.push_back({std::move(rows), {}, nullptr});
    terms[0].right.push_back(Right<T>::of_rows(row_pointers(p.columns(s)), s.depth));
    sum_of_products(
        s.rows, s.depth, 1, terms,
        [&](int64_t r, int64_t first, int64_t count, int64_t, A*) -> const A* {
          fetch_to_write(dx + r * s.depth + first, count);
          return nullptr;
        },
        [&](int64_t r, int64_t first, int64_t count, const A* c, const A*) {
          p.kernels.narrow(dx + r * s.depth + first, c, count);
        },
        Into<T>{dx, nullptr, Activation::none});
  }

  // dW_i = rows.T @ x, with x centred under a norm
  void weight_product(size_t i, const Rows<T>& x, const Rows<T>& rows, T* dweight) const {
    const auto& s = p.sources[i];
    const Centring<T> centring{s.full || !p.norm ? mean : p.means[i].data(), s.full ? rstd : nullptr,
                               nullptr};
    product_over_rows({dweight + s.column, p.depth, s.depth, 0}, rows, p.width, x, s.depth,
                      p.norm ? &centring : nullptr);
  }

  void run() {
    const size_t n = p.sources.size();
    const bool any_input = std::find(needs.begin(), needs.begin() + n, true) != needs.begin() + n;
    const bool any_weight = needs[n] || (p.norm && (needs[n + 2] || needs[n + 3]));
    std::optional<Buffer<T>> unwanted;  // the weight's gradient, where only the norm's parameters need it
    T* const dweight = needs[n] || !any_weight ? grads[n] : unwanted.emplace(p.width, p.depth).data();

    std::vector<std::optional<Buffer<T>>> pooled(n);  // sums of g [own rows, width]
    std::vector<Rows<T>> x(n), rows(n);               // of each source, and of g at its own size
    for (size_t i = 0; i < n; ++i) {
      const auto& s = p.sources[i];
      if (!(needs[i] || any_weight || (p.norm && any_input))) continue;
      x[i] = row_pointers(s);
      if (!s.full) {
        const std::vector<A> sums = pooled_sums(s);
        p.kernels.narrow(pooled[i].emplace(s.rows, p.width).data(), sums.data(), s.rows * p.width);
      }
      rows[i] = row_pointers(s.full ? g : Matrix<const T>{pooled[i]->data(), s.rows, p.width, p.width});
      if (any_weight) weight_product(i, x[i], rows[i], dweight);
      if (needs[i] && !p.norm) input_product(s, x[i], rows[i], grads[i]);
    }
    std::vector<A> dbias;
    if (needs[n + 1] || (p.norm && any_weight)) dbias = total();
    if (needs[n + 1]) p.kernels.narrow(grads[n + 1], dbias.data(), p.width);
    if (p.norm && any_weight) finish_weight(dweight, dbias);
    if (p.norm && any_input) norm_inputs(x, rows);
  }

  // dW = (Z + K) norm_weight + dbias norm_bias, Z = g.T @ x^ so far, K the part that the centring left out.
  void finish_weight(T* dweight, const std::vector<A>& dbias) {
    const size_t n = p.sources.size();
    std::vector<A> dnorm_weight(p.depth, 0), dnorm_bias(p.depth, 0);
    for (size_t i = 0; i < n; ++i) {
      const auto& s = p.sources[i];
      std::vector<A> k(p.width, 0);
      if (!(s.full && s.always()))
        k = row_sums<T, A>(
            p.kernels, g, 1, [&](int64_t r) { return s.full && p.visible(s, r) ? -1 : 0; },
            [&](int64_t r) { return rstd[r] * (p.mean(i, r) - mean[r]); });
      for (int64_t o = 0; o < p.width; ++o) {
        const T* w = p.weight.row(o) + s.column;
        p.kernels.norm_weights(dweight + o * p.depth + s.column, dnorm_weight.data() + s.column, w, k[o],
                               dbias[o], p.norm_weight_of(s), p.norm_bias ? p.norm_bias + s.column : nullptr,
                               s.depth);
        p.kernels.accumulate(dnorm_bias.data() + s.column, dbias[o], w, s.depth);
      }
    }
    if (needs[n + 2]) p.kernels.narrow(grads[n + 2], dnorm_weight.data(), p.depth);
    if (needs[n + 3]) p.kernels.narrow(grads[n + 3], dnorm_bias.data(), p.depth);
  }

  // With dy = g @ W and d = dy norm_weight: dx = rstd (d - avg(d) - x^ avg(d x^)), averages over the
  // concatenation.
  void norm_inputs(const std::vector<Rows<T>>& x, const std::vector<Rows<T>>& rows) {
    const size_t n = p.sources.size();
    std::vector<Sum> avg(2 * p.rows, 0);  // avg(d), avg(d x^) of each row
    std::vector<std::optional<Buffer<T>>> unwanted(n);
    std::vector<T*> dx(n);
    for (size_t i = 0; i < n; ++i) {
      const auto& s = p.sources[i];
      if (s.full || needs[i]) {
        dx[i] = needs[i] ? grads[i] : unwanted[i].emplace(s.rows, s.depth).data();
        input_product(s, x[i], rows[i], dx[i]);
      }
      const std::optional<Buffer<A>> projected = s.full ? std::nullopt : std::optional(p.pooled_product({i}));
      parallel_rows(p.rows, p.depth, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          Sum* const sums = &avg[2 * r];
          const bool visible = p.visible(s, r);
          if (visible && s.full) {
            p.kernels.norm_sums(sums, dx[i] + r * s.depth, x[i][r], mean[r], rstd[r], p.norm_weight_of(s),
                                s.depth);
            continue;
          }
          const A along = p.kernels.dot(g.row(r), p.u[i].data(), p.width);
          sums[0] += along;
          sums[1] += rstd[r] * (p.mean(i, r) - mean[r]) * along;
          if (visible) sums[1] += rstd[r] * p.kernels.dot(g.row(r), projected->row(s.row(r)), p.width);
        }
      });
      unwanted[i].reset();
    }
    for (Sum& value : avg) value /= std::max<int64_t>(p.depth, 1);
    for (size_t i = 0; i < n; ++i) {
      const auto& s = p.sources[i];
      if (!needs[i]) continue;
      // A pooled row is read by many output rows: the same formula holds with rstd 1 and these sums, which
      // cancel against each other.
      std::vector<Wider<A>> a(s.full ? 0 : s.rows, 0), b(a);
      for (int64_t r = 0; !s.full && r < p.rows; ++r)
        if (p.visible(s, r)) {
          const Wider<A> slope = Wider<A>(rstd[r]) * rstd[r] * avg[2 * r + 1];
          a[s.row(r)] += Wider<A>(rstd[r]) * avg[2 * r] + slope * (Wider<A>(p.mean(i, r)) - mean[r]);
          b[s.row(r)] += slope;
        }
      parallel_rows(s.rows, s.depth, [&](int64_t begin, int64_t end) {
        for (int64_t q = begin; q < end; ++q)
          if (x[i][q])
            p.kernels.norm_backward(dx[i] + q * s.depth, x[i][q], s.full ? mean[q] : p.means[i][q],
                                    s.full ? rstd[q] : 1, p.norm_weight_of(s), s.full ? avg[2 * q] : a[q],
                                    s.full ? avg[2 * q + 1] : b[q], s.depth);
      });
    }
  }
};

template <class T>
Tensors backward(const Tensor& grad_, const Tensors& inputs, const Tensor& weight, const Maybe& present,
                 std::optional<double> norm_eps, const Maybe& norm_weight, const Maybe& norm_bias,
                 Activation activation, const Maybe& gate_, const Maybe& preact, const Maybe& mean,
                 const Maybe& rstd, const std::vector<bool>& needs) {
  using A = typename wide<T>::type;
  const Problem<T> p(inputs, weight, present, norm_eps.has_value(), norm_weight, norm_bias);
  const size_t n = inputs.size();
  const int64_t width = p.width, out_width = activation == Activation::swiglu ? width / 2 : width;
  Tensors made;
  std::vector<T*> grads(needs.size());
  std::vector<std::optional<Buffer<T>>> of_expanded(n);  // gradients that are summed into these in the end
  std::vector<T*> own(n);
  for (size_t i = 0; i < needs.size(); ++i) {
    if (!needs[i]) continue;
    Shape shape{p.depth};  // norm_weight, norm_bias
    const auto like = [&](const Tensor& t) { shape.assign(t.sizes().begin(), t.sizes().end()); };
    if (i < n) like(inputs[i]);
    if (i == n) like(weight);
    if (i == n + 1) shape = {width};
    if (i == n + 4) like(*gate_);
    grads[i] = data<T>(made.emplace_back(empty(shape, scalar_type<T>)));
    if (i < n && mmfast::product(shape) != p.sources[i].rows * p.sources[i].depth) {
      own[i] = grads[i];
      grads[i] = of_expanded[i].emplace(p.rows, p.sources[i].depth).data();
    }
  }

  const Tensor grad = as_contiguous(grad_);
  std::optional<Buffer<T>> dz;
  const T* g = data<T>(grad);
  if (preact) {
    constexpr int64_t PART = 64;
    const std::vector<A> gate = tanh_of<T>(gate_, out_width);
    const int64_t parts = needs[n + 4] ? (p.rows + PART - 1) / PART : 0;
    std::vector<A> partial(parts * out_width, 0);
    g = dz.emplace(p.rows, width).data();
    parallel_rows((p.rows + PART - 1) / PART, PART * width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin * PART; r < std::min(end * PART, p.rows); ++r)
        p.kernels.epilogue_backward(dz->row(r), parts ? partial.data() + r / PART * out_width : nullptr,
                                    data<T>(grad) + r * out_width, data<T>(*preact) + r * width,
                                    gate.empty() ? nullptr : gate.data(), activation, out_width);
    });
    if (needs[n + 4]) {
      std::vector<A> dgate = sum_of_rows(partial, parts, out_width);
      for (int64_t o = 0; o < out_width; ++o) dgate[o] *= 1 - gate[o] * gate[o];
      if (gate_->numel() == 1)
        for (int64_t o = 1; o < out_width; ++o) dgate[0] += dgate[o];
      p.kernels.narrow(grads[n + 4], dgate.data(), gate_->numel());
    }
  }
  Backward<T>{p, {g, p.rows, width, width}, data<A>(mean), data<A>(rstd), needs, grads}.run();
  for (size_t i = 0; i < n; ++i) {
    if (!of_expanded[i]) continue;
    const int64_t depth = p.sources[i].depth;
    const auto s = source<T>(inputs[i], 0, p.lead);
    const auto sums = row_sums<T, A>(
        p.kernels, {of_expanded[i]->data(), p.rows, depth, depth}, s.rows,
        [&](int64_t r) { return s.row(r); }, [](int64_t) { return A(1); });
    p.kernels.narrow(own[i], sums.data(), s.rows * depth);
  }
  return made;
}

Tensors concat_linear_backward(Tensor grad, Tensors inputs, Tensor weight, Maybe present,
                               std::optional<double> norm_eps, Maybe norm_weight, Maybe norm_bias,
                               std::string activation, Maybe gate, Maybe preact, Maybe mean, Maybe rstd,
                               std::vector<bool> needs) {
  return by_type("concat_linear: weight", weight.scalar_type(), ALL, [&](auto zero, auto to) {
    return backward<decltype(zero)>(to(grad), to(inputs), to(weight), present, norm_eps, to(norm_weight),
                                    to(norm_bias), activation_of(activation), to(gate), to(preact), mean,
                                    rstd, needs);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) { bind<&concat_linear_backward>(m, "concat_linear_backward.cpu"); }

}  // namespace mmfast
