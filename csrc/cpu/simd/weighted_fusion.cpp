// See weighted_fusion.h. No torch header and no linkage but MM_KERNELS_ENTRY: see dispatch.h.
#include "weighted_fusion.h"

#include "vectors.h"

using mmfast::WeightedKernels;

namespace {

template <class T>
void mix(T* out, const T* const* x, const Acc<T>* weight, int64_t count, int64_t n) {
  sweep<T>(n, [&](int64_t c, auto part) {
    Vec<T> sum{};
    for (int64_t i = 0; i < count; ++i) sum += load(x[i] + c, part) * weight[i];
    store(out + c, sum, part);
  });
}

template <class T>
Acc<T> backward(T* dx, Acc<T> weight, const T* grad, const T* x, int64_t n) {
  Vec<T> dot{};
  sweep<T>(n, [&](int64_t c, auto part) {
    const Vec<T> g = load(grad + c, part);
    dot += g * load(x + c, part);
    if (dx) store(dx + c, g * weight, part);
  });
  return total(dot);
}

template <class T>
constexpr WeightedKernels<T> kernels = {mix<T>, backward<T>};

}  // namespace

MM_KERNELS_ENTRY(weighted_kernels)
