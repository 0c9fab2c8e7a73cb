// Exponentials and maxima of vectors, for the files of this folder that make a softmax. In an unnamed
// namespace as vectors.h is.
#pragma once

#include "vectors.h"

namespace {

// The second where either is nan.
template <class V>
V larger(V x, V y) {
#ifdef __AVX512F__
  if constexpr (__is_same(V, Float)) return _mm512_max_ps(x, y);
#endif
  return x > y ? x : y;
}

// 2^x = 2^n p(x - n), n the whole number below, and p the polynomial with p(0) = 1 that has the least
// relative error: 2e-9, for bfloat16 9e-5. nan stays nan. Without AVX-512 what is below 2^-126 becomes that.
template <class T>
Vec<T> exp2(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return each(x, [](double v) { return __builtin_exp2(v); });
  } else {
    constexpr float fine[] = {0.693147063f,   0.240229309f,   0.0554852821f,
                              0.00967545155f, 0.00124678458f, 0.000216129192f};
    constexpr float rough[] = {0.695116818f, 0.227644965f, 0.0770670697f};
#ifdef __AVX512F__
    const Float f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // of -inf it is 0
#else
    x = larger(Float{} - 126.f, x);
    const Float shifted = x - 0.5f + 12582912.f,
                f = x - (shifted - 12582912.f);  // 1.5 * 2^23: its last bits are n
#endif
    Float p = Float{} + (sizeof(T) == 2 ? rough[2] : fine[5]);
    for (int i = sizeof(T) == 2 ? 2 : 5; i-- > 0;) p = p * f + (sizeof(T) == 2 ? rough[i] : fine[i]);
    p = p * f + 1.f;
#ifdef __AVX512F__
    return _mm512_scalef_ps(p, x);  // takes n of x itself
#else
    return p * (Float)(((Uint)shifted << 23) + (127 << 23));  // lanes that nobody asked for may overflow
#endif
  }
}

template <class V>
bool any(V truth) {
#ifdef __AVX512BW__
  return _mm512_movepi8_mask((__m512i)truth) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)truth) != 0;
#else
  bool found = false;
  for (unsigned i = 0; i < sizeof(V) / sizeof(truth[0]); ++i) found |= truth[i] != 0;
  return found;
#endif
}

template <class V>
auto largest(V v) {
  auto most = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// By how much the maximum of an online softmax may lag: 2^12 is far from overflow, and to rescale seldom is
// cheaper than to know the maximum.
constexpr int SLACK = 12;

// Which elements of a row the lanes of its vector v are.
template <class T>
auto elements(int v) {
  decltype(Vec<T>{} < Vec<T>{}) at;
  for (int i = 0; i < lanes<T>; ++i) at[i] = v * lanes<T> + i;
  return at;
}
// Which lanes of vector v are among the first `count` elements.
template <class T>
auto among(int v, int64_t count) {
  const auto at = elements<T>(v);
  return at < static_cast<decltype(at[0] + 0)>(count);
}

}  // namespace
