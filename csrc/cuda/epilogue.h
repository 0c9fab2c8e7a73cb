// The epilogue of concat_linear, element by element: what a thread of the CUDA kernels does, and what a host
// compiler can run too, which is how it is tested where there is no GPU. Sums are made in float and in one
// order.
#pragma once

#include <cmath>

#include "types.h"

namespace mmfast {

enum class Activation : int32_t { none, relu, gelu, silu, swiglu };

constexpr int kProducts = 17;  // of 16 sources, and what is the same for all rows

// Rows of a tensor that is broadcast to the output: rows are counted through leading dimensions (.., n1, n2).
// There are fewer than 2^31 of them, and they are divided in 32 bits, which a GPU does several times faster
// than in 64.
struct Rows {
  const void* data;
  int64_t stride0, stride1, stride2;
};

// out = residual + tanh(gate) * activation(sum of products + bias); preact is what the activation saw.
//
// Under a norm the first num_centred products are those of sources that are broadcast: each of their rows was
// centred on its own mean m before it was multiplied, and stands for
// rstd (product + (m - mean) along), along being weight @ norm_weight; of an absent one, product = m = 0.
struct Forward {
  int64_t rows, width, n1, n2, per_sample, num_sources;
  int32_t num_products, num_centred;
  Rows products[kProducts];       // float, [.., width], for swiglu [.., 2 width]
  int64_t sources[kProducts];     // each product's column of present; -1: it is there for every row
  Rows means[kProducts];          // of the centred ones, float, [.., 1]
  const float* along[kProducts];  // [width], for swiglu [2 width]
  const float *mean, *rstd;       // [rows], of the output rows
  Activation activation;
  const bool* present;  // [rows / per_sample, num_sources]
  const void* bias;     // [width], for swiglu [2 width]
  const void* gate;     // at gate[column * gate_step]
  int64_t gate_step;
  Rows residual;
  void* out;     // [rows, width]
  void* preact;  // [rows, width], for swiglu [rows, 2 width]
};

// Sums over rows_each rows, one line of bias_sum and gate_sum for each part.
struct Backward {
  int64_t rows, width, rows_each;
  Activation activation;
  const void* grad;    // [rows, width]
  const void* preact;  // as in Forward; null: the gradient passes unchanged, and only bias_sum is made
  const void* gate;
  int64_t gate_step;
  void* grad_preact;  // like preact
  float* bias_sum;    // [parts, width], for swiglu [parts, 2 width]
  float* gate_sum;    // [parts, width]
};

MM_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::relu:
      return x <= 0.0f ? 0.0f : x;  // a NaN stays one
    case Activation::gelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case Activation::silu:
    case Activation::swiglu:
      return x / (1.0f + expf(-x));
    default:
      return x;
  }
}

MM_DEVICE float derivative(Activation activation, float x) {
  switch (activation) {
    case Activation::relu:
      return x <= 0.0f ? 0.0f : 1.0f;
    case Activation::gelu:
      return 0.5f * (1.0f + erff(x * 0.70710678118654752f)) + x * 0.39894228040143268f * expf(-0.5f * x * x);
    case Activation::silu:
    case Activation::swiglu: {
      const float s = 1.0f / (1.0f + expf(-x));
      return s * (1.0f + x * (1.0f - s));
    }
    default:
      return 1.0f;
  }
}

template <class T>
MM_DEVICE float at(const void* data, int64_t index) {
  return static_cast<float>(static_cast<const T*>(data)[index]);
}

template <class T>
MM_DEVICE void set(void* data, int64_t index, float value) {
  static_cast<T*>(data)[index] = static_cast<T>(value);
}

MM_DEVICE int64_t offset(const Rows& rows, int64_t n1, int64_t n2, int64_t row) {
  const auto r = static_cast<uint32_t>(row), m1 = static_cast<uint32_t>(n1), m2 = static_cast<uint32_t>(n2);
  return r / m2 / m1 * rows.stride0 + r / m2 % m1 * rows.stride1 + r % m2 * rows.stride2;
}

template <class T>
MM_DEVICE float before_activation(const Forward& f, int64_t row, int64_t column) {
  const int64_t sample = static_cast<uint32_t>(row) / static_cast<uint32_t>(f.per_sample);
  float sum = 0.0f;
  for (int i = 0; i < f.num_products; ++i) {
    const bool seen = !f.present || f.sources[i] < 0 || f.present[sample * f.num_sources + f.sources[i]];
    if (i < f.num_centred) {
      const float m = seen ? at<float>(f.means[i].data, offset(f.means[i], f.n1, f.n2, row)) : 0.0f;
      sum += (m - f.mean[row]) * f.along[i][column];
    }
    if (seen) sum += at<float>(f.products[i].data, offset(f.products[i], f.n1, f.n2, row) + column);
    if (i + 1 == f.num_centred) sum *= f.rstd[row];
  }
  return sum + (f.bias ? at<T>(f.bias, column) : 0.0f);
}

template <class T>
MM_DEVICE void forward_element(const Forward& f, int64_t row, int64_t column) {
  const bool halves = f.activation == Activation::swiglu;
  const int64_t line = row * f.width * (halves ? 2 : 1);
  const float a = before_activation<T>(f, row, column);
  if (f.preact) set<T>(f.preact, line + column, a);
  float y = activate(f.activation, a);
  if (halves) {
    const float b = before_activation<T>(f, row, f.width + column);
    if (f.preact) set<T>(f.preact, line + f.width + column, b);
    y *= b;
  }
  if (f.gate) y *= tanhf(at<T>(f.gate, column * f.gate_step));
  if (f.residual.data) y += at<T>(f.residual.data, offset(f.residual, f.n1, f.n2, row) + column);
  set<T>(f.out, row * f.width + column, y);
}

// One column of one part, row after row.
template <class T>
MM_DEVICE void backward_column(const Backward& b, int64_t part, int64_t column) {
  const bool halves = b.activation == Activation::swiglu;
  const int64_t height = b.width * (halves ? 2 : 1);
  const float scale = b.gate ? tanhf(at<T>(b.gate, column * b.gate_step)) : 1.0f;
  const int64_t begin = part * b.rows_each;
  const int64_t end = begin + b.rows_each < b.rows ? begin + b.rows_each : b.rows;
  float sum = 0.0f, sum2 = 0.0f, gate_sum = 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    float g = at<T>(b.grad, row * b.width + column);
    if (b.preact) {
      const int64_t line = row * height + column;
      const float x = at<T>(b.preact, line);
      const float other = halves ? at<T>(b.preact, line + b.width) : 1.0f;
      const float y = activate(b.activation, x);
      gate_sum += g * y * other;
      g *= scale;
      if (halves) {
        set<T>(b.grad_preact, line + b.width, g * y);
        sum2 += g * y;
      }
      g *= other * derivative(b.activation, x);
      set<T>(b.grad_preact, line, g);
    }
    sum += g;
  }
  b.bias_sum[part * height + column] = sum;
  if (halves) b.bias_sum[part * height + b.width + column] = sum2;
  if (b.gate) b.gate_sum[part * b.width + column] = gate_sum;
}

// Both return null, or what CUDA says against the launch.
const char* launch(const Forward& forward, Type type, void* stream);
const char* launch(const Backward& backward, Type type, void* stream);

}  // namespace mmfast
