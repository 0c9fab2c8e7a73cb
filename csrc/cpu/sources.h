// The sources of a concatenation: [..., D_i] tensors whose leading dimensions broadcast, some of them absent.
#pragma once

#include "tiles.h"

namespace mmfast {

template <class T>
struct Source {
  const T* data;
  int64_t depth, column;        // D_i and the first of its columns in the weight
  Shape sizes, strides;         // its own leading dimensions, 1 where it is broadcast
  int64_t rows;                 // of its own
  bool full;                    // a row of its own for each of the output's
  std::vector<char> present;    // [B]; empty: everywhere
  bool anywhere = true;         // is any of them 1? every row asks
  std::vector<int64_t> row_of;  // own row of each output row; empty when full

  int64_t row(int64_t r) const { return full ? r : row_of[r]; }
  bool in_batch(int64_t b) const { return always() || present[b]; }
  bool always() const { return present.empty(); }
  void set_present(std::vector<char> flags) {
    const auto have = std::count(flags.begin(), flags.end(), 1);
    anywhere = have > 0;
    if (have < static_cast<int64_t>(flags.size())) present = std::move(flags);
  }
  // Does its presence differ between output rows that read the same row of its own?
  bool shared() const { return !always() && sizes[0] != static_cast<int64_t>(present.size()); }
  bool visible(int64_t own_row) const {
    if (always()) return true;
    if (shared()) return anywhere;
    return rows == 0 || present[own_row / (rows / sizes[0])];
  }
};

// Where each own row lies; null where it is absent.
template <class T>
Rows<T> row_pointers(const Source<T>& s) {
  Rows<T> out(s.rows, nullptr);
  Shape index(s.sizes.size(), 0);
  const size_t last = s.sizes.size() - 1;
  for (int64_t first = 0; first < s.rows; first += s.sizes[last]) {
    const T* p = s.data;
    for (size_t d = 0; d < last; ++d) p += index[d] * s.strides[d];
    const bool of_one_sample = last > 0;  // the rows of a run
    if (!of_one_sample || s.visible(first))
      for (int64_t i = 0; i < s.sizes[last]; ++i)
        if (of_one_sample || s.visible(i)) out[first + i] = p + i * s.strides[last];
    for (size_t d = last; d-- > 0 && ++index[d] == s.sizes[d];) index[d] = 0;
  }
  return out;
}

inline Shape broadcast(const Tensors& tensors) {  // of the leading dimensions; at least one
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

// [*lead, *last] as PyTorch has it: without leading dimensions where no tensor has any.
inline Shape output_shape(const Tensors& tensors, const Shape& lead, std::initializer_list<int64_t> last) {
  const auto has_none = [](const Tensor& t) { return t.dim() == 1; };
  Shape out = std::all_of(tensors.begin(), tensors.end(), has_none) ? Shape() : lead;
  out.insert(out.end(), last);
  return out;
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
    const size_t last = lead.size() - 1;
    const int64_t step = s.sizes[last] == 1 ? 0 : 1;
    for (auto row = s.row_of.begin(); row != s.row_of.end(); row += lead[last]) {
      int64_t own = 0;
      for (size_t d = 0; d <= last; ++d) own = own * s.sizes[d] + (s.sizes[d] == 1 ? 0 : index[d]);
      for (int64_t i = 0; i < lead[last]; ++i) row[i] = own + i * step;
      for (size_t d = last; d-- > 0 && ++index[d] == lead[d];) index[d] = 0;
    }
  }
  return s;
}

// The same with a row for each of the output's, some of which are the same one of the tensor's.
template <class T>
Source<T> expanded(Source<T> s, const Shape& lead) {
  for (size_t d = 0; d < lead.size(); ++d)
    if (s.sizes[d] != lead[d]) s.strides[d] = 0;
  s.sizes = lead;
  s.rows = product(lead);
  s.full = true;
  s.row_of.clear();
  return s;
}

}  // namespace mmfast
