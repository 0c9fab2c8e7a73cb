// Activations and their slopes in the vectors of one instruction set: see vectors.h.
#pragma once

#include "vectors.h"

namespace {

using mmfast::Activation;

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

// What bfloat16 takes a function of x >= 0 that fades away to be: a cubic for each quarter around 0, 1/4 ...
// 7.5, through the Chebyshev nodes, and nothing above: off by 4e-6 at most, Phi(-x) by 5e-4 of it up to 4,
// 1e-2 up to 7.6. Coefficients [power][quarter], of the distance from the middle in quarters.
struct Cubics {
  float of[4][32];
};

template <class F>
constexpr Cubics cubics(F f) {
  constexpr double p = 0.19134171618254489, q = 0.46193976625564337;  // cos(3 pi / 8) / 2, cos(pi / 8) / 2
  Cubics all{};
  for (int i = 0; i < 31; ++i) {
    const double a = f((i + p) / 4), b = f((i - p) / 4), c = f((i + q) / 4), d = f((i - q) / 4);
    const double even = (c + d - a - b) / 2 / (q * q - p * p);
    const double odd = ((c - d) / q - (a - b) / p) / 2 / (q * q - p * p);
    all.of[0][i] = static_cast<float>((a + b) / 2 - even * p * p);
    all.of[1][i] = static_cast<float>((a - b) / (2 * p) - odd * p * p);
    all.of[2][i] = static_cast<float>(even);
    all.of[3][i] = static_cast<float>(odd);
  }
  return all;
}

constexpr double normal_tail(double x) { return 0.5 * __builtin_erfc(x * 0.70710678118654752); }
constexpr double normal_density(double x) { return 0.39894228040143268 * __builtin_exp(x * x * -0.5); }
constexpr Cubics TAILS = cubics(normal_tail);
constexpr Cubics SLOPES = cubics([](double x) { return normal_tail(x) - x * normal_density(x); });

template <class T>
constexpr bool HAS_CUBICS = sizeof(T) == 2 && lanes<float> == 16;

// f(x) = 1 - f(-x), from the cubics of f(-|x|). Two registers hold a power's coefficients; the five lowest
// bits of |4 x| + 1.5 * 2^23 say which of them. NaN stays NaN, infinity takes the limit.
template <class T>
Vec<T> by_cubics(const Cubics& cubics, Vec<T> x) {
  static_assert(HAS_CUBICS<T>);
  Float quarters = (Float)((Int)x & 0x7fffffff) * 4.f;
  quarters = quarters > 31.f ? Float{} + 31.f : quarters;
  const Float rounded = quarters + 12582912.f, distance = quarters - (rounded - 12582912.f);
  const auto coefficient = [&](int power) {
    const float* const all = cubics.of[power];
    return __builtin_shuffle(load(all, Whole{}), load(all + 16, Whole{}), (Int)rounded);
  };
  Float below = coefficient(3);
  for (int power = 3; power-- > 0;) below = below * distance + coefficient(power);
  return x < 0 ? below : 1.f - below;
}

template <class V>
struct Normal {
  V cdf, bell;  // Phi(x), exp(-x^2 / 2)
};

// By its tail: Phi(-|x|) = exp(-x^2 / 2) R(u), u = 1 / (1 + 0.275 |x|). R is a polynomial with the least
// relative error for x from 0 to 40: 6e-8.
template <class T>
Normal<Vec<T>> normal(Vec<T> x) {
  if constexpr (sizeof(T) == 8) {
    return {each(x, [](double v) { return normal_tail(-v); }), exp(x * x * -0.5)};
  } else {
    constexpr float R[] = {0.109710686f,   0.109654367f, 0.102190353f,  0.0789365023f, 0.0880057290f,
                           -0.0351589993f, 0.130167380f, -0.110673539f, 0.0271675214f};
    const Float size = x < 0 ? -x : x, u = 1.f / (1.f + 0.275f * size);
    Float r{};
    for (int i = 9; i-- > 0;) r = (r + R[i]) * u;
    const Float bell = exp(x * x * -0.5f), tail = bell * r;
    return {x < 0 ? tail : 1.f - tail, bell};
  }
}

template <class T>
Vec<T> normal_cdf(Vec<T> x) {
  if constexpr (HAS_CUBICS<T>)
    return by_cubics<T>(TAILS, x);
  else
    return normal<T>(x).cdf;
}

template <class T>
Vec<T> gelu_slope(Vec<T> x) {
  if constexpr (HAS_CUBICS<T>) {
    return by_cubics<T>(SLOPES, x);
  } else {
    const auto [cdf, bell] = normal<T>(x);
    return cdf + x * bell * Acc<T>(0.39894228040143268);
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
      return x * normal_cdf<T>(x);
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
    case Activation::gelu:
      return gelu_slope<T>(x);
    case Activation::silu:
    case Activation::swiglu:
      return sigmoid(x) * (1 + x * (1 - sigmoid(x)));
    default:
      return V{} + 1;
  }
}

}  // namespace
