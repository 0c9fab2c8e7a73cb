// What the forward and the backward of concat_linear share.
//
// Nothing is concatenated. The sources with a row for every output row ("full") are multiplied by their own
// columns of the weight in one go over the output; a broadcast one ("pooled") is multiplied at its own size
// before, and its rows are what the output starts from. Under a norm, with x^ = (x - mean) rstd and u_i = W_i
// @ norm_weight_i,
//
//   x^_r @ (norm_weight W_i).T = rstd_r ((p - m) norm_weight) @ W_i.T + rstd_r (m - mean_r) u_i
//
// for a pooled row p of mean m (an absent one: p = m = 0), so that these too are multiplied once. Centring
// each row on its own mean first keeps the difference exact however large the means are. But the gradient of
// a source of few features is what is left where most of the sums over its output rows would cancel: it is
// taken for a full one, which costs next to nothing.
#pragma once

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "box.h"
#include "sources.h"

namespace mmfast {
namespace {  // a copy for each of the two files

constexpr int64_t FEW_FEATURES = 8;

Activation activation_of(const std::string& name) {
  const char* names[] = {"none", "relu", "gelu", "silu", "swiglu"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, "concat_linear: unknown activation ", name);
}

// What forward and backward share: the sources, and what a norm needs to know of them.
template <class T, class A = typename wide<T>::type>
struct Problem {
  const RowKernels<T>& kernels = row_kernels<T>();
  Tensors held;  // keeps copies alive that were made for their strides
  Tensor weight_tensor;
  Maybe norm_weight_tensor, norm_bias_tensor;
  Shape lead;
  int64_t rows, batch, width, depth;  // width O, or 2 O for swiglu; depth is sum D_i
  Matrix<const T> weight;
  std::vector<Source<T>> sources;
  bool norm;
  const T *norm_weight, *norm_bias;
  std::vector<std::vector<A>> means;  // [n][own rows]: of the row alone; of full sources by statistics()
  std::vector<std::vector<A>> squares;
  std::vector<std::vector<A>> u;  // [n][width]: W_i @ norm_weight_i, where it is needed

  Problem(const Tensors& inputs, const Tensor& weight_, const Maybe& present, bool norm_,
          const Maybe& norm_weight_, const Maybe& norm_bias_)
      : weight_tensor(dense(weight_)),
        norm_weight_tensor(dense(norm_weight_)),
        norm_bias_tensor(dense(norm_bias_)),
        lead(broadcast(inputs)),
        rows(product(lead)),
        batch(lead[0]),
        width(weight_.size(0)),
        depth(weight_.size(1)),
        weight(matrix<T>(weight_tensor)),
        norm(norm_),
        norm_weight(data<T>(norm_weight_tensor)),
        norm_bias(data<T>(norm_bias_tensor)) {
    const Elements<bool> there(present, true);
    int64_t column = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      held.push_back(dense(inputs[i]));
      Source<T> s = source<T>(held.back(), column, lead);
      if (norm && s.depth < FEW_FEATURES) s = expanded(std::move(s), lead);
      column += s.depth;
      if (present) {
        std::vector<char> flags(batch);
        for (int64_t b = 0; b < batch; ++b) flags[b] = there(b, i);
        s.set_present(std::move(flags));
      }
      sources.push_back(std::move(s));
    }
    if (norm) {
      means.resize(sources.size()), squares.resize(sources.size());
      for (size_t i = 0; i < sources.size(); ++i)
        if (!sources[i].full) take_moments(i);
      for (const auto& s : sources) {
        const auto projected = s.full && s.always() ? std::vector<Wider<A>>() : project(s, norm_weight);
        u.emplace_back(projected.begin(), projected.end());
      }
    }
  }

  Matrix<const T> columns(const Source<T>& s) const { return weight.columns_from(s.column, s.depth); }
  const T* norm_weight_of(const Source<T>& s) const { return norm_weight ? norm_weight + s.column : nullptr; }
  int64_t batch_of(int64_t r) const { return r / (rows / batch); }
  bool visible(const Source<T>& s, int64_t r) const { return s.in_batch(batch_of(r)); }
  A mean(size_t i, int64_t r) const { return visible(sources[i], r) ? means[i][sources[i].row(r)] : 0; }

  void take_moments(size_t i) {
    const auto& s = sources[i];
    std::vector<A>&mean = means[i], &square = squares[i];
    mean.resize(s.rows), square.resize(s.rows);
    const auto x = row_pointers(s);
    parallel_rows(s.rows, s.depth, [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q)
        if (x[q] && s.depth) kernels.moments(x[q], &mean[q], &square[q], s.depth);
    });
  }

  // Mean and 1 / standard deviation of each row of the concatenation, from those of its parts.
  void statistics(double eps, A* mean_out, A* rstd_out) {
    for (size_t i = 0; i < sources.size(); ++i)
      if (sources[i].full) take_moments(i);
    const A count = std::max<int64_t>(depth, 1);
    parallel_rows(rows, 16 * sources.size(), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        A sum = 0, square = 0;
        for (size_t i = 0; i < sources.size(); ++i) sum += sources[i].depth * mean(i, r);
        const A centre = sum / count;
        for (size_t i = 0; i < sources.size(); ++i) {
          const A d = mean(i, r) - centre;
          square += sources[i].depth * d * d + (visible(sources[i], r) ? squares[i][sources[i].row(r)] : 0);
        }
        mean_out[r] = centre;
        rstd_out[r] = 1 / std::sqrt(square / count + static_cast<A>(eps));
      }
    });
  }

  // W_i @ v_i [width] for a vector v over the concatenation's columns; null: ones
  std::vector<Wider<A>> project(const Source<T>& s, const T* v) const {
    std::vector<A> wide_v(s.depth, 1);
    std::vector<Wider<A>> out(width);
    if (v) kernels.widen(wide_v.data(), v + s.column, s.depth);
    parallel_rows(width, s.depth, [&](int64_t begin, int64_t end) {
      std::vector<A> row(s.depth);
      for (int64_t o = begin; o < end; ++o) {
        kernels.widen(row.data(), weight.row(o) + s.column, s.depth);
        Wider<A> sums[8] = {};
        for (int64_t k = 0; k < s.depth; ++k) sums[k % 8] += Wider<A>(row[k]) * wide_v[k];
        for (const auto sum : sums) out[o] += sum;
      }
    });
    return out;
  }

  // W_i.T [D_i, width], each of the `sums` equal parts of its columns packed on its own
  std::vector<Right<T>> transposed_columns(const Source<T>& s, int64_t sums = 1) const {
    const Rows<T> rows = row_pointers(columns(s));
    const auto at = [&](int64_t part) { return rows.begin() + part * (width / sums); };
    std::vector<Right<T>> out;
    for (int64_t part = 0; part < sums; ++part)
      out.push_back(Right<T>::of_columns(Rows<T>(at(part), at(part + 1)), s.depth));
    return out;
  }

  // The rows of pooled sources that broadcast alike times their columns of the weight [own rows, width],
  // added up, 0 where they are absent.
  Buffer<A> pooled_product(const std::vector<size_t>& which) const {
    const int64_t own_rows = sources[which[0]].rows;
    Buffer<A> out(own_rows, width);
    std::vector<Centring<T>> centrings(sources.size());
    std::vector<Term<T>> terms;
    for (const size_t i : which) {
      const auto& s = sources[i];
      centrings[i] = {norm ? means[i].data() : nullptr, nullptr, norm_weight_of(s)};
      terms.push_back({row_pointers(s), transposed_columns(s), norm ? &centrings[i] : nullptr});
    }
    sum_of_products(
        own_rows, width, 1, terms, [](int64_t, int64_t, int64_t, int64_t, A*) -> const A* { return nullptr; },
        [&](int64_t r, int64_t first, int64_t count, const A* c, const A*) {
          std::copy_n(c, count, out.row(r) + first);
        });
    return out;
  }
};

template <class T, class A = typename wide<T>::type>
std::vector<A> tanh_of(const Maybe& gate, int64_t n) {  // [n], or nothing
  if (!gate) return {};
  std::vector<A> out = widened<T>(*gate);
  if (out.size() == 1) out.assign(n, A(out[0]));
  for (A& x : out) x = std::tanh(x);
  return out;
}

}  // namespace
}  // namespace mmfast
