// The sources of a concatenation: [..., D_i] tensors whose leading dimensions broadcast, some of them absent.
#pragma once

#include <cstring>
#include <optional>

#include "matrix.h"

namespace mmfast {

constexpr int64_t SHORT_RUN = 32;  // a GEMM on fewer rows costs more than packing them

// A run of a source's own rows at a fixed stride.
template <class T>
struct Run {
  int64_t first, count;
  const T* data;
};

template <class T>
struct Source {
  const T* data;
  int64_t depth, column;        // D_i and the first of its columns in the weight
  Shape sizes, strides;         // its own leading dimensions, 1 where it is broadcast
  int64_t rows;                 // of its own
  bool full;                    // a row of its own for each of the output's
  std::vector<char> present;    // [B]; empty: everywhere
  std::vector<int64_t> row_of;  // own row of each output row; empty when full

  int64_t row(int64_t r) const { return full ? r : row_of[r]; }
  bool in_batch(int64_t b) const { return present.empty() || present[b]; }
  bool always() const { return std::find(present.begin(), present.end(), 0) == present.end(); }
  // Does its presence differ between output rows that read the same row of its own?
  bool shared() const { return !always() && sizes[0] != static_cast<int64_t>(present.size()); }
  bool visible(int64_t own_row) const {
    if (present.empty()) return true;
    if (shared()) return std::find(present.begin(), present.end(), 1) != present.end();
    return rows == 0 || present[own_row / (rows / sizes[0])];
  }

  // The same rows with other, dense contents.
  Source with(const T* other, int64_t width) const {
    Source s = *this;
    s.data = other;
    s.depth = width;
    int64_t stride = width;
    for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d]) s.strides[d] = stride;
    return s;
  }

  // Stride of the rows in a run. The outer dimensions, 0 .. outer, are walked one by one.
  int64_t row_stride(size_t* outer = nullptr, int64_t* count = nullptr) const {
    int64_t stride = 0, run = 1;
    size_t d = sizes.size() - 1;
    for (; d > 0; --d) {
      if (sizes[d] == 1) continue;
      if (stride == 0 && run == 1)
        stride = strides[d];
      else if (strides[d] != stride * run)
        break;
      run *= sizes[d];
    }
    if (outer) *outer = d, *count = run;
    if (run > 1) return stride;
    return sizes[0] > 1 ? strides[0] : depth;
  }

  std::vector<Run<T>> runs() const {
    std::vector<Run<T>> out;
    if (rows == 0) return out;
    size_t outer;
    int64_t count;
    const int64_t stride = row_stride(&outer, &count);
    Shape index(outer + 1, 0);
    for (int64_t first = 0; first < rows; first += count) {
      if (visible(first)) {
        const T* p = data;
        for (size_t d = 0; d <= outer; ++d) p += index[d] * strides[d];
        if (!out.empty() && out.back().first + out.back().count == first &&
            out.back().data + out.back().count * stride == p)
          out.back().count += count;
        else
          out.push_back({first, count, p});
      }
      for (size_t d = outer + 1; d-- > 0 && ++index[d] == sizes[d];) index[d] = 0;
    }
    return out;
  }
};

// Where each own row lies; null where it is absent.
template <class T>
std::vector<const T*> row_pointers(const Source<T>& s) {
  std::vector<const T*> out(s.rows, nullptr);
  const int64_t stride = s.row_stride();
  for (const auto& run : s.runs())
    for (int64_t i = 0; i < run.count; ++i) out[run.first + i] = run.data + i * stride;
  return out;
}

inline Shape broadcast(const std::vector<Tensor>& tensors) {  // of the leading dimensions; at least one
  Shape lead(1, 1);
  for (const auto& t : tensors) {
    const auto sizes = t.sizes();
    const size_t rank = sizes.size() - 1;
    if (rank > lead.size()) lead.insert(lead.begin(), rank - lead.size(), 1);
    for (size_t d = 0; d < rank; ++d)
      if (int64_t& size = lead[lead.size() - rank + d]; size == 1) size = sizes[d];
  }
  return lead;
}

// `t` with a dense last dimension: itself, or a copy.
inline Tensor dense(const Tensor& t) {
  return t.dim() == 0 || t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1
             ? t
             : torch::stable::contiguous(t);
}

template <class T>
Source<T> source(const Tensor& t, int64_t column, const Shape& lead) {
  const size_t rank = t.dim() - 1, pad = lead.size() - rank;
  Source<T> s{static_cast<const T*>(t.data_ptr()), t.size(rank), column, Shape(lead.size(), 1),
              Shape(lead.size(), 0)};
  for (size_t d = 0; d < rank; ++d) s.sizes[pad + d] = t.size(d), s.strides[pad + d] = t.stride(d);
  s.rows = product(s.sizes);
  s.full = s.sizes == lead;
  if (!s.full) {
    s.row_of.resize(product(lead));
    Shape index(lead.size(), 0);
    for (auto& own : s.row_of) {
      own = 0;
      for (size_t d = 0; d < lead.size(); ++d) own = own * s.sizes[d] + (s.sizes[d] == 1 ? 0 : index[d]);
      for (size_t d = lead.size(); d-- > 0 && ++index[d] == lead[d];) index[d] = 0;
    }
  }
  return s;
}

// Rows of a source, ready for a GEMM: in place, or packed.
template <class T>
struct Block {
  Matrix<const T> x;
  int64_t first;        // own rows first .. first + x.rows when `rows` is null
  const int64_t* rows;  // else these own rows
};

// What is done to rows on the way into a block: (x - mean) * rstd * weight.
template <class T, class A = typename wide<T>::type>
struct Centring {
  const RowKernels<T>& kernels;
  const A *mean, *rstd;  // per own row; rstd null: 1
  const T* weight;       // of this source's columns, may be null
};

// Calls f(Block) for all visible rows. Long runs are used in place; short ones, and rows that have to be
// centred, are packed, at most `limit` at a time. `single` packs what would otherwise be more than one block.
template <class T, class F>
void each_block(const Source<T>& s, const Centring<T>* centring, bool single, F f) {
  const auto runs = s.runs();
  const int64_t stride = s.row_stride();
  int64_t total = 0;
  for (const auto& run : runs) total += run.count;
  if (total == 0) return;
  const bool short_runs = total < SHORT_RUN * static_cast<int64_t>(runs.size()) && runs.size() > 1;
  if (!centring && !short_runs && !(single && runs.size() > 1)) {
    for (const auto& run : runs) f(Block<T>{{run.data, run.count, s.depth, stride}, run.first, nullptr});
    return;
  }
  const int64_t limit = single ? total : std::min<int64_t>(total, 1024);
  Buffer<T> packed(limit, s.depth);
  std::vector<int64_t> rows;
  std::vector<const T*> from;
  auto flush = [&] {
    if (rows.empty()) return;
    parallel_rows(rows.size(), s.depth, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!centring)
          std::memcpy(packed.row(i), from[i], s.depth * sizeof(T));
        else
          centring->kernels.normalize(packed.row(i), from[i], centring->mean[rows[i]],
                                      centring->rstd ? centring->rstd[rows[i]] : 1, centring->weight,
                                      s.depth);
      }
    });
    const int64_t count = rows.size();
    const bool range = rows.back() - rows.front() == count - 1;
    f(Block<T>{{packed.data(), count, s.depth, s.depth}, rows.front(), range ? nullptr : rows.data()});
    rows.clear(), from.clear();
  };
  for (const auto& run : runs) {
    for (int64_t i = 0; i < run.count; ++i) {
      rows.push_back(run.first + i), from.push_back(run.data + i * stride);
      if (static_cast<int64_t>(rows.size()) == limit) flush();
    }
    if (!short_runs && !single) flush();
  }
  flush();
}

}  // namespace mmfast
