// weighted_fusion on the CPU: sum over i of softmax(logits)_i x_i over the sources that a row has, each row
// read and written once.
#include "simd/weighted_fusion.h"

#include <cmath>

#include "box.h"
#include "sources.h"

namespace mmfast {

MM_KERNELS(weighted_kernels, WeightedKernels)

namespace {

template <class T, class A = typename wide<T>::type>
struct Problem {
  const WeightedKernels<T>& kernels = weighted_kernels<T>();
  Tensors held;  // [*inputs, logits], or copies that were made for their strides
  Shape lead;
  int64_t count, rows, depth;
  std::vector<Source<T>> sources;  // [n + 1], the last of them the logits
  std::vector<Rows<T>> at;         // of each source's own rows
  std::vector<char> present;       // [B, n]; empty: everywhere

  Problem(const Tensors& inputs, const Tensor& logits, const Maybe& present_)
      : held(inputs), count(inputs.size()) {
    held.push_back(logits);
    lead = broadcast(held);
    rows = product(lead);
    for (Tensor& t : held) {
      t = dense(t);
      sources.push_back(source<T>(t, 0, lead));
      at.push_back(row_pointers(sources.back()));
    }
    depth = sources[0].depth;
    const Elements<bool> there(present_, true);
    for (int64_t k = 0; present_ && k < lead[0] * count; ++k) present.push_back(there(k / count, k % count));
  }

  Shape shape(int64_t last) const { return output_shape(held, lead, {last}); }
  const T* row(int64_t i, int64_t r) const { return at[i][sources[i].row(r)]; }

  // The sources that a row has, how much each counts, and where its own row lies.
  struct Mixture {
    std::vector<int64_t> which;
    std::vector<A> weights;
    std::vector<const T*> x;
  };

  // f(row, mixture) over all rows, those that share logits and presence sharing the mixture
  template <class F>
  void each_row(const F& f) const {
    parallel_rows(rows, count * depth, [&](int64_t begin, int64_t end) {
      Mixture mixture;
      std::vector<A> wide_logits(count);
      const T* logits = nullptr;
      const char* flags = nullptr;
      for (int64_t r = begin; r < end; ++r) {
        const T* const own = row(count, r);
        const char* const own_flags = present.empty() ? nullptr : &present[r / (rows / lead[0]) * count];
        if (own != logits || own_flags != flags) {
          logits = own, flags = own_flags;
          row_kernels<T>().widen(wide_logits.data(), logits, count);
          softmax(wide_logits, flags, mixture);
        }
        for (size_t k = 0; k < mixture.which.size(); ++k) mixture.x[k] = row(mixture.which[k], r);
        f(r, mixture);
      }
    });
  }

 private:
  void softmax(const std::vector<A>& logits, const char* flags, Mixture& to) const {
    to.which.clear(), to.weights.clear();
    A largest = -INFINITY, sum = 0;
    for (int64_t i = 0; i < count; ++i)
      if (!flags || flags[i]) to.which.push_back(i), largest = std::max(largest, logits[i]);
    for (const int64_t i : to.which) sum += to.weights.emplace_back(std::exp(logits[i] - largest));
    for (A& weight : to.weights) weight /= sum;
    to.x.resize(to.which.size());
  }
};

template <class T>
Tensors forward(const Tensors& inputs, const Tensor& logits, const Maybe& present) {
  const Problem<T> p(inputs, logits, present);
  const Tensor out = empty(p.shape(p.depth), scalar_type<T>);
  p.each_row([&, y = data<T>(out)](int64_t r, const auto& mixture) {
    p.kernels.mix(y + r * p.depth, mixture.x.data(), mixture.weights.data(), mixture.x.size(), p.depth);
  });
  return {out};
}

// dx_i = w_i grad;  dlogit_i = w_i (grad . x_i - sum over j of w_j grad . x_j), for each row by itself
template <class T>
Tensors backward(const Tensor& grad_, const Tensors& inputs, const Tensor& logits, const Maybe& present,
                 const std::vector<bool>& needs) {
  using A = typename wide<T>::type;
  const Problem<T> p(inputs, logits, present);
  const Tensor grad = as_contiguous(grad_);
  Tensors made;
  std::vector<T*> dx(p.count);
  for (int64_t i = 0; i < p.count; ++i)
    if (needs[i]) dx[i] = data<T>(made.emplace_back(empty(p.shape(p.depth), scalar_type<T>)));
  A* const dlogits =
      needs[p.count] ? data<A>(made.emplace_back(empty(p.shape(p.count), scalar_type<A>))) : nullptr;
  p.each_row([&, g = data<T>(grad)](int64_t r, const auto& mixture) {
    A* const own = dlogits ? dlogits + r * p.count : nullptr;
    for (T* const to : dx)
      if (to && int64_t(mixture.x.size()) < p.count) std::fill_n(to + r * p.depth, p.depth, T{});
    if (own) std::fill_n(own, p.count, A(0));
    A mean = 0;
    for (size_t k = 0; k < mixture.x.size(); ++k) {
      const int64_t i = mixture.which[k];
      const A dot = p.kernels.backward(dx[i] ? dx[i] + r * p.depth : nullptr, mixture.weights[k],
                                       g + r * p.depth, mixture.x[k], p.depth);
      mean += mixture.weights[k] * dot;
      if (own) own[i] = dot;
    }
    for (size_t k = 0; own && k < mixture.x.size(); ++k) {
      A& d = own[mixture.which[k]];
      d = mixture.weights[k] * (d - mean);
    }
  });
  return made;
}

Tensor weighted_fusion(Tensors inputs, Tensor logits, Maybe present) {
  return by_type("weighted_fusion: logits", logits.scalar_type(), 1, [&](auto zero, auto to) {
    return forward<decltype(zero)>(to(inputs), to(logits), present);
  })[0];
}

Tensors weighted_fusion_backward(Tensor grad, Tensors inputs, Tensor logits, Maybe present,
                                 std::vector<bool> needs) {
  const size_t narrow = std::count(needs.begin(), needs.end() - 1, true);  // all but the logits' gradient
  return by_type("weighted_fusion: logits", logits.scalar_type(), narrow, [&](auto zero, auto to) {
    return backward<decltype(zero)>(to(grad), to(inputs), to(logits), present, needs);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  bind<&weighted_fusion>(m, "weighted_fusion.cpu");
  bind<&weighted_fusion_backward>(m, "weighted_fusion_backward.cpu");
}

}  // namespace mmfast
