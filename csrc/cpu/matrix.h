// Matrices on memory that somebody else owns, and work for several threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "memory.h"

namespace mmfast {

template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride;

  Matrix columns_from(int64_t first, int64_t count) const { return {data + first, rows, count, row_stride}; }
  T* row(int64_t r) const { return data + r * row_stride; }
};

// f(begin, end) over rows of `width` elements, in parts that are worth a thread
template <class F>
void parallel_rows(int64_t rows, int64_t width, const F& f) {
  if (rows > 0)
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(width, 1)), f);
}

}  // namespace mmfast
