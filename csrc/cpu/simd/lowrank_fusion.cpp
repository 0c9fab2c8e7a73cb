// See lowrank_fusion.h. No torch header and no linkage but MM_KERNELS_ENTRY: see dispatch.h.
#include "lowrank_fusion.h"

#include "vectors.h"

using mmfast::LowrankKernels;

namespace {

template <class T>
void multiply(Acc<T>* const* product, T* const* kept, int64_t at, const Acc<T>* factor, int64_t stride,
              bool first, int64_t count, int64_t n) {
  for (int64_t i = 0; i < count; ++i, factor += stride) {
    Acc<T>* const own = product[i];
    T* const keep = kept ? kept[i] + at : nullptr;
    sweep<T>(n, [&](int64_t c, auto part) {
      const Vec<T> f = load(factor + c, part);
      store(own + c, first ? f : load(own + c, part) * f, part);
      if (keep) store(keep + c, f, part);
    });
  }
}

// The others are multiplied out for each factor: dividing the product by it would not do where it is 0. Where
// N, their count, is known the factors are held in registers: loops over two or three take longer than what
// is in them. 0: it is not.
template <class T, int N>
void backward_of(T* const* dfactors, Acc<T>* sums, const T* grad, const Acc<T>* weight, const T* factors,
                 int64_t stride, int64_t count, int64_t ranks, int64_t n) {
  if constexpr (N > 0) count = N;
  for (int64_t r = 0; r < ranks; ++r) {
    const Acc<T> scale = weight[r];
    Vec<T> sum{};
    sweep<T>(n, [&](int64_t c, auto part) __attribute__((always_inline)) {
      const int64_t at = r * n + c;
      const auto read = [&](int64_t j) { return load(factors + j * stride + at, part); };
      Vec<T> held[N > 0 ? N : 1];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) held[j] = read(j);
      const auto factor = [&](int64_t j) { return N > 0 ? held[j] : read(j); };
      const Vec<T> g = load(grad + c, part);
      Vec<T> all = g;
#pragma GCC unroll 4
      for (int64_t j = 0; j < count; ++j) all *= factor(j);
      sum += all;
#pragma GCC unroll 4
      for (int64_t i = 0; i < count; ++i) {
        if (!dfactors[i]) continue;
        Vec<T> d = g * scale;
#pragma GCC unroll 4
        for (int64_t j = 0; j < count; ++j)
          if (j != i) d *= factor(j);
        store(dfactors[i] + at, d, part);
      }
    });
    sums[r] += total(sum);
  }
}

template <class T>
void backward(T* const* dfactors, Acc<T>* sums, const T* grad, const Acc<T>* weight, const T* factors,
              int64_t stride, int64_t count, int64_t ranks, int64_t n) {
  const auto of = count == 2   ? backward_of<T, 2>
                  : count == 3 ? backward_of<T, 3>
                  : count == 4 ? backward_of<T, 4>
                               : backward_of<T, 0>;
  of(dfactors, sums, grad, weight, factors, stride, count, ranks, n);
}

template <class T>
constexpr LowrankKernels<T> kernels = {multiply<T>, backward<T>};

}  // namespace

MM_KERNELS_ENTRY(lowrank_kernels)
