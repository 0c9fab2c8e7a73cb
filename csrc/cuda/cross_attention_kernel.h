// cross_attention's forward for few queries over long sources: what a block of threads does, in a form that a
// host compiler can run too, which is how it is tested where there is no GPU.
//
// With few queries the keys are what has to be read, once, at the speed of memory. So all queries of all
// heads that share a kv head are rows of one product, and the keys are what is divided among blocks: those
// that are visible, of source after source, cut into `splits` even ranges. A block walks its range in tiles,
// copied ahead of their use, with an online softmax for each row. merge() then adds up what the ranges gave,
// in a fixed order. Which tiles there are depends on lengths, presence and causality, and is found out on the
// device.
//
// Where rows of a tile differ in what they see, a value that one of them sees may be nan and hidden from the
// next. Logits are selected, but the values of all keys are summed over, and 0 * nan is nan: so values that
// are not finite are taken out of the tile, and it is noted which sums of which rows they make nan.
#pragma once

#include <cmath>

#include "cross_attention.h"
#include "warp.h"

namespace mmfast {

constexpr float kLog2e = 1.4426950408889634f;  // exponentials are powers of two: one instruction

// A row: a query in one of the heads that share a kv head. Queries come first, so that rows of a block see
// about as much of a causal source.
struct Row {
  int32_t head, query;
};

MM_DEVICE Row row_of(const Attention& a, int64_t kv_head, int32_t row) {
  const int32_t group = group_of(a);
  return {static_cast<int32_t>(kv_head) * group + row % group, row / group};
}

// Shared memory of a block. Rows lie in chunks of 16 bytes that are exchanged, see chunk_at.
template <class T, int DEPTH>
struct alignas(128) Shared {
  static constexpr int kDepth = DEPTH;
  static constexpr int kPer = 16 / sizeof(T);  // elements of a chunk
  static constexpr int kChunks = DEPTH / kPer;
  static constexpr int kKeys = 128 / sizeof(T);  // of a tile
  static constexpr int kSlice = kKeys / 2;       // keys that a warp takes at once
  static constexpr int kWords = DEPTH / 32;
  static constexpr int kStages = DEPTH == 64 ? 3 : 2;
  static constexpr int kRows = sizeof(T) == 4 && DEPTH == 256 ? 32 : 64;

  T query[kRows * DEPTH];
  T keys[kStages][kKeys * DEPTH];
  T values[kStages][kKeys * DEPTH];
  bool seen[kStages][kKeys];       // by the mask
  uint32_t spoilt[kRows][kWords];  // bit by bit: whether a sum is nan because of a value that was taken out
  int32_t last[kSources];          // no row of the block sees a key from here on
  int32_t whole[kSources];         // all rows see the keys before
};

// Chunks of eight rows that stand in one column lie in different banks.
template <class S, class T>
MM_DEVICE T* chunk_at(T* matrix, int row, int chunk) {
  return matrix + row * S::kDepth + (chunk ^ (row & 7)) * S::kPer;
}

// Rows are filled up with zeros to a multiple of 16, the depth of a product.
MM_DEVICE int filled(int depth) { return (depth + 15) / 16 * 16; }

template <class S, class T>
MM_DEVICE void copy_chunk(T* to, const T* from, int elements, bool aligned) {
  elements = elements < 0 ? 0 : elements < S::kPer ? elements : S::kPer;
  if (aligned) {
    copy_async(to, from, elements * static_cast<int>(sizeof(T)));
  } else {
    for (int i = 0; i < S::kPer; ++i) to[i] = i < elements ? from[i] : T{};
  }
}

MM_DEVICE bool is_finite(Half x) { return (x.bits & 0x7c00) != 0x7c00; }
MM_DEVICE bool is_finite(BFloat x) { return (x.bits & 0x7f80) != 0x7f80; }
MM_DEVICE bool is_finite(float x) { return fabsf(x) < INFINITY; }

template <class T>
MM_DEVICE T rounded(float x) {
  return {static_cast<uint16_t>(pack<T>(x, 0.0f))};
}
template <>
MM_DEVICE float rounded<float>(float x) {
  return x;
}

// Power of two below the top; where nothing was seen yet, there is nothing to be above.
MM_DEVICE float shift_of(float top) { return top == -INFINITY ? 0.0f : top; }

MM_DEVICE float bias_of(const Attention& a, int64_t sample, int32_t head, int i) {
  const int64_t* step = a.bias_strides;
  return a.bias ? a.bias[sample * step[0] + head * step[1] + i * step[2]] : 0.0f;
}

// How many keys of source i a row sees before the mask.
MM_DEVICE int32_t end_of(const Attention& a, int64_t sample, Row row, int i) {
  const AttentionSource& s = a.sources[i];
  const int64_t* step = a.present_strides;
  if (a.present && !a.present[sample * step[0] + row.query * step[1] + i * step[2]]) return 0;
  if (bias_of(a, sample, row.head, i) == -INFINITY) return 0;
  int64_t end = s.size;
  if (s.length) {
    const int64_t at = sample * s.length_stride;
    const int64_t length =
        s.wide_length ? static_cast<const int64_t*>(s.length)[at] : static_cast<const int32_t*>(s.length)[at];
    end = length < end ? length : end;
  }
  if (s.causal) {
    const int64_t bound = int64_t(row.query) + s.size - a.queries + 1;
    end = bound < end ? bound : end;
  }
  return end < 0 ? 0 : static_cast<int32_t>(end);
}

// What the rows of a block see of each source.
template <class S>
MM_DEVICE void find_limits(const Attention& a, int64_t sample, int64_t kv_head, int32_t first_row,
                           S& shared) {
  const int lane = thread_index() % 32;
  for (int i = thread_index() / 32; i < a.num_sources; i += kWarps) {
    int32_t last = 0, whole = a.sources[i].size;
    for (int32_t row = first_row + lane; row < first_row + a.block && row < rows_of(a); row += 32) {
      const int32_t end = end_of(a, sample, row_of(a, kv_head, row), i);
      last = end > last ? end : last;
      whole = end < whole ? end : whole;
    }
    for (int mask = 16; mask; mask /= 2) {
      const int32_t one = shuffle_xor(last, mask), other = shuffle_xor(whole, mask);
      last = one > last ? one : last;
      whole = other < whole ? other : whole;
    }
    if (lane == 0) {
      shared.last[i] = last;
      shared.whole[i] = whole;
    }
  }
}

// Where a tile begins.
struct Place {
  int32_t source, key;
};

template <class S>
MM_DEVICE int32_t tiles_of(const S& shared, int i) {
  return (shared.last[i] + S::kKeys - 1) / S::kKeys;
}

template <class S>
MM_DEVICE Place find_tile(const Attention& a, const S& shared, int64_t tile) {
  int i = 0;
  for (; i < a.num_sources && tile >= tiles_of(shared, i); ++i) tile -= tiles_of(shared, i);
  return {i, static_cast<int32_t>(tile) * S::kKeys};
}

template <class S>
MM_DEVICE Place next_tile(const Attention& a, const S& shared, Place place) {
  place.key += S::kKeys;
  while (place.source < a.num_sources && place.key >= shared.last[place.source])
    place = {place.source + 1, 0};
  return place;
}

// Keys that no row sees become zeros and are not read.
template <class T, class S>
MM_DEVICE void load_tile(const Attention& a, int64_t sample, int64_t kv_head, Place place, int stage,
                         S& shared) {
  const AttentionSource& s = a.sources[place.source];
  const T* key = static_cast<const T*>(s.key) + sample * s.key_strides[0] + kv_head * s.key_strides[1];
  const T* value =
      static_cast<const T*>(s.value) + sample * s.value_strides[0] + kv_head * s.value_strides[1];
  const bool* mask = s.mask ? s.mask + sample * s.mask_strides[0] : nullptr;
  const int chunk = thread_index() % S::kChunks, column = chunk * S::kPer;
  for (int row = thread_index() / S::kChunks; row < S::kKeys; row += kThreads / S::kChunks) {
    const int64_t k = int64_t(place.key) + row;
    const bool seen = k < shared.last[place.source] && (!mask || mask[k * s.mask_strides[1]]);
    if (chunk == 0) shared.seen[stage][row] = seen;
    if (column < filled(a.depth))
      copy_chunk<S>(chunk_at<S>(shared.keys[stage], row, chunk), key + k * s.key_strides[2] + column,
                    seen ? a.depth - column : 0, s.aligned);
    if (column < filled(a.value_depth))
      copy_chunk<S>(chunk_at<S>(shared.values[stage], row, chunk), value + k * s.value_strides[2] + column,
                    seen ? a.value_depth - column : 0, s.aligned);
  }
}

template <class T, class S>
MM_DEVICE void load_query(const Attention& a, int64_t sample, int64_t kv_head, int32_t first_row, S& shared) {
  const int64_t* step = a.query_strides;
  const int chunk = thread_index() % S::kChunks, column = chunk * S::kPer;
  if (column >= filled(a.depth)) return;
  for (int row = thread_index() / S::kChunks; row < a.block; row += kThreads / S::kChunks) {
    const bool real = first_row + row < rows_of(a);
    const Row r = row_of(a, kv_head, real ? first_row + row : 0);
    const T* from = static_cast<const T*>(a.query) + sample * step[0] + r.head * step[1] + r.query * step[2];
    copy_chunk<S>(chunk_at<S>(shared.query, row, chunk), from + column, real ? a.depth - column : 0,
                  a.aligned);
  }
}

// That are loaded at once.
template <int N>
struct alignas(4 * N) Floats {
  float at[N];
};

// A warp holds tiles [16, 8 n] in n parts of 8 columns. Of each part a thread has four numbers: those of the
// rows lane / 4 and lane / 4 + 8, each in columns 2 (lane % 4) and the next.

// logits [16, N 8] += query [16, depth] @ keys [N 8, depth] transposed.
template <class T, class S, int N>
MM_DEVICE void multiply_keys(float (&logits)[N][4], const T* query, const T* keys, int depth) {
  const int lane = thread_index() % 32;
  if constexpr (sizeof(T) == 2) {
    const int odd = lane / 8 % 2, high = lane / 16, within = lane % 8;
#pragma unroll
    for (int step = 0; step < S::kDepth / 16; ++step) {
      if (16 * step >= depth) break;
      uint32_t q[4], k[4];
      load_matrices(q, chunk_at<S>(query, 8 * odd + within, 2 * step + high));
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        load_matrices(k, chunk_at<S>(keys, 8 * (n + high) + within, 2 * step + odd));
        multiply<T>(logits[n], q, k[0], k[1]);
        multiply<T>(logits[n + 1], q, k[2], k[3]);
      }
    }
  } else {
#pragma unroll 1
    for (int chunk = 0; chunk < (depth + 3) / 4; ++chunk) {
      const auto four = [&](const T* rows, int row) {
        return *reinterpret_cast<const Floats<4>*>(chunk_at<S>(rows, row, chunk));
      };
      const Floats<4> q[2] = {four(query, lane / 4), four(query, lane / 4 + 8)};
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int key = 8 * n + 2 * (lane % 4);
        const Floats<4> k[2] = {four(keys, key), four(keys, key + 1)};
#pragma unroll
        for (int e = 0; e < 4; ++e)
#pragma unroll
          for (int d = 0; d < 4; ++d) logits[n][e] += q[e / 2].at[d] * k[e % 2].at[d];
      }
    }
  }
}

// sums [16, depth] += weights [16, N 8] @ values [N 8, depth].
template <class T, class S, int N>
MM_DEVICE void multiply_values(float (&sums)[S::kDepth / 8][4], const float (&weights)[N][4], const T* values,
                               int depth) {
  const int lane = thread_index() % 32;
  if constexpr (sizeof(T) == 2) {
    const int row = lane % 16, high = lane / 16;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      // A result's layout is that of a left factor, taken two parts at a time.
      const uint32_t w[4] = {pack<T>(weights[n][0], weights[n][1]), pack<T>(weights[n][2], weights[n][3]),
                             pack<T>(weights[n + 1][0], weights[n + 1][1]),
                             pack<T>(weights[n + 1][2], weights[n + 1][3])};
#pragma unroll
      for (int c = 0; c < S::kDepth / 8; c += 2) {
        if (8 * c >= depth) break;
        uint32_t v[4];
        load_transposed(v, chunk_at<S>(values, 8 * n + row, c + high));
        multiply<T>(sums[c], w, v[0], v[1]);
        multiply<T>(sums[c + 1], w, v[2], v[3]);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < 8 * N; ++k) {
      // Whoever of the four threads of a row has the weight of key k hands it round.
      const int from = lane / 4 * 4 + k % 8 / 2;
      const float w[2] = {shuffle(weights[k / 8][k % 2], from), shuffle(weights[k / 8][2 + k % 2], from)};
#pragma unroll
      for (int c = 0; c < S::kDepth / 8; ++c) {
        if (8 * c >= depth) break;
        const T* at = chunk_at<S>(values, k, 2 * c + lane % 4 / 2) + lane % 2 * 2;
        const Floats<2> v = *reinterpret_cast<const Floats<2>*>(at);
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[c][e] += w[e / 2] * v.at[e % 2];
      }
    }
  }
}

// Runs f on the thread's share of a tile's values.
template <class S, class T, class F>
MM_DEVICE void for_values(T* values, int depth, F f) {
  const int chunk = thread_index() % S::kChunks;
  if (chunk * S::kPer >= filled(depth)) return;
  for (int row = thread_index() / S::kChunks; row < S::kKeys; row += kThreads / S::kChunks) {
    T* at = chunk_at<S>(values, row, chunk);
#pragma unroll
    for (int i = 0; i < S::kPer; ++i) f(at[i]);
  }
}

// The words of `spoilt` are shared out among threads in the same way each time.
template <class S, class F>
MM_DEVICE void for_spoilt(const Attention& a, S& shared, F f) {
  for (int at = thread_index(); at < a.block * S::kWords; at += kThreads)
    f(at % a.block, at / a.block, shared.spoilt[at % a.block][at / a.block]);
}

// Notes which rows see a value of this tile that is not finite, and in which columns.
template <class S>
MM_DEVICE void note_spoilt(const Attention& a, int64_t sample, int64_t kv_head, int32_t first_row,
                           Place place, int stage, S& shared) {
  for_spoilt(a, shared, [&](int row, int word, uint32_t& bits) {
    if (first_row + row >= rows_of(a) || 32 * word >= a.value_depth) return;
    const int32_t end = end_of(a, sample, row_of(a, kv_head, first_row + row), place.source);
    for (int key = 0; key < S::kKeys && place.key + key < end; ++key) {
      if (!shared.seen[stage][key]) continue;
      for (int bit = 0; bit < 32 && 32 * word + bit < a.value_depth; ++bit) {
        const int column = 32 * word + bit;
        const auto x = chunk_at<S>(shared.values[stage], key, column / S::kPer)[column % S::kPer];
        bits |= uint32_t(!is_finite(x)) << bit;
      }
    }
  });
}

// One step of the online softmax: logits become weights below the top, which is now `higher` in any of the
// four threads that share a row.
template <int N, int PARTS>
MM_DEVICE void weigh(float (&logits)[N][4], float (&higher)[2], float (&tops)[2], float (&totals)[2],
                     float (&sums)[PARTS][4]) {
  float fades[2], shifts[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    higher[r] = fmaxf(higher[r], shuffle_xor(higher[r], 1));
    higher[r] = fmaxf(higher[r], shuffle_xor(higher[r], 2));
    shifts[r] = shift_of(higher[r]);
    fades[r] = power_of_two(tops[r] - shifts[r]);
    totals[r] *= fades[r];
    tops[r] = higher[r];
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      logits[n][e] = power_of_two(logits[n][e] - shifts[e / 2]);
      totals[e / 2] += logits[n][e];
    }
#pragma unroll
  for (int c = 0; c < PARTS; ++c)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[c][e] *= fades[e / 2];
}

// A block's part: rows `block` of all, keys `split` of all.
template <class T, int DEPTH>
MM_DEVICE void attend(const Attention& a, int64_t block, int split, Shared<T, DEPTH>& shared) {
  using S = Shared<T, DEPTH>;
  constexpr int kParts = DEPTH / 8;
  const int lane = thread_index() % 32, warp = thread_index() / 32;
  const int row_warps = a.block / kWarpRows, key_warps = kWarps / row_warps;
  const int row_warp = warp % row_warps, key_warp = warp / row_warps;
  const int64_t both = block / blocks_of(a), sample = both / a.kv_heads, kv_head = both % a.kv_heads;
  const int32_t first_row = static_cast<int32_t>(block % blocks_of(a)) * a.block;

  load_query<T>(a, sample, kv_head, first_row, shared);
  for_spoilt(a, shared, [](int, int, uint32_t& bits) { bits = 0; });
  find_limits(a, sample, kv_head, first_row, shared);
  sync_block();
  int64_t tiles = 0;
  for (int i = 0; i < a.num_sources; ++i) tiles += tiles_of(shared, i);
  const int64_t first = tiles * split / a.splits;
  const int32_t count = static_cast<int32_t>(tiles * (split + 1) / a.splits - first);

  // The thread's two rows. The first of the four threads that share them writes what it finds of each source.
  const int64_t slot = int64_t(split) * key_warps + key_warp;
  const int64_t slot_row = (slot * a.batch * a.kv_heads + both) * rows_of(a);
  int32_t rows[2], ends[2] = {};
  float biases[2] = {}, tops[2] = {-INFINITY, -INFINITY}, totals[2] = {};
  for (int r = 0; r < 2; ++r) {
    rows[r] = first_row + row_warp * kWarpRows + lane / 4 + 8 * r;
    for (int i = 0; i < a.num_sources && rows[r] < rows_of(a) && lane % 4 == 0; ++i) {
      a.totals[(slot_row + rows[r]) * a.num_sources + i] = 0.0f;
      a.tops[(slot_row + rows[r]) * a.num_sources + i] = -INFINITY;
    }
  }
  const bool has_rows = first_row + row_warp * kWarpRows < rows_of(a);
  float sums[kParts][4] = {};

  Place place = find_tile(a, shared, first), ahead = place;
  for (int32_t t = 1 - S::kStages; t < count; ++t) {
    if (t >= 0) {
      wait<S::kStages - 2>();
      sync_block();  // what the others copied is here, and the tile before this one is no longer needed
    }
    const int32_t coming = t + S::kStages - 1;
    if (coming < count) {
      load_tile<T>(a, sample, kv_head, ahead, coming % S::kStages, shared);
      ahead = next_tile(a, shared, ahead);
    }
    commit();
    if (t < 0) continue;

    const int i = place.source, stage = t % S::kStages;
    const int32_t last = shared.last[i], whole = shared.whole[i];
    const bool selects = place.key + S::kKeys > whole || a.sources[i].mask;
    if (t == 0 || place.key == 0) {
      for (int r = 0; r < 2; ++r) {
        const Row row = row_of(a, kv_head, rows[r] < rows_of(a) ? rows[r] : 0);
        ends[r] = end_of(a, sample, row, i);
        biases[r] = bias_of(a, sample, row.head, i) * kLog2e;
      }
    }
    const auto sees = [&](int r, int key) { return place.key + key < ends[r] && shared.seen[stage][key]; };

    T* values = shared.values[stage];
    const bool differ = (place.key + S::kKeys < last ? place.key + S::kKeys : last) > whole;
    if (differ) {
      bool spoilt = false;
      for_values<S>(values, a.value_depth, [&](T& x) { spoilt |= !is_finite(x); });
      if (any_of_block(spoilt)) {
        note_spoilt(a, sample, kv_head, first_row, place, stage, shared);
        sync_block();
        for_values<S>(values, a.value_depth, [](T& x) { x = is_finite(x) ? x : T{}; });
        sync_block();
      }
    }

    for (int base = key_warp * S::kSlice; has_rows && base < S::kKeys; base += key_warps * S::kSlice) {
      if (place.key + base >= last) break;
      float logits[S::kSlice / 8][4] = {};
      multiply_keys<T, S>(logits, shared.query + row_warp * kWarpRows * DEPTH,
                          shared.keys[stage] + base * DEPTH, a.depth);
      float higher[2] = {tops[0], tops[1]};
#pragma unroll
      for (int n = 0; n < S::kSlice / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& x = logits[n][e];
          x = x * (a.scale * kLog2e) + biases[e / 2];
          if (selects && !sees(e / 2, base + 8 * n + 2 * (lane % 4) + e % 2)) x = -INFINITY;
          higher[e / 2] = fmaxf(higher[e / 2], x);
        }
      weigh(logits, higher, tops, totals, sums);
      multiply_values<T, S>(sums, logits, values + base * DEPTH, a.value_depth);
    }

    place = next_tile(a, shared, place);
    if (place.source != i || t + 1 == count) {
      for (int r = 0; r < 2; ++r) {
        totals[r] += shuffle_xor(totals[r], 1);
        totals[r] += shuffle_xor(totals[r], 2);
        if (lane % 4 == 0 && rows[r] < rows_of(a)) {
          a.totals[(slot_row + rows[r]) * a.num_sources + i] = totals[r];
          a.tops[(slot_row + rows[r]) * a.num_sources + i] = tops[r];
        }
        totals[r] = 0.0f;
      }
    }
  }
  wait<0>();  // the query, where there was no tile
#pragma unroll
  for (int c = 0; c < kParts; ++c)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = 8 * c + 2 * (lane % 4) + e % 2;
      if (column >= a.value_depth || rows[e / 2] >= rows_of(a)) continue;
      const uint32_t bits = shared.spoilt[rows[e / 2] - first_row][column / 32];
      a.parts[(slot_row + rows[e / 2]) * a.value_depth + column] = bits >> column % 32 & 1 ? NAN : sums[c][e];
    }
}

template <class F>
MM_DEVICE float over_warp(float x, F f) {
  for (int mask = 16; mask; mask /= 2) x = f(x, shuffle_xor(x, mask));
  return x;
}

// A warp's part: output, lse, normalizers and mass of one row from what all slots found. `weights` has kSlots
// of its own.
template <class T>
MM_DEVICE void merge(const Attention& a, int64_t at, float* weights) {
  const int lane = thread_index() % 32, n = a.num_sources;
  const int64_t rows = rows_of(a), all = a.batch * a.kv_heads * rows;
  const auto add = [](float x, float y) { return x + y; };
  float top = -INFINITY;
  for (int slot = lane; slot < slots_of(a); slot += 32) {
    weights[slot] = -INFINITY;
    for (int i = 0; i < n; ++i) weights[slot] = fmaxf(weights[slot], a.tops[(slot * all + at) * n + i]);
    top = fmaxf(top, weights[slot]);
  }
  top = over_warp(top, [](float x, float y) { return fmaxf(x, y); });
  for (int slot = lane; slot < slots_of(a); slot += 32)
    weights[slot] = power_of_two(weights[slot] - shift_of(top));

  float total = 0.0f, own = 0.0f;  // lane i has the total of source i
  for (int i = 0; i < n; ++i) {
    float share = 0.0f;
    for (int slot = lane; slot < slots_of(a); slot += 32) {
      const int64_t pair = (slot * all + at) * n + i;
      share += a.totals[pair] * power_of_two(a.tops[pair] - shift_of(top));
    }
    share = over_warp(share, add);
    total += share;
    if (lane == i) own = share;
  }
  const float inverse = 1 / (total == 0.0f ? 1.0f : total);  // 0: nothing is seen, else the top alone adds 1

  const int64_t both = at / rows, sample = both / a.kv_heads;
  const Row row = row_of(a, both % a.kv_heads, static_cast<int32_t>(at % rows));
  const int64_t to = (sample * a.heads + row.head) * a.queries + row.query;
  sync_warp();  // the weights are of all lanes
  for (int column = lane; column < a.value_depth; column += 32) {
    float sum = 0.0f;
    for (int slot = 0; slot < slots_of(a); ++slot)
      sum += weights[slot] * a.parts[(slot * all + at) * a.value_depth + column];
    static_cast<T*>(a.out)[to * a.value_depth + column] = rounded<T>(sum * inverse);
  }
  if (lane == 0) {
    a.lse[to] = (top - log2f(inverse)) / kLog2e;
    a.normalizers[2 * to] = top;
    a.normalizers[2 * to + 1] = inverse;
  }
  if (a.mass && lane < n) a.mass[to * n + lane] = own * inverse;
}

template <class T, int DEPTH>
struct Kernel {
  using Element = T;
  using Memory = Shared<T, DEPTH>;
};

// Runs run(Kernel) with the least depth that has room for key and value.
template <class T, class Run>
void with_depth(const Attention& a, Run run) {
  const int depth = a.depth > a.value_depth ? a.depth : a.value_depth;
  if (depth <= 64) return run(Kernel<T, 64>{});
  if (depth <= 128) return run(Kernel<T, 128>{});
  run(Kernel<T, 256>{});
}

template <class Run>
void with_kernel(const Attention& a, Type type, Run run) {
  if (type == Type::float32) return with_depth<float>(a, run);
  if (type == Type::float16) return with_depth<Half>(a, run);
  with_depth<BFloat>(a, run);
}

}  // namespace mmfast
