// Vectors of one instruction set, for the files of this folder. No torch header, and all of it in an unnamed
// namespace: each compiled copy keeps its own.
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "rows.h"

namespace {

using mmfast::bf16;

#if defined(MMFAST_ISA_avx512) || defined(MMFAST_ISA_avx512bf16) || defined(MMFAST_ISA_amx)
constexpr int BYTES = 64;
#elif defined(MMFAST_ISA_avx2)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

using Float = float __attribute__((vector_size(BYTES)));
using Int = int32_t __attribute__((vector_size(BYTES)));
using Uint = uint32_t __attribute__((vector_size(BYTES)));
using Half = uint16_t __attribute__((vector_size(BYTES / 2)));
using Double = double __attribute__((vector_size(BYTES)));
using Floats = float __attribute__((vector_size(BYTES / 2)));  // as many as Double has

template <class T>
struct Traits {
  using A = float;
  using V = Float;
};
template <>
struct Traits<float> {
  using A = float;
  using V = Float;
};
template <>
struct Traits<double> {
  using A = double;
  using V = Double;
};
template <class T>
using Vec = typename Traits<T>::V;
template <class T>
using Acc = typename Traits<T>::A;
template <class T>
using Sum = typename mmfast::exact_sum<T>::type;
template <class T>
constexpr int lanes = BYTES / sizeof(Acc<T>);

// Of a tile of sums: 6 x 4 vectors, 4 of the right-hand side and one of the left are 29 of AVX-512's 32
// registers. Others have 16: 6 x 2 + 2 + 1. For AMX see amx.h.
template <class T>
constexpr int TILE_ROWS = 6;
#ifdef __AMX_BF16__
template <>
constexpr int TILE_ROWS<bf16> = 32;
#endif
constexpr int TILE_VECTORS = BYTES == 64 ? 4 : 2;
template <class T>
constexpr int COLUMNS = TILE_VECTORS * lanes<T>;

template <class V, class T>
V bits(const T* p, int64_t count) {  // the rest of the vector is zero
  V v{};
  __builtin_memcpy(&v, p, count * sizeof(T));
  return v;
}

#ifdef __AVX512BW__
template <class T>
uint64_t bytes_of(int64_t count) {  // a bit for each byte of `count` elements, of which there is at least one
  return ~uint64_t{0} >> (64 - count * sizeof(T));
}
#endif

// The same by a masked load where there is one: a memcpy would go by way of memory and wait for it.
template <class V, class T>
V head(const T* p, int64_t count) {
#ifdef __AVX512BW__
  if constexpr (sizeof(V) == 64)
    return (V)_mm512_maskz_loadu_epi8(bytes_of<T>(count), p);
  else
    return (V)_mm256_maskz_loadu_epi8(static_cast<__mmask32>(bytes_of<T>(count)), p);
#else
#ifdef __AVX2__
  if constexpr (sizeof(V) == 32 && sizeof(T) >= 4) {
    const Int there = Int{0, 1, 2, 3, 4, 5, 6, 7} < Int{} + static_cast<int32_t>(count * sizeof(T) / 4);
    return (V)_mm256_maskload_epi32(reinterpret_cast<const int*>(p), (__m256i)there);
  }
#endif
  return bits<V>(p, count);
#endif
}
template <class V, class T>
void put_head(T* p, V v, int64_t count) {
#ifdef __AVX512BW__
  if constexpr (sizeof(V) == 64)
    _mm512_mask_storeu_epi8(p, bytes_of<T>(count), (__m512i)v);
  else
    _mm256_mask_storeu_epi8(p, static_cast<__mmask32>(bytes_of<T>(count)), (__m256i)v);
#else
  __builtin_memcpy(p, &v, count * sizeof(T));
#endif
}

#ifdef __AVX2__
// Past the caches, to whole vectors of memory; others see it after a fence.
void stream(void* p, Int v) {
#ifdef __AVX512F__
  _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#else
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
}
#endif

Float widen(Half h) {  // GCC makes five instructions of __builtin_convertvector where there is one
#if defined(__AVX512BW__)
  const Uint u = (Uint)_mm512_cvtepu16_epi32((__m256i)h);
#elif defined(__AVX2__)
  const Uint u = (Uint)_mm256_cvtepu16_epi32((__m128i)h);
#else
  const Uint u = __builtin_convertvector(h, Uint);
#endif
  return (Float)(u << 16);
}

Half narrow(Float x) {  // to nearest even; NaN stays NaN
#ifdef __AVX512BF16__
  return (Half)_mm512_cvtneps_pbh((__m512)x);
#else
  const Uint u = (Uint)x;
  const Uint rounded = u + 0x7fff + ((u >> 16) & 1);
  return __builtin_convertvector((x == x ? rounded : u | 0x400000) >> 16, Half);
#endif
}

Double widen(Floats x) {  // GCC converts each half by itself and puts them together
#if defined(__AVX512F__)
  return (Double)_mm512_cvtps_pd((__m256)x);
#elif defined(__AVX2__)
  return (Double)_mm256_cvtps_pd((__m128)x);
#else
  return __builtin_convertvector(x, Double);
#endif
}

Floats narrow(Double x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtpd_ps((__m512d)x);
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtpd_ps((__m256d)x);
#else
  return __builtin_convertvector(x, Floats);
#endif
}

// A whole vector, or the first `count` elements of one at the end of a row.
struct Whole {};
struct Part {
  int64_t count;
};

template <class T>
Vec<T> load(const T* p, Whole) {
  if constexpr (sizeof(T) == 2)
    return widen(bits<Half>(p, BYTES / 4));
  else
    return bits<Vec<T>>(p, lanes<T>);
}
template <class T>
Vec<T> load(const T* p, Part part) {
  if constexpr (sizeof(T) == 2)
    return widen(head<Half>(p, part.count));
  else
    return head<Vec<T>>(p, part.count);
}
template <class T>
void store(T* p, Vec<T> v, Whole) {
  if constexpr (sizeof(T) == 2) {
    const Half h = narrow(v);
    __builtin_memcpy(p, &h, sizeof(h));
  } else {
    __builtin_memcpy(p, &v, sizeof(v));
  }
}
template <class T>
void store(T* p, Vec<T> v, Part part) {
  if constexpr (sizeof(T) == 2)
    put_head(p, narrow(v), part.count);
  else
    put_head(p, v, part.count);
}

// f(first, Whole or Part) over a row of n
template <class T, class F>
void sweep(int64_t n, F f) {
  int64_t c = 0;
  for (; c + lanes<T> <= n; c += lanes<T>) f(c, Whole{});
  if (c < n) f(c, Part{n - c});
}

// f of each lane, where there is no vector instruction for it
template <class F>
Double each(Double x, F f) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = f(x[i]);
  return x;
}

using Lines = Uint[lanes<float>];

// Rows become columns, in registers.
__attribute__((always_inline)) inline void transpose(Lines& rows) {
  Lines next;
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Pairs of rows are interleaved, and pairs of those, within the halves of a vector: to cross them takes a
  // second instruction each time.
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    next[i] = __builtin_shuffle(rows[i], rows[i + 1], Uint{0, 8, 1, 9, 4, 12, 5, 13});
    next[i + 1] = __builtin_shuffle(rows[i], rows[i + 1], Uint{2, 10, 3, 11, 6, 14, 7, 15});
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int from = i / 2 * 4 + i % 2, to = i / 2 * 4 + i % 2 * 2;
    rows[to] = __builtin_shuffle(next[from], next[from + 2], Uint{0, 1, 8, 9, 4, 5, 12, 13});
    rows[to + 1] = __builtin_shuffle(next[from], next[from + 2], Uint{2, 3, 10, 11, 6, 7, 14, 15});
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    next[i] = __builtin_shuffle(rows[i], rows[i + 4], Uint{0, 1, 2, 3, 8, 9, 10, 11});
    next[i + 4] = __builtin_shuffle(rows[i], rows[i + 4], Uint{4, 5, 6, 7, 12, 13, 14, 15});
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) rows[i] = next[i];
#else
  // Interleaving the halves of the list turns the index's bits by one place each time.
  constexpr int L = lanes<float>;
  Uint low{}, high{};
  for (int i = 0; i < L; ++i) {
    low[i] = i / 2 + i % 2 * L;
    high[i] = low[i] + L / 2;
  }
  for (int bit = 1; bit < L; bit *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
#endif
}

template <class V>
auto total(V v) {
  auto sum = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(v[0]); ++i) sum += v[i];
  return sum;
}

}  // namespace
