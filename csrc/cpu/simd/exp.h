// exp in the vectors of one instruction set.
#pragma once

#include "vectors.h"

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

template <class F>
Double each(Double x, F f) {
  for (unsigned i = 0; i < sizeof(Double) / sizeof(double); ++i) x[i] = f(x[i]);
  return x;
}
Double exp(Double x) {
  return each(x, [](double v) { return __builtin_exp(v); });
}

}  // namespace
