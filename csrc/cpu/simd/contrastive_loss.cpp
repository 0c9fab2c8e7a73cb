// See contrastive_loss.h. No torch header and no linkage but MM_KERNELS_ENTRY: see dispatch.h.
#include "contrastive_loss.h"

#include "exponentials.h"

using mmfast::ContrastiveKernels, mmfast::LOG2_E;

namespace {

template <class T>
constexpr int ROWS = TILE_ROWS<T>;
constexpr int VECTORS = TILE_VECTORS;

template <class T>
Vec<T> at(const Acc<T>* s, int64_t i, int v) {
  return bits<Vec<T>>(s + i * COLUMNS<T> + v * lanes<T>, lanes<T>);
}

// Logits in units of ln 2, rounded alike everywhere. Without the maximum, which changes nothing, the compiler
// may fuse the product with what is then subtracted from it, here and not there: weights near 1 would not
// reach 1.
template <class T>
Vec<T> logits(Vec<T> s, Acc<T> scale) {
  return larger(Vec<T>{} - (sizeof(Acc<T>) == 8 ? Acc<T>(0x1p1023) : Acc<T>(0x1p127)), s * scale);
}

// Which lanes of vector v are column `own`.
template <class T>
auto is_own(int v, int64_t own) {
  const auto column = elements<T>(v);
  return column == static_cast<decltype(column[0] + 0)>(own);
}
// x, 0 in the columns that do not count.
template <class T, bool WHOLE>
Vec<T> counted(Vec<T> x, int v, int64_t columns) {
  if constexpr (!WHOLE) x = among<T>(v, columns) ? x : Vec<T>{};
  return x;
}
template <class T>
bool holds_own(int64_t own, int64_t rows) {
  return own > -rows && own < COLUMNS<T>;
}

// 2^x for a tile's weights. An own pair's slope is its weight less 1, and may be smaller than what bfloat16's
// polynomial is off by: where there are own pairs it is float32's.
template <class T, bool OWN>
Vec<T> power(Vec<T> x) {
  if constexpr (OWN)
    return exp2<Acc<T>>(x);
  else
    return exp2<T>(x);
}

template <class T, bool WHOLE, bool OWN>
void softmax_of(const Acc<T>* s, int64_t some_rows, int64_t columns, Acc<T> scale, Acc<T>* row_max,
                Acc<T>* row_sum, Acc<T>* column_max, Acc<T>* column_sum) {
  using V = Vec<T>;
  const int64_t rows = WHOLE ? ROWS<T> : some_rows;
#pragma GCC unroll 6
  for (int64_t i = 0; i < rows; ++i) {
    V x[VECTORS], most = V{} + row_max[i], sum = bits<V>(row_sum + i * lanes<T>, lanes<T>);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      x[v] = logits<T>(at<T>(s, i, v), scale);
      if (!WHOLE) x[v] = among<T>(v, columns) ? x[v] : V{} + row_max[i];
      most = larger(x[v], most);
    }
    if (__builtin_expect(any(most > row_max[i] + SLACK), 0)) {
      const Acc<T> now = largest(most);
      sum *= exp2<T>(V{} + (row_max[i] - now));
      row_max[i] = now;
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      sum += counted<T, WHOLE>(power<T, OWN>(x[v] - row_max[i]), v, columns);
    }
    __builtin_memcpy(row_sum + i * lanes<T>, &sum, BYTES);
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    V x[ROWS<T>], max = bits<V>(column_max + v * lanes<T>, lanes<T>), most = max;
    V sum = bits<V>(column_sum + v * lanes<T>, lanes<T>);
#pragma GCC unroll 6
    for (int64_t i = 0; i < rows; ++i) {
      x[i] = logits<T>(at<T>(s, i, v), scale);
      most = larger(x[i], most);
    }
    if (__builtin_expect(any(most > max + SLACK), 0)) {
      sum *= exp2<T>(max - most);
      max = most;
      __builtin_memcpy(column_max + v * lanes<T>, &max, BYTES);
    }
#pragma GCC unroll 6
    for (int64_t i = 0; i < rows; ++i) sum += power<T, OWN>(x[i] - max);
    __builtin_memcpy(column_sum + v * lanes<T>, &sum, BYTES);
  }
}

template <class T>
void softmax(const Acc<T>* s, int64_t rows, int64_t columns, Acc<T> scale, int64_t own, Acc<T>* row_max,
             Acc<T>* row_sum, Acc<T>* column_max, Acc<T>* column_sum) {
  const auto of = holds_own<T>(own, rows)                    ? softmax_of<T, false, true>
                  : rows == ROWS<T> && columns == COLUMNS<T> ? softmax_of<T, true, false>
                                                             : softmax_of<T, false, false>;
  of(s, rows, columns, scale, row_max, row_sum, column_max, column_sum);
}

// log(1 + u) for u from 0 to 1: u times the polynomial with the least relative error, 5e-9, for bfloat16
// 6e-5.
template <class T>
Vec<T> log1p(Vec<T> u) {
  if constexpr (sizeof(T) == 8) {
    return each(u, [](double v) { return __builtin_log1p(v); });
  } else {
    constexpr float fine[] = {1.f,           -0.499999017f, 0.333299637f,   -0.249541342f, 0.196759388f,
                              -0.153055921f, 0.106036551f,  -0.0569595322f, 0.0198514629f, -0.00324402517f};
    constexpr float rough[] = {0.999943256f, -0.496977806f, 0.306300938f, -0.157427207f, 0.0413473025f};
    constexpr int degree = sizeof(T) == 2 ? 4 : 9;
    Float p = Float{} + (sizeof(T) == 2 ? rough[4] : fine[9]);
    for (int i = degree; i-- > 0;) p = p * u + (sizeof(T) == 2 ? rough[i] : fine[i]);
    return p * u;
  }
}

template <class T>
Vec<T> softplus(Vec<T> x) {
  return larger(Vec<T>{}, x) + log1p<T>(exp2<T>((x < 0 ? x : -x) * LOG2_E<Acc<T>>));
}

template <class T>
Vec<T> sigmoid(Vec<T> x) {  // 2^126 is as good as infinity
  return 1 / (1 + exp2<T>(-larger(Vec<T>{} - 126, x * LOG2_E<Acc<T>>)));
}

template <class T, bool WHOLE, bool OWN>
Acc<T> sigmoid_of(const Acc<T>* s, int64_t some_rows, int64_t columns, Acc<T> scale, Acc<T> bias,
                  int64_t own) {
  using V = Vec<T>;
  const int64_t rows = WHOLE ? ROWS<T> : some_rows;
  V sum{};
#pragma GCC unroll 6
  for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      V x = at<T>(s, i, v) * scale + bias;
      if (OWN) x = is_own<T>(v, own + i) ? -x : x;
      sum += counted<T, WHOLE>(softplus<T>(x), v, columns);
    }
  return total(sum);
}

template <class T>
Acc<T> sigmoid(const Acc<T>* s, int64_t rows, int64_t columns, Acc<T> scale, Acc<T> bias, int64_t own) {
  const auto of = holds_own<T>(own, rows)                    ? sigmoid_of<T, false, true>
                  : rows == ROWS<T> && columns == COLUMNS<T> ? sigmoid_of<T, true, false>
                                                             : sigmoid_of<T, false, false>;
  return of(s, rows, columns, scale, bias, own);
}

// slope(s, i, v) of each vector of the tile, stored and added up.
template <class T, bool WHOLE, class F>
__attribute__((always_inline)) inline void slopes(T* g, int64_t stride, const Acc<T>* s, int64_t some_rows,
                                                  int64_t columns, Acc<T> factor, double* sums, F slope) {
  using V = Vec<T>;
  const int64_t rows = WHOLE ? ROWS<T> : some_rows;
  V weighted{}, all{};
#pragma GCC unroll 6
  for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const V x = at<T>(s, i, v), d = slope(x, i, v);
      store(g + i * stride + v * lanes<T>, d * factor, Whole{});
      weighted += counted<T, WHOLE>(d * x, v, columns);
      all += counted<T, WHOLE>(d, v, columns);
    }
  sums[0] += total(weighted);
  sums[1] += total(all);
}

template <class T, bool WHOLE, bool OWN>
void softmax_backward_of(T* g, int64_t stride, const Acc<T>* s, int64_t rows, int64_t columns, Acc<T> scale,
                         const Acc<T>* const* row_lse, const Acc<T>* const* column_lse, int64_t own,
                         Acc<T> factor, double* sums) {
  using V = Vec<T>;
  V lse[VECTORS], rest[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    lse[v] = bits<V>(column_lse[0] + v * lanes<T>, lanes<T>);
    rest[v] = bits<V>(column_lse[1] + v * lanes<T>, lanes<T>);
  }
  slopes<T, WHOLE>(g, stride, s, rows, columns, factor, sums, [&](V product, int64_t i, int v) {
    const V x = logits<T>(product, scale);
    V d = power<T, OWN>(x - row_lse[0][i] - row_lse[1][i]) + power<T, OWN>(x - lse[v] - rest[v]);
    d *= Acc<T>(0.5);
    if constexpr (OWN) d = is_own<T>(v, own + i) ? d - 1 : d;
    return d;
  });
}

template <class T>
void softmax_backward(T* g, int64_t stride, const Acc<T>* s, int64_t rows, int64_t columns, Acc<T> scale,
                      const Acc<T>* const* row_lse, const Acc<T>* const* column_lse, int64_t own,
                      Acc<T> factor, double* sums) {
  const auto of = holds_own<T>(own, rows)                    ? softmax_backward_of<T, false, true>
                  : rows == ROWS<T> && columns == COLUMNS<T> ? softmax_backward_of<T, true, false>
                                                             : softmax_backward_of<T, false, false>;
  of(g, stride, s, rows, columns, scale, row_lse, column_lse, own, factor, sums);
}

template <class T, bool WHOLE, bool OWN>
void sigmoid_backward_of(T* g, int64_t stride, const Acc<T>* s, int64_t rows, int64_t columns, Acc<T> scale,
                         Acc<T> bias, int64_t own, Acc<T> factor, double* sums) {
  using V = Vec<T>;
  slopes<T, WHOLE>(g, stride, s, rows, columns, factor, sums, [&](V x, int64_t i, int v) {
    x = x * scale + bias;
    if constexpr (OWN) {
      const auto mine = is_own<T>(v, own + i);
      const V d = sigmoid<T>(mine ? -x : x);
      return mine ? -d : d;
    } else {
      return sigmoid<T>(x);
    }
  });
}

template <class T>
void sigmoid_backward(T* g, int64_t stride, const Acc<T>* s, int64_t rows, int64_t columns, Acc<T> scale,
                      Acc<T> bias, int64_t own, Acc<T> factor, double* sums) {
  const auto of = holds_own<T>(own, rows)                    ? sigmoid_backward_of<T, false, true>
                  : rows == ROWS<T> && columns == COLUMNS<T> ? sigmoid_backward_of<T, true, false>
                                                             : sigmoid_backward_of<T, false, false>;
  of(g, stride, s, rows, columns, scale, bias, own, factor, sums);
}

float joined(bf16 upper, uint8_t lower) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(upper.bits) << 16 | lower << 8);
}

void add_to_split(bf16* const* upper, uint8_t* const* lower, const float* more, int64_t rows,
                  int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* __restrict const x = more + i * COLUMNS<bf16>;
    bf16* __restrict const high = upper[i];
    uint8_t* __restrict const low = lower[i];
    for (int64_t c = 0; c < columns; ++c) {
      // To the nearest. No nan becomes a number: what makes one here leaves its last bits 0.
      const auto bits = __builtin_bit_cast(uint32_t, joined(high[c], low[c]) + x[c]) + 0x80;
      high[c].bits = bits >> 16;
      low[c] = bits >> 8;
    }
  }
}

void join_split(float* to, const bf16* upper, const uint8_t* lower, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = joined(upper[i], lower[i]);
}

template <class T>
constexpr ContrastiveKernels<T> kernels = {
    lanes<T>, softmax<T>, sigmoid<T>, softmax_backward<T>, sigmoid_backward<T>, nullptr, nullptr};
template <>
constexpr ContrastiveKernels<bf16> kernels<bf16> = {
    lanes<bf16>,  softmax<bf16>, sigmoid<bf16>, softmax_backward<bf16>, sigmoid_backward<bf16>,
    add_to_split, join_split};

}  // namespace

MM_KERNELS_ENTRY(contrastive_kernels)
