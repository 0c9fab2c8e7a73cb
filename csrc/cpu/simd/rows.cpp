// Row kernels in the vectors of one instruction set. No torch header and no linkage but MM_KERNELS_ENTRY: see
// dispatch.h.
#include "rows.h"

#include "activations.h"

using mmfast::RowKernels;

namespace {

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
void stream_zeros(T* out, int64_t n) {
  const int64_t bytes = n * sizeof(T);
#ifdef __AVX2__
  char* const to = reinterpret_cast<char*>(out);
  const int64_t before = -reinterpret_cast<uintptr_t>(out) % BYTES;
  int64_t at = before < bytes ? before : bytes;
  __builtin_memset(to, 0, at);
  for (; at + BYTES <= bytes; at += BYTES) stream(to + at, Int{});
  __builtin_memset(to + at, 0, bytes - at);
  _mm_sfence();
#else
  __builtin_memset(out, 0, bytes);
#endif
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
// float32's are made and summed in float64, a vector of that at a time.
template <class T>
using Exact = Vec<Sum<T>>;

template <class T, class P>
Exact<T> load_exact(const T* p, P part) {
  if constexpr (!__is_same(T, float))
    return load(p, part);
  else if constexpr (__is_same(P, Whole))
    return widen(bits<Floats>(p, lanes<double>));
  else
    return widen(head<Floats>(p, part.count));
}
template <class T, class P>
void store_exact(T* p, Exact<T> v, P part) {
  if constexpr (!__is_same(T, float)) {
    store(p, v, part);
  } else {
    const Floats f = narrow(v);
    if constexpr (__is_same(P, Whole))
      __builtin_memcpy(p, &f, sizeof(f));
    else
      put_head(p, f, part.count);
  }
}
template <class T, class P>
Exact<T> exact_weight(const T* weight, int64_t c, P part) {
  return weight ? load_exact(weight + c, part) : inside<Sum<T>>(part);
}

template <class T>
void norm_sums(Sum<T>* sums, const T* dy, const T* x, Sum<T> mean, Sum<T> rstd, const T* weight, int64_t n) {
  Exact<T> a{}, b{};
  sweep<Sum<T>>(n, [&](int64_t c, auto part) {
    const Exact<T> d = load_exact(dy + c, part) * exact_weight(weight, c, part);
    a += d;
    b += d * ((load_exact(x + c, part) - mean) * rstd);
  });
  sums[0] += total(a);
  sums[1] += total(b);
}

template <class T>
void norm_backward(T* dx, const T* x, Sum<T> mean, Sum<T> rstd, const T* weight, Sum<T> a, Sum<T> b,
                   int64_t n) {
  sweep<Sum<T>>(n, [&](int64_t c, auto part) {
    const Exact<T> d = load_exact(dx + c, part) * exact_weight(weight, c, part);
    const Exact<T> normed = (load_exact(x + c, part) - mean) * rstd;
    store_exact(dx + c, rstd * (d - a - normed * b), part);
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
    narrow<T>,       widen<T>,   accumulate<T>, dot<T>,       epilogue<T>,      epilogue_backward<T>,
    stream_zeros<T>, moments<T>, normalize<T>,  norm_sums<T>, norm_backward<T>, norm_weights<T>};

}  // namespace

MM_KERNELS_ENTRY(row_kernels)
