// group_norm on the CPU: activation((x - mean) rstd weight + bias + residual). A sample is small enough to
// stay in a core's own cache between the pass that sums and the pass that writes.
#include "simd/group_norm.h"

#include <cmath>
#include <string>
#include <tuple>

#include "box.h"
#include "tensors.h"

namespace mmfast {

MM_KERNELS(norm_kernels, NormKernels)

namespace {

// Columns of a sample that lie side by side, `rows` times; channel(k) is that of column k.
struct Part {
  int64_t first, columns, rows, offset;
  bool last;
  int64_t channel(int64_t k) const { return last ? k : first; }
};

// Where [B, C, pixels...] lies: channels last, [B, pixels, C], or [B, C, pixels]; dense, else the caller
// erred.
struct Layout {
  static constexpr int64_t RUN = 64;     // pixels of a channel that the second is cut into
  static constexpr int64_t ROWS = 1024;  // that a kernel may add up one by one
  Shape sizes, strides;
  int64_t batch, channels, pixels = 1;
  bool last;

  explicit Layout(const Tensor& t)
      : sizes(t.sizes().begin(), t.sizes().end()),
        strides(t.strides().begin(), t.strides().end()),
        batch(sizes[0]),
        channels(sizes[1]) {
    for (size_t d = 2; d < sizes.size(); ++d) pixels *= sizes[d];
    const bool first = dense(t, false);
    last = dense(t, true) && !(first && channels == 1);
    STD_TORCH_CHECK(first || last, "group_norm: input's memory is neither contiguous nor channels_last");
  }

  int64_t sample() const { return channels * pixels; }
  int64_t columns() const { return last ? channels : RUN; }
  Tensor empty(ScalarType type) const { return mmfast::empty(sizes, strides, type); }

  // `t`, of the same shape, in this layout: itself, or a copy
  Tensor match(const Tensor& t) const {
    if (dense(t, last)) return t;
    Tensor copy = empty(t.scalar_type());
    torch::stable::copy_(copy, t);
    return copy;
  }
  Maybe match(const Maybe& t) const { return t ? Maybe(match(*t)) : t; }

  template <class F>
  void each_part(const F& f) const {
    for (int64_t r = 0; last && r < pixels; r += ROWS)
      f(Part{0, channels, std::min(ROWS, pixels - r), r * channels, true});
    if (last) return;
    const int64_t rows = pixels / RUN, rest = pixels % RUN;
    for (int64_t c = 0; c < channels; ++c) {
      if (rows) f(Part{c, RUN, rows, c * pixels, false});
      if (rest) f(Part{c, rest, 1, c * pixels + rows * RUN, false});
    }
  }

 private:
  static bool dense(const Tensor& t, bool last) {
    if (t.numel() == 0) return true;
    int64_t expected = 1;
    const auto next = [&](int64_t d) {
      const bool fits = t.size(d) == 1 || t.stride(d) == expected;
      expected *= t.size(d);
      return fits;
    };
    bool fits = !last || next(1);
    for (int64_t d = t.dim() - 1; d > 1; --d) fits = fits && next(d);
    return fits && (last || next(1)) && next(0);
  }
};

// A value for each channel, handed out as one for each column of a part. Aligned: kernels read it for each
// row.
template <class A>
class PerChannel {
 public:
  explicit PerChannel(int64_t channels) : values_(1, channels) {}
  A& operator[](int64_t c) { return values_.data()[c]; }
  const A* of(const Part& part) {
    if (part.last) return values_.data();
    std::fill_n(run_, part.columns, values_.data()[part.first]);
    return run_;
  }

 private:
  Buffer<A> values_;
  alignas(64) A run_[Layout::RUN];
};

struct Moments {
  double count = 0, mean = 0, m2 = 0;
  void add(double n, double other, double other_m2) {
    const double apart = other - mean;
    count += n;
    mean += apart * (n / count);
    m2 += other_m2 + apart * apart * (n / count) * (count - n);
  }
};

template <class T>
Tensors forward(const Tensor& input, int64_t groups, const Maybe& weight, const Maybe& bias_, double eps,
                bool relu, const Maybe& residual_) {
  using A = typename wide<T>::type;
  const Layout layout(input);
  const int64_t C = layout.channels, size = layout.sample(), width = C / groups;
  const Maybe residual = layout.match(residual_);
  const Tensor out = layout.empty(scalar_type<T>);
  const Tensor mean = empty({layout.batch, groups}, scalar_type<A>);
  const Tensor rstd = empty({layout.batch, groups}, scalar_type<A>);
  const std::vector<A> w = weight ? widened<T>(*weight) : std::vector<A>(C, 1);
  const std::vector<A> b = bias_ ? widened<T>(*bias_) : std::vector<A>(C, 0);
  const auto& kernels = norm_kernels<T>();

  parallel_rows(layout.batch, size, [&](int64_t begin, int64_t end) {
    std::vector<A> means(layout.columns()), m2(layout.columns());
    PerChannel<A> centre(C), scale(C), bias(C);
    std::copy(b.begin(), b.end(), &bias[0]);
    for (int64_t s = begin; s < end; ++s) {
      const T* const x = data<T>(input) + s * size;
      std::vector<Moments> moments(groups);
      layout.each_part([&](const Part& p) {
        kernels.moments(means.data(), m2.data(), x + p.offset, p.rows, p.columns);
        for (int64_t k = 0; k < p.columns; ++k) moments[p.channel(k) / width].add(p.rows, means[k], m2[k]);
      });
      A* const mu = data<A>(mean) + s * groups;
      A* const sigma = data<A>(rstd) + s * groups;
      for (int64_t g = 0; g < groups; ++g) {
        mu[g] = moments[g].mean;
        sigma[g] = 1 / std::sqrt(std::max(moments[g].m2, 0.0) / std::max(moments[g].count, 1.0) + eps);
      }
      for (int64_t c = 0; c < C; ++c) centre[c] = mu[c / width], scale[c] = sigma[c / width] * w[c];
      layout.each_part([&](const Part& p) {
        kernels.apply(data<T>(out) + s * size + p.offset, x + p.offset,
                      residual ? data<T>(residual) + s * size + p.offset : nullptr, centre.of(p), scale.of(p),
                      bias.of(p), relu, p.rows, p.columns);
      });
    }
  });
  return {out, mean, rstd};
}

// With g the gradient where out > 0, d = g weight and x^ = (x - mean) rstd:
//   dx = rstd (d - avg(d) - x^ avg(d x^)), averages over the group;  dweight = sum g x^;  dbias = sum g
template <class T>
Tensors backward(const Tensor& grad_, const Tensor& input, int64_t groups, const Maybe& weight, bool relu,
                 const Tensor& out_, const Tensor& mean, const Tensor& rstd, const std::vector<bool>& needs) {
  using A = typename wide<T>::type;
  const Layout layout(input);
  const int64_t B = layout.batch, C = layout.channels, size = layout.sample(), width = C / groups;
  const Tensor grad = layout.match(grad_);
  const Maybe out = relu ? Maybe(layout.match(out_)) : std::nullopt;
  Tensors made;
  T* grads[4] = {};  // of input, weight, bias and residual: where each that is needed is written
  for (int i = 0; i < 4; ++i) {
    if (!needs[i]) continue;
    const bool as_input = i == 0 || i == 3;
    made.push_back(as_input ? layout.empty(scalar_type<T>) : empty({C}, scalar_type<T>));
    grads[i] = data<T>(made.back());
  }
  const std::vector<A> w = weight ? widened<T>(*weight) : std::vector<A>(C, 1);
  std::vector<A> dweights(B * C), dbiases(B * C);  // of each sample
  const auto& kernels = norm_kernels<T>();

  parallel_rows(B, size, [&](int64_t begin, int64_t end) {
    std::vector<A> g(layout.columns()), gx(layout.columns());
    PerChannel<A> centre(C), scale(C), slope(C), offset(C);
    for (int64_t s = begin; s < end; ++s) {
      const auto at = [&](T* t, const Part& p) { return t ? t + s * size + p.offset : nullptr; };
      const T* const x = data<T>(input) + s * size;
      const T* const dy = data<T>(grad) + s * size;
      const T* const y = out ? data<T>(*out) + s * size : nullptr;
      const A* const mu = data<A>(mean) + s * groups;
      const A* const sigma = data<A>(rstd) + s * groups;
      A* const dweight = dweights.data() + s * C;
      A* const dbias = dbiases.data() + s * C;
      for (int64_t c = 0; c < C; ++c) centre[c] = mu[c / width];
      if (needs[0] || needs[1] || needs[2])
        layout.each_part([&](const Part& p) {
          std::fill(g.begin(), g.end(), A(0)), std::fill(gx.begin(), gx.end(), A(0));
          kernels.sums(g.data(), gx.data(), dy + p.offset, y ? y + p.offset : nullptr, x + p.offset,
                       centre.of(p), p.rows, p.columns);
          for (int64_t k = 0; k < p.columns; ++k) {
            dbias[p.channel(k)] += g[k];
            dweight[p.channel(k)] += gx[k] * sigma[p.channel(k) / width];
          }
        });
      if (!needs[0] && !needs[3]) continue;
      for (int64_t q = 0; q < groups; ++q) {
        double d = 0, dx_hat = 0;
        for (int64_t c = q * width; c < (q + 1) * width; ++c)
          d += double(w[c]) * dbias[c], dx_hat += double(w[c]) * dweight[c];
        const double count = std::max<int64_t>(width * layout.pixels, 1);
        for (int64_t c = q * width; c < (q + 1) * width; ++c) {
          scale[c] = sigma[q] * w[c];
          slope[c] = -sigma[q] * sigma[q] * A(dx_hat / count);
          offset[c] = -sigma[q] * A(d / count);
        }
      }
      layout.each_part([&](const Part& p) {
        kernels.backward(at(grads[0], p), at(grads[3], p), dy + p.offset, y ? y + p.offset : nullptr,
                         x + p.offset, centre.of(p), scale.of(p), slope.of(p), offset.of(p), p.rows,
                         p.columns);
      });
    }
  });

  const auto over_samples = [&](T* total, const std::vector<A>& x) {  // in order: the same bits every time
    std::vector<A> sum(C, 0);
    for (int64_t s = 0; s < B; ++s)
      for (int64_t c = 0; c < C; ++c) sum[c] += x[s * C + c];
    row_kernels<T>().narrow(total, sum.data(), C);
  };
  if (needs[1]) over_samples(grads[1], dweights);
  if (needs[2]) over_samples(grads[2], dbiases);
  return made;
}

std::tuple<Tensor, Tensor, Tensor> group_norm(Tensor input, int64_t groups, Maybe weight, Maybe bias,
                                              double eps, std::string activation, Maybe residual) {
  const Tensors r = by_type("group_norm: input", input.scalar_type(), 1, [&](auto zero, auto to) {
    return forward<decltype(zero)>(to(input), groups, to(weight), to(bias), eps, activation == "relu",
                                   to(residual));
  });
  return {r[0], r[1], r[2]};
}

Tensors group_norm_backward(Tensor grad, Tensor input, int64_t groups, Maybe weight, std::string activation,
                            Tensor out, Tensor mean, Tensor rstd, std::vector<bool> needs) {
  return by_type("group_norm: input", input.scalar_type(), ALL, [&](auto zero, auto to) {
    return backward<decltype(zero)>(to(grad), to(input), groups, to(weight), activation == "relu", to(out),
                                    mean, rstd, needs);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  bind<&group_norm>(m, "group_norm.cpu");
  bind<&group_norm_backward>(m, "group_norm_backward.cpu");
}

}  // namespace mmfast
