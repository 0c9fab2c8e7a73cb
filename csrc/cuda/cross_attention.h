// What cross_attention's forward is given; cross_attention_kernel.h says what it does.
#pragma once

#include "types.h"

namespace mmfast {

constexpr int kSources = 16;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpRows = 16;  // what the tensor cores take at once
constexpr int kSlots = 128;    // that merge() has room for

// Strides count elements.
struct AttentionSource {
  const void* key;     // [B, Hkv, size, depth], the last dimension dense
  const void* value;   // [B, Hkv, size, value_depth], likewise
  const void* length;  // [B]; null: size
  const bool* mask;    // [B, size]; null: all
  int64_t key_strides[3], value_strides[3], length_stride, mask_strides[2];
  int32_t size;
  bool wide_length;  // int64, else int32
  bool causal;
  bool aligned;  // rows of key and value begin at multiples of 16 bytes
};

struct Attention {
  AttentionSource sources[kSources];
  const void* query;  // [B, H, L, depth], the last dimension dense
  int64_t query_strides[3];
  const bool* present;  // [B, L, n]; null: all
  int64_t present_strides[3];
  const float* bias;  // [B, H, n]; null: none
  int64_t bias_strides[3];
  int64_t batch;
  int32_t num_sources, heads, kv_heads, queries, depth, value_depth;
  int32_t block;  // rows of a block of threads, 32 or 64
  int32_t splits;
  float scale;
  bool aligned;  // as of a source
  // What each slot, a warp's share of a split, found; rows in the order of row_of.
  float* parts;        // [slots, B Hkv rows, value_depth]: sums of 2 ** (logit - top) * value
  float* totals;       // [slots, B Hkv rows, n]: sums of 2 ** (logit - top), each below its own top
  float* tops;         // [slots, B Hkv rows, n]: the highest logit so far; the last one is that of parts
  void* out;           // [B, H, L, value_depth]
  float* lse;          // [B, H, L]
  float* normalizers;  // [B, H, L, 2]: the top, and the reciprocal of the sum of 2 ** (logit - top)
  float* mass;         // [B, H, L, n]; null: not wanted
};

MM_HOST_DEVICE int32_t group_of(const Attention& a) { return a.heads / a.kv_heads; }
MM_HOST_DEVICE int32_t rows_of(const Attention& a) { return group_of(a) * a.queries; }
MM_HOST_DEVICE int32_t blocks_of(const Attention& a) { return (rows_of(a) + a.block - 1) / a.block; }
MM_HOST_DEVICE int32_t slots_of(const Attention& a) { return a.splits * (kWarps * kWarpRows / a.block); }

// Returns null, or what CUDA says against the launch.
const char* launch(const Attention& attention, Type type, void* stream);

}  // namespace mmfast
