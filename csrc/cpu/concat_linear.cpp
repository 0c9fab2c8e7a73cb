// concat_linear on the CPU: residual + tanh(gate) * activation(norm(cat(inputs)) @ weight.T + bias).
//
// Nothing is concatenated. A source with a row for every output row ("full") is multiplied by its own columns
// of the weight straight into the output; a broadcast one ("pooled") is multiplied at its own size, and its
// rows are what the output starts from. Under a norm, with x^ = (x - mean) rstd and u_i = W_i @
// norm_weight_i,
//
//   x^_r @ (norm_weight W_i).T = rstd_r ((p - m) norm_weight) @ W_i.T + rstd_r (m - mean_r) u_i
//
// for a pooled row p of mean m (an absent one: p = m = 0), so that these too are multiplied once. Centring
// each row on its own mean first keeps the difference exact however large the means are.
#include <cmath>
#include <map>

#include "box.h"
#include "simd/dispatch.h"
#include "sources.h"

MM_DISPATCH(mmfast_rows, const void*, mmfast::RowType)

namespace mmfast {
namespace {

using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

Activation activation_of(const std::string& name) {
  const char* names[] = {"none", "relu", "gelu", "silu", "swiglu"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, "concat_linear: unknown activation ", name);
}

template <class T>
const RowKernels<T>& row_kernels() {
  constexpr RowType type = std::is_same_v<T, double>  ? RowType::f64
                           : std::is_same_v<T, float> ? RowType::f32
                                                      : RowType::bf16;
  return *static_cast<const RowKernels<T>*>(mmfast_rows()(type));
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
const T* data(const Maybe& t) {
  return t ? static_cast<const T*>(t->data_ptr()) : nullptr;
}

Maybe dense(const Maybe& t) { return t ? Maybe(mmfast::dense(*t)) : t; }

// What forward and backward share: the sources, and what a norm needs to know of them.
template <class T, class A = typename wide<T>::type>
struct Problem {
  const RowKernels<T>& kernels = row_kernels<T>();
  Tensors held;  // keeps copies alive that were made for their strides
  Tensor weight_tensor;
  Maybe norm_weight_tensor, norm_bias_tensor;
  Shape lead;
  int64_t rows, batch, width, depth;  // width O, or 2 O for swiglu; depth is sum D_i
  Matrix<const T> weight;
  std::vector<Source<T>> sources;
  bool norm;
  const T *norm_weight, *norm_bias;
  std::vector<std::vector<A>> means;  // [n][own rows]: of the source's row alone
  std::vector<std::vector<A>> squares;
  std::vector<std::vector<A>> u;  // [n][width]: W_i @ norm_weight_i, where it is needed

  Problem(const Tensors& inputs, const Tensor& weight_, const Maybe& present, bool norm_,
          const Maybe& norm_weight_, const Maybe& norm_bias_)
      : weight_tensor(mmfast::dense(weight_)),
        norm_weight_tensor(dense(norm_weight_)),
        norm_bias_tensor(dense(norm_bias_)),
        lead(broadcast(inputs)),
        rows(product(lead)),
        batch(lead[0]),
        width(weight_.size(0)),
        depth(weight_.size(1)),
        weight{data<T>(weight_tensor), width, depth, weight_tensor.stride(0)},
        norm(norm_),
        norm_weight(data<T>(norm_weight_tensor)),
        norm_bias(data<T>(norm_bias_tensor)) {
    int64_t column = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      held.push_back(mmfast::dense(inputs[i]));
      Source<T> s = source<T>(held.back(), column, lead);
      column += s.depth;
      if (present) {
        s.present.resize(batch);
        for (int64_t b = 0; b < batch; ++b)
          s.present[b] =
              data<bool>(*present)[b * present->stride(0) + static_cast<int64_t>(i) * present->stride(1)];
        if (s.always()) s.present.clear();
      }
      sources.push_back(std::move(s));
    }
    if (norm) {
      for (const auto& s : sources) take_moments(s);
      for (const auto& s : sources)
        u.push_back(s.full && s.always() ? std::vector<A>() : project(s, norm_weight));
    }
  }

  Matrix<const T> columns(const Source<T>& s) const { return weight.columns_from(s.column, s.depth); }
  const T* norm_weight_of(const Source<T>& s) const { return norm_weight ? norm_weight + s.column : nullptr; }
  int64_t batch_of(int64_t r) const { return r / (rows / batch); }
  bool visible(const Source<T>& s, int64_t r) const { return s.in_batch(batch_of(r)); }
  A mean(size_t i, int64_t r) const { return visible(sources[i], r) ? means[i][sources[i].row(r)] : 0; }

  void take_moments(const Source<T>& s) {
    std::vector<A> mean(s.rows), square(s.rows);
    const auto x = row_pointers(s);
    parallel_rows(s.rows, s.depth, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q)
        if (x[q] && s.depth) kernels.moments(x[q], &mean[q], &square[q], s.depth);
    });
    means.push_back(std::move(mean)), squares.push_back(std::move(square));
  }

  // Mean and 1 / standard deviation of each row of the concatenation, from those of its parts.
  void statistics(double eps, A* mean_out, A* rstd_out) const {
    const A count = std::max<int64_t>(depth, 1);
    parallel_rows(rows, 16 * sources.size(), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        A sum = 0, square = 0;
        for (size_t i = 0; i < sources.size(); ++i) sum += sources[i].depth * mean(i, r);
        const A centre = sum / count;
        for (size_t i = 0; i < sources.size(); ++i) {
          const A d = mean(i, r) - centre;
          square += sources[i].depth * d * d + (visible(sources[i], r) ? squares[i][sources[i].row(r)] : 0);
        }
        mean_out[r] = centre;
        rstd_out[r] = 1 / std::sqrt(square / count + static_cast<A>(eps));
      }
    });
  }

  // W_i @ v_i [width] for a vector v over the concatenation's columns; null: ones
  std::vector<A> project(const Source<T>& s, const T* v) const {
    std::vector<A> wide_v(s.depth, v ? 0 : 1), out(width);
    if (v) kernels.accumulate(wide_v.data(), 1, v + s.column, s.depth);
    parallel_rows(width, s.depth, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o)
        out[o] = kernels.dot(weight.row(o) + s.column, wide_v.data(), s.depth);
    });
    return out;
  }

  // A pooled source's rows times its columns of the weight [own rows, width]; absent rows are left unwritten.
  Buffer<A> pooled_product(size_t i) const {
    const auto& s = sources[i];
    Buffer<T> product(s.rows, width);
    const Centring<T> centring{kernels, norm ? means[i].data() : nullptr, nullptr, norm_weight_of(s)};
    each_block(s, norm ? &centring : nullptr, false, [&](const Block<T>& block) {
      scatter(product.matrix(), block, columns(s).transposed(), false);
    });
    Buffer<A> out(s.rows, width);
    parallel_rows(s.rows, width, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        if (!s.visible(q)) continue;
        std::fill_n(out.row(q), width, A(0));
        kernels.accumulate(out.row(q), 1, product.row(q), width);
      }
    });
    return out;
  }

  // out[own rows of the block] = or += block @ right
  void scatter(const Matrix<T>& out, const Block<T>& block, const Matrix<const T>& right,
               bool accumulate) const {
    if (!block.rows) {
      gemm(out.rows_from(block.first, block.x.rows), block.x, right, accumulate);
      return;
    }
    Buffer<T> product(block.x.rows, out.columns);
    gemm(product.matrix(), block.x, right, false);
    parallel_rows(block.x.rows, out.columns, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        if (accumulate)
          kernels.add(out.row(block.rows[k]), product.row(k), out.columns);
        else
          std::memcpy(out.row(block.rows[k]), product.row(k), out.columns * sizeof(T));
      }
    });
  }
};

template <class A, class T>
std::vector<A> tanh_of(const Maybe& gate, int64_t n) {  // [n]
  std::vector<A> out;
  if (!gate) return out;
  std::vector<A> wide_gate(gate->numel(), 0);
  const Tensor g = torch::stable::contiguous(*gate);
  row_kernels<T>().accumulate(wide_gate.data(), 1, data<T>(g), g.numel());
  for (int64_t o = 0; o < n; ++o) out.push_back(std::tanh(wide_gate[wide_gate.size() == 1 ? 0 : o]));
  return out;
}

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

// Sums over output rows that read the same own row: sums[q] = sum of scale(r) * g_r over r with row_of(r) =
// q, where row_of(r) = -1 leaves r out. Parts of fixed length, added in order: the same bits for any number
// of threads.
template <class T, class A, class RowOf, class Scale>
std::vector<A> row_sums(const RowKernels<T>& kernels, const Matrix<const T>& g, int64_t count, RowOf row_of,
                        Scale scale) {
  constexpr int64_t PART = 256;
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
  std::vector<A> partial(parts.size() * g.columns, 0), sums(count * g.columns, 0);
  parallel_rows(parts.size(), PART * g.columns, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      for (int64_t i = parts[k].begin; i < parts[k].end; ++i)
        kernels.accumulate(&partial[k * g.columns], scale(order[i]), g.row(order[i]), g.columns);
  });
  for (size_t k = 0; k < parts.size(); ++k)
    row_kernels<A>().accumulate(&sums[parts[k].own * g.columns], 1, &partial[k * g.columns], g.columns);
  return sums;
}

template <class T, class A>
void narrow(const RowKernels<T>& kernels, T* out, const A* x, int64_t n) {
  const A one = 1;
  kernels.combine(out, nullptr, 1, &x, &one, n);
}

template <class T>
struct Backward {
  using A = typename wide<T>::type;
  const Problem<T>& p;
  Matrix<const T> g;  // of the linear part's output [rows, width]
  const A *mean, *rstd;
  const std::vector<bool>& needs;
  Tensors& grads;                                    // [*inputs, weight, bias, norm_weight, norm_bias, gate]
  std::map<Shape, std::vector<A>> shared_sums = {};  // of g, by a source's own leading dimensions

  T* grad(size_t i) const { return data<T>(grads[i]); }

  // sum of g over the output rows that read each own row of source i, where it is visible [own rows, width]
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
    std::vector<A> out(p.width, 0);
    for (int64_t q = 0; q < mmfast::product(sizes); ++q)
      row_kernels<A>().accumulate(out.data(), 1, &sums[q * p.width], p.width);
    return out;
  }

  // dx = g @ W_i at the visible rows, 0 at the others
  void input_product(const Source<T>& s, const T* rows, T* dx) const {
    if (!s.always()) std::memset(static_cast<void*>(dx), 0, s.rows * s.depth * sizeof(T));
    each_block(s.with(rows, p.width), static_cast<const Centring<T>*>(nullptr), false,
               [&](const Block<T>& block) {
                 p.scatter(Matrix<T>{dx, s.rows, s.depth, s.depth}, block, p.columns(s), false);
               });
  }

  // dW_i = g.T @ x, with x centred under a norm; `rows` holds g at the source's own size
  void weight_product(size_t i, const T* rows, T* dweight) const {
    const auto& s = p.sources[i];
    const Matrix<T> out{dweight + s.column, p.width, s.depth, p.depth};
    const Centring<T> centring{p.kernels, s.full || !p.norm ? mean : p.means[i].data(),
                               s.full ? rstd : nullptr, nullptr};
    bool begun = false;  // in bfloat16 each further block would round the sum again
    each_block(s, p.norm ? &centring : nullptr, std::is_same_v<T, bf16>, [&](const Block<T>& block) {
      const Matrix<const T> all{rows, s.rows, p.width, p.width};
      if (!block.rows) {
        gemm(out, all.rows_from(block.first, block.x.rows).transposed(), block.x, begun);
      } else {
        Buffer<T> picked(block.x.rows, p.width);
        for (int64_t k = 0; k < block.x.rows; ++k)
          std::memcpy(picked.row(k), all.row(block.rows[k]), p.width * sizeof(T));
        gemm(out, Matrix<const T>{picked.data(), block.x.rows, p.width, p.width}.transposed(), block.x,
             begun);
      }
      begun = true;
    });
    if (!begun)
      for (int64_t o = 0; o < p.width; ++o) std::fill_n(out.row(o), s.depth, T{});
  }

  void run() {
    const size_t n = p.sources.size();
    const bool any_input = std::find(needs.begin(), needs.begin() + n, true) != needs.begin() + n;
    const bool any_weight = needs[n] || (p.norm && (needs[n + 2] || needs[n + 3]));
    std::optional<Buffer<T>> unwanted;  // the weight's gradient, where only the norm's parameters need it
    T* const dweight = needs[n] || !any_weight ? grad(n) : unwanted.emplace(p.width, p.depth).data();

    std::vector<std::vector<A>> pooled(n);  // [own rows, width]
    std::vector<std::optional<Buffer<T>>> rows(n);
    for (size_t i = 0; i < n; ++i) {
      const auto& s = p.sources[i];
      if (s.full || !(needs[i] || any_weight || (p.norm && any_input))) continue;
      pooled[i] = pooled_sums(s);
      rows[i].emplace(s.rows, p.width);
      narrow(p.kernels, rows[i]->data(), pooled[i].data(), s.rows * p.width);
    }
    for (size_t i = 0; i < n; ++i) {
      const T* own = p.sources[i].full ? g.data : rows[i] ? rows[i]->data() : nullptr;
      if (any_weight) weight_product(i, own, dweight);
      if (needs[i] && !p.norm) input_product(p.sources[i], own, grad(i));
    }
    std::vector<A> dbias;
    if (needs[n + 1] || (p.norm && any_weight)) dbias = total();
    if (needs[n + 1]) narrow(p.kernels, grad(n + 1), dbias.data(), p.width);
    if (p.norm && any_weight) finish_weight(dweight, dbias);
    if (p.norm && any_input) norm_inputs(rows);
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
        p.kernels.norm_weights(dweight + o * p.depth + s.column, &dnorm_weight[s.column], w, k[o], dbias[o],
                               p.norm_weight_of(s), p.norm_bias ? p.norm_bias + s.column : nullptr, s.depth);
        p.kernels.accumulate(&dnorm_bias[s.column], dbias[o], w, s.depth);
      }
    }
    if (needs[n + 2]) narrow(p.kernels, grad(n + 2), dnorm_weight.data(), p.depth);
    if (needs[n + 3]) narrow(p.kernels, grad(n + 3), dnorm_bias.data(), p.depth);
  }

  // With dy = g @ W and d = dy norm_weight: dx = rstd (d - avg(d) - x^ avg(d x^)), averages over the
  // concatenation.
  void norm_inputs(const std::vector<std::optional<Buffer<T>>>& rows) {
    const size_t n = p.sources.size();
    std::vector<A> avg(2 * p.rows, 0);  // avg(d), avg(d x^) of each row
    std::vector<std::vector<const T*>> x(n);
    std::vector<std::optional<Buffer<T>>> unwanted(n);
    std::vector<T*> dx(n);
    for (size_t i = 0; i < n; ++i) {
      const auto& s = p.sources[i];
      if (s.full || needs[i]) {
        dx[i] = needs[i] ? grad(i) : unwanted[i].emplace(s.rows, s.depth).data();
        x[i] = row_pointers(s);
        input_product(s, s.full ? g.data : rows[i]->data(), dx[i]);
      }
      const std::optional<Buffer<A>> projected = s.full ? std::nullopt : std::optional(p.pooled_product(i));
      parallel_rows(p.rows, p.depth, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          A* const sums = &avg[2 * r];
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
    for (A& value : avg) value /= std::max<int64_t>(p.depth, 1);
    for (size_t i = 0; i < n; ++i) {
      const auto& s = p.sources[i];
      if (!needs[i]) continue;
      // A pooled row is read by many output rows: the same formula holds with rstd 1 and these sums.
      std::vector<A> a(s.full ? 0 : s.rows, 0), b(a);
      for (int64_t r = 0; !s.full && r < p.rows; ++r)
        if (p.visible(s, r)) {
          const A slope = rstd[r] * rstd[r] * avg[2 * r + 1];
          a[s.row(r)] += rstd[r] * avg[2 * r] + slope * (p.mean(i, r) - mean[r]);
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
                 Activation activation, const Maybe& gate_, const Tensor& preact, const Tensor& mean,
                 const Tensor& rstd, const std::vector<bool>& needs) {
  using A = typename wide<T>::type;
  const Problem<T> p(inputs, weight, present, norm_eps.has_value(), norm_weight, norm_bias);
  const size_t n = inputs.size();
  const int64_t width = p.width, out_width = activation == Activation::swiglu ? width / 2 : width;
  Tensors grads;
  for (size_t i = 0; i < needs.size(); ++i) {
    Shape shape{p.depth};  // norm_weight, norm_bias
    const auto like = [&](const Tensor& t) { shape.assign(t.sizes().begin(), t.sizes().end()); };
    if (i < n) like(inputs[i]);
    if (i == n) like(weight);
    if (i == n + 1) shape = {width};
    if (i == n + 4 && gate_) like(*gate_);
    grads.push_back(empty(needs[i] ? shape : Shape{0}, scalar_type<T>));
  }

  const Tensor grad = torch::stable::contiguous(grad_);
  std::optional<Buffer<T>> dz;
  const T* g = data<T>(grad);
  if (preact.numel() > 0 && (activation != Activation::none || gate_)) {
    constexpr int64_t PART = 64;
    const std::vector<A> gate = tanh_of<A, T>(gate_, out_width);
    const int64_t parts = needs[n + 4] ? (p.rows + PART - 1) / PART : 0;
    std::vector<A> partial(parts * out_width, 0), dgate(out_width, 0);
    g = dz.emplace(p.rows, width).data();
    parallel_rows((p.rows + PART - 1) / PART, PART * width, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin * PART; r < std::min(end * PART, p.rows); ++r)
        p.kernels.epilogue_backward(dz->row(r), parts ? &partial[r / PART * out_width] : nullptr,
                                    data<T>(grad) + r * out_width, data<T>(preact) + r * width,
                                    gate.empty() ? nullptr : gate.data(), activation, out_width);
    });
    if (needs[n + 4]) {
      for (int64_t k = 0; k < parts; ++k)
        row_kernels<A>().accumulate(dgate.data(), 1, &partial[k * out_width], out_width);
      for (int64_t o = 0; o < out_width; ++o) dgate[o] *= 1 - gate[o] * gate[o];
      if (gate_->numel() == 1)
        for (int64_t o = 1; o < out_width; ++o) dgate[0] += dgate[o];
      narrow(p.kernels, data<T>(grads[n + 4]), dgate.data(), gate_->numel());
    }
  } else if (needs[n + 4]) {
    torch::stable::zero_(grads[n + 4]);
  }
  Backward<T>{p, {g, p.rows, width, width}, data<A>(mean), data<A>(rstd), needs, grads}.run();
  return grads;
}

// CPU GEMMs in float16 run at a tenth of the speed of float32, so float16 goes through float32 copies.
Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == ScalarType::Bool ? t : torch::stable::to(t, type);
}
Maybe cast(const Maybe& t, ScalarType type) { return t ? Maybe(cast(*t, type)) : t; }
Tensors cast(const Tensors& ts, ScalarType type) {
  Tensors out;
  for (const auto& t : ts) out.push_back(cast(t, type));
  return out;
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

Tensors concat_linear_backward(Tensor grad, Tensors inputs, Tensor weight, Maybe present,
                               std::optional<double> norm_eps, Maybe norm_weight, Maybe norm_bias,
                               std::string activation, Maybe gate, Tensor preact, Tensor mean, Tensor rstd,
                               std::vector<bool> needs) {
  const auto run = [&](auto zero, auto to) {
    return backward<decltype(zero)>(to(grad), to(inputs), to(weight), present, norm_eps, to(norm_weight),
                                    to(norm_bias), activation_of(activation), to(gate), to(preact), mean,
                                    rstd, needs);
  };
  const auto as_is = [](const auto& t) { return t; };
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return run(float{}, as_is);
    case ScalarType::Double:
      return run(double{}, as_is);
    case ScalarType::BFloat16:
      return run(bf16{}, as_is);
    case ScalarType::Half:
      return cast(run(float{}, [](const auto& t) { return cast(t, ScalarType::Float); }), ScalarType::Half);
    default:
      STD_TORCH_CHECK(false, "concat_linear: weight's dtype is not supported");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  bind<&concat_linear>(m, "concat_linear.cpu");
  bind<&concat_linear_backward>(m, "concat_linear_backward.cpu");
}

}  // namespace mmfast
