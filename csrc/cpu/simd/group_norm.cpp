// See group_norm.h. No torch header and no linkage but MM_KERNELS_ENTRY: see dispatch.h.
#include "group_norm.h"

#include "vectors.h"

using mmfast::NormKernels;

namespace {

constexpr int64_t CHUNK = 64;  // rows: read twice, from the second time on in the nearest cache

// f(first row, rows of the chunk)
template <class F>
void chunks(int64_t rows, F f) {
  for (int64_t r = 0; r < rows; r += CHUNK) f(r, rows - r < CHUNK ? rows - r : CHUNK);
}

// Two passes over each chunk, the second about the mean that the first found, so that however large a mean
// costs the deviations no digits; chunks are joined as in Chan, Golub and LeVeque 1979.
template <class T>
void moments(Acc<T>* mean, Acc<T>* m2, const T* x, int64_t rows, int64_t n) {
  for (int64_t c = 0; c < n; ++c) mean[c] = m2[c] = 0;
  chunks(rows, [&](int64_t first, int64_t count) {
    const Acc<T> share = Acc<T>(count) / Acc<T>(first + count), each = 1 / Acc<T>(count);
    sweep<T>(n, [&](int64_t c, auto part) {
      const T* const p = x + first * n + c;
      Vec<T> sum{}, rest{}, squares{};
      for (int64_t r = 0; r < count; ++r) sum += load(p + r * n, part);
      const Vec<T> centre = sum * each;
      for (int64_t r = 0; r < count; ++r) {
        const Vec<T> d = load(p + r * n, part) - centre;
        rest += d;
        squares += d * d;
      }
      rest *= each;  // what rounding left out of the chunk's mean
      const Vec<T> before = load(mean + c, part), apart = centre - before + rest;
      store(mean + c, before + apart * share, part);
      store(m2 + c,
            load(m2 + c, part) + (squares - rest * rest * Acc<T>(count)) +
                apart * apart * (share * Acc<T>(first)),
            part);
    });
  });
}

template <class T>
void apply(T* y, const T* x, const T* residual, const Acc<T>* mean, const Acc<T>* scale, const Acc<T>* bias,
           bool relu, int64_t rows, int64_t n) {
  for (int64_t at = 0; at < rows * n; at += n)
    sweep<T>(n, [&](int64_t c, auto part) {
      Vec<T> v =
          (load(x + at + c, part) - load(mean + c, part)) * load(scale + c, part) + load(bias + c, part);
      if (residual) v += load(residual + at + c, part);
      if (relu) v = v < 0 ? Vec<T>{} : v;
      store(y + at + c, v, part);
    });
}

template <class T>
Vec<T> masked(const T* grad, const T* out, int64_t i, auto part) {
  const Vec<T> g = load(grad + i, part);
  return out ? (load(out + i, part) <= 0 ? Vec<T>{} : g) : g;
}

template <class T>
void sums(Acc<T>* g, Acc<T>* gx, const T* grad, const T* out, const T* x, const Acc<T>* mean, int64_t rows,
          int64_t n) {
  chunks(rows, [&](int64_t first, int64_t count) {
    sweep<T>(n, [&](int64_t c, auto part) {
      const Vec<T> centre = load(mean + c, part);
      Vec<T> a{}, b{};
      for (int64_t i = first * n + c; i < (first + count) * n; i += n) {
        const Vec<T> v = masked(grad, out, i, part);
        a += v;
        b += v * (load(x + i, part) - centre);
      }
      store(g + c, load(g + c, part) + a, part);
      store(gx + c, load(gx + c, part) + b, part);
    });
  });
}

template <class T>
void backward(T* dx, T* dresidual, const T* grad, const T* out, const T* x, const Acc<T>* mean,
              const Acc<T>* a, const Acc<T>* b, const Acc<T>* c, int64_t rows, int64_t n) {
  for (int64_t at = 0; at < rows * n; at += n)
    sweep<T>(n, [&](int64_t k, auto part) {
      const Vec<T> g = masked(grad, out, at + k, part);
      if (dresidual) store(dresidual + at + k, g, part);
      if (dx)
        store(dx + at + k,
              g * load(a + k, part) + (load(x + at + k, part) - load(mean + k, part)) * load(b + k, part) +
                  load(c + k, part),
              part);
    });
}

template <class T>
constexpr NormKernels<T> kernels = {moments<T>, apply<T>, sums<T>, backward<T>};

}  // namespace

MM_KERNELS_ENTRY(norm_kernels)
