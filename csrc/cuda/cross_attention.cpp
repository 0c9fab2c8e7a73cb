// Binds cross_attention's forward; its schema is in kernels/cross_attention_cuda.py.
#include "cross_attention.h"

#include <algorithm>

#include "binding.h"

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

namespace mmfast {

namespace {

void set_strides(const Tensor& tensor, int64_t* strides, int count) {
  for (int i = 0; i < count; ++i) strides[i] = tensor.stride(i);
}

bool is_aligned(const Tensor& tensor) {
  auto place = reinterpret_cast<int64_t>(tensor.data_ptr());
  for (int i = 0; i < 3; ++i) place |= tensor.stride(i) * tensor.element_size();
  return place % 16 == 0;
}

AttentionSource source_of(const Tensor& key, const Tensor& value, const Maybe& length, const Maybe& mask,
                          bool causal) {
  AttentionSource s{};
  s.key = key.data_ptr();
  s.value = value.data_ptr();
  set_strides(key, s.key_strides, 3);
  set_strides(value, s.value_strides, 3);
  s.aligned = is_aligned(key) && is_aligned(value);
  s.size = static_cast<int32_t>(key.size(2));
  s.causal = causal;
  if (length) {
    s.length = length->data_ptr();
    s.length_stride = length->stride(0);
    s.wide_length = length->scalar_type() == torch::headeronly::ScalarType::Long;
  }
  if (mask) {
    s.mask = static_cast<const bool*>(mask->data_ptr());
    set_strides(*mask, s.mask_strides, 2);
  }
  return s;
}

// parts [slots, B H L, Dv], totals and tops [slots, B H L, n]: see Attention.
void forward(const Tensor& query, const Tensors& keys, const Tensors& values,
             const std::vector<Maybe>& lengths, const std::vector<Maybe>& masks, const Maybe& present,
             const std::vector<bool>& causal, const Maybe& source_bias, double scale, int64_t block,
             int64_t splits, const Tensor& parts, const Tensor& totals, const Tensor& tops, const Tensor& out,
             const Tensor& lse, const Tensor& normalizers, const Maybe& mass) {
  const size_t n = keys.size();
  STD_TORCH_CHECK(n <= kSources, "cross_attention: got ", n, " sources, wanted at most ", kSources);
  Attention a{};
  a.query = query.data_ptr();
  set_strides(query, a.query_strides, 3);
  a.aligned = is_aligned(query);
  a.num_sources = static_cast<int32_t>(n);
  for (size_t i = 0; i < n; ++i)
    a.sources[i] = source_of(keys[i], values[i], lengths[i], masks[i], causal[i]);
  if (present) {
    const bool each = present->dim() == 3;  // [B, L, n], else [B, n]
    a.present = static_cast<const bool*>(present->data_ptr());
    a.present_strides[0] = present->stride(0);
    a.present_strides[1] = each ? present->stride(1) : 0;
    a.present_strides[2] = present->stride(each ? 2 : 1);
  }
  if (source_bias) {
    a.bias = static_cast<const float*>(source_bias->data_ptr());
    set_strides(*source_bias, a.bias_strides, 3);
  }
  a.batch = query.size(0);
  a.heads = static_cast<int32_t>(query.size(1));
  a.kv_heads = static_cast<int32_t>(keys[0].size(1));
  a.queries = static_cast<int32_t>(query.size(2));
  a.depth = static_cast<int32_t>(query.size(3));
  a.value_depth = static_cast<int32_t>(values[0].size(3));
  a.block = static_cast<int32_t>(block);
  a.splits = static_cast<int32_t>(splits);
  a.scale = static_cast<float>(scale);
  a.parts = static_cast<float*>(parts.mutable_data_ptr());
  a.totals = static_cast<float*>(totals.mutable_data_ptr());
  a.tops = static_cast<float*>(tops.mutable_data_ptr());
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.normalizers = static_cast<float*>(normalizers.mutable_data_ptr());
  a.mass = static_cast<float*>(data_of(mass));
  STD_TORCH_CHECK(slots_of(a) == parts.size(0) && slots_of(a) <= kSlots, "cross_attention: ", parts.size(0),
                  " slots do not fit ", splits, " splits of blocks of ", block, " rows");
  run(a, query, "cross_attention");
}

}  // namespace

}  // namespace mmfast

STABLE_TORCH_LIBRARY_IMPL(mmfast, CUDA, m) { mmfast::bind<mmfast::forward>(m, "cross_attention_split.cuda"); }
