// Row kernels in the vectors of one instruction set. No torch header and no linkage but MM_KERNELS_ENTRY: see
// dispatch.h.
#include "rows.h"

#include "vectors.h"

using mmfast::Activation, mmfast::RowKernels;

namespace {

// 2^n * p(r) with x = n ln 2 + r, |r| <= ln 2 / 2: Taylor's series to degree 7. 2^n in two factors reaches
// inf and 0.
Float exp(Float x) {
  x = x > 89.f ? Float{} + 89.f : x;
  x = x < -104.f ? Float{} - 104.f : x;
  const Float n = (x * 1.44269504f + 12582912.f) - 12582912.f;
  const Float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Float p = r * 1.98412698e-4f + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const Int whole = __builtin_convertvector(n == n ? n : Float{}, Int);
  const Int half = whole >> 1;
  return p * (Float)((half + 127) << 23) * (Float)((whole - half + 127) << 23);
}

Double exp(Double x) {
  return each(x, [](double v) { return __builtin_exp(v); });
}

template <class V>
struct Normal {
  V cdf, bell;  // Phi(x), exp(-x^2 / 2)
};

// By its tail: Phi(-|x|) = exp(-x^2 / 2) R(u), u = 1 / (1 + p |x|). R is a polynomial with the least relative
// error for x from 0 to 40: 6e-8, for bfloat16 1e-4.
template <class T>
Normal<Vec<T>> normal(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    const auto cdf = [](double v) { return 0.5 * __builtin_erfc(v * -0.70710678118654752); };
    return {each(x, cdf), exp(x * x * -0.5)};
  } else {
    constexpr bool brief = sizeof(T) == 2;
    constexpr float fine[] = {0.109710686f,   0.109654367f, 0.102190353f,  0.0789365023f, 0.0880057290f,
                              -0.0351589993f, 0.130167380f, -0.110673539f, 0.0271675214f};
    constexpr float rough[] = {0.159573987f, 0.160499215f, 0.120616016f, 0.144003928f, -0.0847404599f};
    const Float size = x < 0 ? -x : x, below = 1.f + (brief ? 0.4f : 0.275f) * size;
#ifdef __AVX512F__
    const Float u = brief ? (Float)_mm512_rcp14_ps((__m512)below) : 1.f / below;
#else
    const Float u = 1.f / below;
#endif
    Float r{};
    if constexpr (brief)
      for (int i = 5; i-- > 0;) r = (r + rough[i]) * u;
    else
      for (int i = 9; i-- > 0;) r = (r + fine[i]) * u;
    const Float bell = exp(x * x * -0.5f), tail = bell * r;
    return {x < 0 ? tail : 1.f - tail, bell};
  }
}

template <class V>
V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

template <class T, class V = Vec<T>>
V activate(Activation activation, V x) {
  switch (activation) {
    case Activation::relu:
      return x < 0 ? V{} : x;
    case Activation::gelu:
      return x * normal<T>(x).cdf;
    case Activation::silu:
    case Activation::swiglu:
      return x / (1 + exp(-x));
    default:
      return x;
  }
}

template <class T, class V = Vec<T>>
V slope(Activation activation, V x) {
  switch (activation) {
    case Activation::relu:
      return x <= 0 ? V{} : V{} + 1;
    case Activation::gelu: {
      const auto [cdf, bell] = normal<T>(x);
      return cdf + x * bell * Acc<T>(0.39894228040143268);
    }
    case Activation::silu:
    case Activation::swiglu:
      return sigmoid(x) * (1 + x * (1 - sigmoid(x)));
    default:
      return V{} + 1;
  }
}

template <class T>
void narrow(T* out, const Acc<T>* x, int64_t n) {
  sweep<T>(n, [&](int64_t c, auto part) { store(out + c, load(x + c, part), part); });
}

template <class T>
void widen(Acc<T>* out, const T* x, int64_t n) {
  sweep<T>(n, [&](int64_t c, auto part) { store(out + c, load(x + c, part), part); });
}

template <class T>
void accumulate(Acc<T>* sum, Acc<T> scale, const T* x, int64_t n) {
  sweep<T>(n, [&](int64_t c, auto part) {
    store(sum + c, load(sum + c, part) + scale * load(x + c, part), part);
  });
}

template <class T>
Acc<T> dot(const T* x, const Acc<T>* y, int64_t n) {
  Vec<T> sum{};
  sweep<T>(n, [&](int64_t c, auto part) { sum += load(x + c, part) * load(y + c, part); });
  return total(sum);
}

template <class T, Activation activation>
__attribute__((noinline)) void epilogue_of(T* out, const Acc<T>* preact, const Acc<T>* other,
                                           const Acc<T>* gate, const T* residual, int64_t n) {
  sweep<T>(n, [&](int64_t c, auto part) {
    Vec<T> y = activate<T>(activation, load(preact + c, part));
    if constexpr (activation == Activation::swiglu) y *= load(other + c, part);
    if (gate) y *= load(gate + c, part);
    if (residual) y += load(residual + c, part);
    store(out + c, y, part);
  });
}

template <class T, Activation activation>
void epilogue_backward_of(T* dpreact, Acc<T>* dgate, const T* grad, const T* preact, const Acc<T>* gate,
                          int64_t n) {
  constexpr bool glu = activation == Activation::swiglu;
  sweep<T>(n, [&](int64_t c, auto part) {
    const Vec<T> g = load(grad + c, part), x = load(preact + c, part);
    const Vec<T> y = activate<T>(activation, x);
    const Vec<T> other = glu ? load(preact + n + c, part) : Vec<T>{} + 1;
    if (dgate) store(dgate + c, load(dgate + c, part) + g * (glu ? y * other : y), part);
    const Vec<T> dy = gate ? g * load(gate + c, part) : g;
    // relu selects, as PyTorch does: an infinite grad times 0 would be NaN
    const Vec<T> dx =
        activation == Activation::relu ? (x <= 0 ? Vec<T>{} : dy) : dy * slope<T>(activation, x);
    store(dpreact + c, glu ? dx * other : dx, part);
    if constexpr (glu) store(dpreact + n + c, dy * y, part);
  });
}

#define MM_BY_ACTIVATION(f, ...)                    \
  switch (activation) {                             \
    case Activation::none:                          \
      return f<T, Activation::none>(__VA_ARGS__);   \
    case Activation::relu:                          \
      return f<T, Activation::relu>(__VA_ARGS__);   \
    case Activation::gelu:                          \
      return f<T, Activation::gelu>(__VA_ARGS__);   \
    case Activation::silu:                          \
      return f<T, Activation::silu>(__VA_ARGS__);   \
    case Activation::swiglu:                        \
      return f<T, Activation::swiglu>(__VA_ARGS__); \
  }

template <class T>
void epilogue(T* out, const Acc<T>* preact, const Acc<T>* other, const Acc<T>* gate, const T* residual,
              Activation activation, int64_t n) {
  MM_BY_ACTIVATION(epilogue_of, out, preact, other, gate, residual, n)
}

template <class T>
void epilogue_backward(T* dpreact, Acc<T>* dgate, const T* grad, const T* preact, const Acc<T>* gate,
                       Activation activation, int64_t n) {
  MM_BY_ACTIVATION(epilogue_backward_of, dpreact, dgate, grad, preact, gate, n)
}

// Lanes past the end of a row must not count: a vector of ones up to there.
template <class T>
Vec<T> inside(Whole) {
  return Vec<T>{} + 1;
}
template <class T>
Vec<T> inside(Part part) {
  Vec<T> v{};
  for (int64_t i = 0; i < part.count; ++i) v[i] = 1;
  return v;
}

template <class T>
void moments(const T* x, Acc<T>* mean, Acc<T>* m2, int64_t n) {
  Vec<T> sum{}, squares{};
  sweep<T>(n, [&](int64_t c, auto part) { sum += load(x + c, part); });
  const Acc<T> centre = total(sum) / n;
  sweep<T>(n, [&](int64_t c, auto part) {
    const Vec<T> d = (load(x + c, part) - centre) * inside<T>(part);
    squares += d * d;
  });
  *mean = centre;
  *m2 = total(squares);
}

template <class T>
Vec<T> weight_of(const T* weight, int64_t c, auto part) {
  return weight ? load(weight + c, part) : inside<T>(part);
}

template <class T>
void normalize(T* out, const T* x, Acc<T> mean, Acc<T> rstd, const T* weight, int64_t n) {
  sweep<T>(n, [&](int64_t c, auto part) {
    store(out + c, (load(x + c, part) - mean) * rstd * weight_of(weight, c, part), part);
  });
}

// The terms of a norm's gradient cancel against each other, down to nothing for a row of one feature:
// float32's are made and summed in float64.
template <class T>
Exact<T> exact(Vec<T> v) {
  return __builtin_convertvector(v, Exact<T>);
}

template <class T>
void norm_sums(Sum<T>* sums, const T* dy, const T* x, Sum<T> mean, Sum<T> rstd, const T* weight, int64_t n) {
  Exact<T> a{}, b{};
  sweep<T>(n, [&](int64_t c, auto part) {
    const Exact<T> d = exact<T>(load(dy + c, part)) * exact<T>(weight_of(weight, c, part));
    a += d;
    b += d * ((exact<T>(load(x + c, part)) - mean) * rstd);
  });
  sums[0] += total(a);
  sums[1] += total(b);
}

template <class T>
void norm_backward(T* dx, const T* x, Sum<T> mean, Sum<T> rstd, const T* weight, Sum<T> a, Sum<T> b,
                   int64_t n) {
  sweep<T>(n, [&](int64_t c, auto part) {
    const Exact<T> d = exact<T>(load(dx + c, part)) * exact<T>(weight_of(weight, c, part));
    const Exact<T> normed = (exact<T>(load(x + c, part)) - mean) * rstd;
    store(dx + c, __builtin_convertvector(rstd * (d - a - normed * b), Vec<T>), part);
  });
}

template <class T>
void norm_weights(T* z, Acc<T>* dweight, const T* w, Acc<T> k, Acc<T> c, const T* weight, const T* bias,
                  int64_t n) {
  sweep<T>(n, [&](int64_t i, auto part) {
    Vec<T> v = load(z + i, part) + k;
    if (dweight) store(dweight + i, load(dweight + i, part) + load(w + i, part) * v, part);
    v *= weight_of(weight, i, part);
    if (bias) v += c * load(bias + i, part);
    store(z + i, v, part);
  });
}

template <class T>
constexpr RowKernels<T> kernels = {
    narrow<T>,  widen<T>,     accumulate<T>, dot<T>,           epilogue<T>,    epilogue_backward<T>,
    moments<T>, normalize<T>, norm_sums<T>,  norm_backward<T>, norm_weights<T>};

}  // namespace

MM_KERNELS_ENTRY(row_kernels)
