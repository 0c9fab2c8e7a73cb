// See attention.h. No torch header and no linkage but MM_KERNELS_ENTRY: see dispatch.h.
#include "attention.h"

#include "exponentials.h"

using mmfast::AttentionKernels;

namespace {

// Of a block. With AMX a tile's sums are in registers for a short time only: larger blocks load and store
// them less often.
template <class T>
constexpr int KEYS = 64;
#ifdef __AMX_BF16__
template <>
constexpr int KEYS<bf16> = 128;
#endif

// Vector v of a tile's row, which goes on in the next panel.
template <class T>
Vec<T> part(const Acc<T>* row, int v) {
  const Acc<T>* const panel = row + v / TILE_VECTORS * TILE_ROWS<T> * COLUMNS<T>;
  return bits<Vec<T>>(panel + v % TILE_VECTORS * lanes<T>, lanes<T>);
}

// Where a row sees no more than the first half of a block, the other half becomes zeros without a look at it.
template <class T>
constexpr int HALF = KEYS<T> / 2;

template <class T>
constexpr bool fits =
    KEYS<T> <= AttentionKernels<T>::MOST_KEYS && KEYS<T> % COLUMNS<T> == 0 && HALF<T> % (2 * lanes<T>) == 0;
static_assert(fits<float> && fits<double> && fits<bf16>);

template <class T, int N>
void store_all(T* p, const Vec<T> (&x)[N]) {
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == 2) {  // two at a time cost as much as one
#pragma GCC unroll 16
    for (int v = 0; v < N; v += 2) {
      const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)x[v + 1], (__m512)x[v]);
      __builtin_memcpy(p + v * lanes<T>, &pair, BYTES);
    }
    return;
  }
#endif
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) store(p + v * lanes<T>, x[v], Whole{});
}

template <class T, int WIDTH, bool WHOLE>
__attribute__((always_inline)) inline Acc<T> softmax_of(T* p, const Acc<T>* s, int64_t count, Acc<T> scale,
                                                        Acc<T> bias, Acc<T>* max, Acc<T>* sum) {
  using V = Vec<T>;
  constexpr int N = WIDTH / lanes<T>;
  V x[N];
  const V none = V{} - __builtin_inf();
  const Acc<T> before = *max;
  const V limit = V{} + (before + SLACK);
  V most = none;
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) {
    x[v] = part<T>(s, v);
    if (!WHOLE) x[v] = among<T>(v, count) ? x[v] : none;
    most = larger(x[v], most);
  }
  most = most * scale + bias;  // still the largest, since scale >= 0
  Acc<T> factor = 1;
  if (__builtin_expect(any(most > limit), 0)) {
    *max = largest(most);
    factor = before == -__builtin_inf() ? 0 : exp2<T>(V{} + (before - *max))[0];
  }
  V total = bits<V>(sum, lanes<T>) * factor;
  const Acc<T> shift = bias - *max;
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) {
    x[v] = exp2<T>(x[v] * scale + shift);
    if (!WHOLE) x[v] = among<T>(v, count) ? x[v] : V{};
    total += x[v];
  }
  store_all(p, x);
  __builtin_memset(p + WIDTH, 0, (KEYS<T> - WIDTH) * sizeof(T));
  __builtin_memcpy(sum, &total, BYTES);
  return factor;
}

template <class T>
void softmax(T* p, const Acc<T>* s, int64_t rows, const int64_t* row, const int64_t* keys, Acc<T> scale,
             const Acc<T>* bias, Acc<T>* max, Acc<T>* sum, Acc<T>* factor) {
  for (int64_t i = 0; i < rows; ++i, p += KEYS<T>, s += COLUMNS<T>) {
    const int64_t r = row[i];
    const auto of = [&]<int WIDTH, bool WHOLE>() {
      return softmax_of<T, WIDTH, WHOLE>(p, s, keys[i], scale, bias[r], max + r, sum + r * lanes<T>);
    };
    factor[i] = keys[i] == KEYS<T>   ? of.template operator()<KEYS<T>, true>()
                : keys[i] > HALF<T>  ? of.template operator()<KEYS<T>, false>()
                : keys[i] == HALF<T> ? of.template operator()<HALF<T>, true>()
                                     : of.template operator()<HALF<T>, false>();
  }
}

template <class T, int WIDTH, bool WHOLE, bool ALONE>
void softmax_backward_of(T* p, T* ds, const Acc<T>* s, const Acc<T>* dp, int64_t count, Acc<T> scale,
                         Acc<T> shift, Acc<T> inverse, Acc<T> delta, Acc<T>* sums) {
  using V = Vec<T>;
  constexpr int N = WIDTH / lanes<T>;
  V e[N], total_p{}, total_ds{}, mean{};
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) {
    e[v] = exp2<T>(part<T>(s, v) * scale + shift) * inverse;
    if (!WHOLE) e[v] = among<T>(v, count) ? e[v] : V{};
    total_p += e[v];
  }
  if (ALONE) {
    const V whole = V{} + total(total_p);
#pragma GCC unroll 16
    for (int v = 0; v < N; ++v) {
      e[v] /= whole;
      const V weighted = e[v] * part<T>(dp, v);
      mean += among<T>(v, count) ? weighted : V{};
    }
    mean = V{} + total(mean);
  }
#pragma GCC unroll 16
  for (int v = 0; v < N; ++v) {
    const V dx = part<T>(dp, v);
    V d = e[v] * (ALONE ? dx - mean - delta : dx - delta);
    if (!WHOLE) d = among<T>(v, count) ? d : V{};
    store(p + v * lanes<T>, e[v], Whole{});
    store(ds + v * lanes<T>, d, Whole{});
    total_ds += d;
  }
  __builtin_memset(p + WIDTH, 0, (KEYS<T> - WIDTH) * sizeof(T));
  __builtin_memset(ds + WIDTH, 0, (KEYS<T> - WIDTH) * sizeof(T));
  if (sums) sums[0] += total(total_ds), sums[1] += total(total_p);
}

template <class T>
void softmax_backward(T* p, T* ds, const Acc<T>* s, const Acc<T>* dp, int64_t count, Acc<T> scale,
                      Acc<T> bias, Acc<T> max, Acc<T> inverse, Acc<T> delta, bool alone, Acc<T>* sums) {
  constexpr int all = KEYS<T>, half = HALF<T>;
  const auto of = alone && count > half ? softmax_backward_of<T, all, false, true>
                  : alone               ? softmax_backward_of<T, half, false, true>
                  : count == all        ? softmax_backward_of<T, all, true, false>
                  : count > half        ? softmax_backward_of<T, all, false, false>
                  : count == half       ? softmax_backward_of<T, half, true, false>
                                        : softmax_backward_of<T, half, false, false>;
  of(p, ds, s, dp, count, scale, bias - max, inverse, delta, sums);
}

template <class A>
void scale(A* x, A factor, int64_t n) {
  sweep<A>(n, [&](int64_t c, auto part) { store(x + c, load(x + c, part) * factor, part); });
}

template <class T>
constexpr AttentionKernels<T> kernels = {KEYS<T>, lanes<T>, softmax<T>, softmax_backward<T>, scale<Acc<T>>};

}  // namespace

MM_KERNELS_ENTRY(attention_kernels)
