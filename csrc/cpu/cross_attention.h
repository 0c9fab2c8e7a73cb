// What both directions of cross_attention have in common: where rows lie, and who sees which keys.
#pragma once

#include <cmath>
#include <limits>
#include <numeric>

#include "box.h"
#include "simd/attention.h"
#include "tiles.h"

namespace mmfast {

using MaybeTensors = std::vector<Maybe>;

MM_KERNELS(attention_kernels, AttentionKernels)

// [B, heads, rows, features] with dense features.
template <class T>
struct Heads {
  Tensor held;
  const T* data;
  int64_t batch_stride, head_stride, row_stride, rows, depth;

  explicit Heads(const Tensor& t)
      : held(dense(t)),
        data(static_cast<const T*>(held.data_ptr())),
        batch_stride(held.stride(0)),
        head_stride(held.stride(1)),
        row_stride(held.stride(2)),
        rows(held.size(2)),
        depth(held.size(3)) {}
  const T* row(int64_t b, int64_t h, int64_t r) const {
    return data + b * batch_stride + h * head_stride + r * row_stride;
  }
};

// The keys of one source that its sample lets anyone see. They are numbered without the others, so that a
// query, whatever bounds it, sees the first so many.
struct Keys {
  int64_t count = 0;
  std::vector<int64_t> at;      // their places; empty: the first `count`
  std::vector<int64_t> before;  // how many of them lie before each place; empty: all places are theirs

  int64_t place(int64_t j) const { return at.empty() ? j : at[j]; }
};

// Where a block of keys begins. Behind the sources there is their joint, see Attention.
struct BlockStart {
  int64_t source, first;
};

template <class T, class A = typename wide<T>::type>
struct Attention {
  const int64_t block_keys = attention_kernels<T>().keys;
  Heads<T> query;
  std::vector<Heads<T>> key, value;
  int64_t batch, heads, kv_heads, queries, depth, value_depth, sources;
  int64_t group, rows;     // query heads of a key head; their queries together
  std::vector<Keys> keys;  // [B, n]
  // Sources of which all queries see the same keys, without a bias, are one: the joint, which takes the place
  // of source n. So the end of a source leaves no block half empty.
  std::vector<bool> joins;                      // [n]
  std::vector<int64_t> joint;                   // [B], its keys
  std::vector<std::vector<BlockStart>> blocks;  // [B], those of all sources in turn
  int64_t most_blocks = 0;                      // of any sample
  std::vector<bool> causal;
  A scale, scale2;  // of the logits, and of the logits in units of ln 2, which the kernels take
  bool of_queries;  // is `present`, [B, L, n]; else [B, n]
  Elements<bool> present;
  Elements<A> bias;  // [B, H, n]

  Attention(const Tensor& query_, const Tensors& keys_, const Tensors& values, const MaybeTensors& lengths,
            const MaybeTensors& masks, const Maybe& present_, const std::vector<bool>& causal_,
            const Maybe& bias_, std::optional<double> scale_, bool by_source)
      : query(query_),
        batch(query_.size(0)),
        heads(query_.size(1)),
        kv_heads(keys_[0].size(1)),
        queries(query_.size(2)),
        depth(query_.size(3)),
        value_depth(values[0].size(3)),
        sources(keys_.size()),
        group(heads / kv_heads),
        rows(group * queries),
        keys(batch * sources),
        joint(batch, 0),
        blocks(batch),
        causal(causal_),
        scale(scale_or_default(scale_)),
        scale2(scale_or_default(scale_) * LOG2_E<double>),
        of_queries(present_ && present_->dim() == 3),
        present(present_, true),
        bias(bias_, 0) {
    for (int64_t i = 0; i < sources; ++i) {
      key.emplace_back(keys_[i]);
      value.emplace_back(values[i]);
      joins.push_back(!by_source && !bias_ && !causal[i] && !of_queries);
      for (int64_t b = 0; b < batch; ++b) {
        const Keys& own = keys[b * sources + i] = find(i, b, lengths[i], masks[i]);
        if (joins[i])
          joint[b] += own.count;
        else
          for (int64_t first = 0; first < own.count; first += block_keys) blocks[b].push_back({i, first});
      }
    }
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t first = 0; first < joint[b]; first += block_keys) blocks[b].push_back({sources, first});
      most_blocks = std::max<int64_t>(most_blocks, blocks[b].size());
    }
  }

  const Keys& of(int64_t b, int64_t i) const { return keys[b * sources + i]; }

  // Row r of a key head's is query r % L of its query head r / L.
  int64_t head(int64_t kv_head, int64_t r) const { return kv_head * group + r / queries; }
  const T* query_row(int64_t b, int64_t kv_head, int64_t r) const {
    return query.row(b, head(kv_head, r), r % queries);
  }
  // ... and row output_row of a contiguous [B, H, L].
  int64_t output_row(int64_t b, int64_t kv_head, int64_t r) const {
    return (b * heads + kv_head * group) * queries + r;
  }

  // How many keys of source i row r sees: the first so many.
  int64_t seen(int64_t b, int64_t kv_head, int64_t i, int64_t r) const {
    if (i == sources) return joint[b];
    const Keys& k = of(b, i);
    if (k.count == 0 || bias(b, head(kv_head, r), i) == -std::numeric_limits<A>::infinity()) return 0;
    const int64_t l = r % queries;
    if (of_queries && !present(b, l, i)) return 0;
    if (!causal[i]) return k.count;
    const int64_t end = std::clamp<int64_t>(l + key[i].rows - queries + 1, 0, key[i].rows);
    return k.before.empty() ? std::min(end, k.count) : k.before[end];
  }

 private:
  double scale_or_default(std::optional<double> given) const {
    return given ? *given : 1 / std::sqrt(static_cast<double>(depth));
  }
  Keys find(int64_t i, int64_t b, const Maybe& length, const Maybe& mask) const {
    Keys k;
    if (!of_queries && !present(b, i)) return k;
    int64_t end = key[i].rows;
    if (length) {
      const int64_t at = b * length->stride(0);
      const int64_t given = length->scalar_type() == ScalarType::Int
                                ? static_cast<const int32_t*>(length->data_ptr())[at]
                                : static_cast<const int64_t*>(length->data_ptr())[at];
      end = std::clamp<int64_t>(given, 0, end);
    }
    k.count = end;
    if (!mask) return k;
    const Elements<bool> visible(mask, true);
    if (causal[i]) k.before.assign(key[i].rows + 1, 0);
    for (int64_t s = 0; s < end; ++s) {
      if (visible(b, s)) k.at.push_back(s);
      if (causal[i]) k.before[s + 1] = k.at.size();
    }
    if (causal[i]) std::fill(k.before.begin() + end, k.before.end(), k.at.size());
    k.count = k.at.size();
    return k;
  }
};

// Up to block_keys keys of one head, in the order in which queries see them, and their values.
template <class T>
struct Block {
  static constexpr int64_t MOST_KEYS = AttentionKernels<T>::MOST_KEYS;
  // Keys from ... until of the block are those of one source from number `first` on.
  struct Part {
    int64_t source, first, from, until;
  };
  int64_t first, count, part_count = 0;
  Part part[MOST_KEYS];  // more than one in the joint only
  const T *key[MOST_KEYS], *value[MOST_KEYS];

  Block(const Attention<T>& a, int64_t b, int64_t kv_head, BlockStart start) : first(start.first) {
    const bool joint = start.source == a.sources;
    count = std::min(a.block_keys, (joint ? a.joint[b] : a.of(b, start.source).count) - first);
    int64_t i = joint ? 0 : start.source, at = first;
    for (int64_t j = 0; j < count; ++i) {
      if (joint && !a.joins[i]) continue;
      const int64_t here = std::min(count - j, a.of(b, i).count - at);
      if (here > 0) take(a, b, kv_head, {i, at, j, j + here}), j += here;
      at = std::max<int64_t>(at - a.of(b, i).count, 0);
    }
  }

 private:
  void take(const Attention<T>& a, int64_t b, int64_t kv_head, const Part& p) {
    part[part_count++] = p;
    const Keys& own = a.of(b, p.source);
    const auto gather = [&](const T** to, const Heads<T>& heads) {
      const T* const start = heads.row(b, kv_head, 0);
      const int64_t stride = heads.row_stride, less = p.first - p.from;
      if (own.at.empty())
        for (int64_t j = p.from; j < p.until; ++j) to[j] = start + (j + less) * stride;
      else
        for (int64_t j = p.from; j < p.until; ++j) to[j] = start + own.at[j + less] * stride;
    };
    gather(key, a.key[p.source]);
    gather(value, a.value[p.source]);
  }
};

// The blocks of a head's keys in turn. While one is worked on, step() asks for some of the next one's rows:
// they come from memory, which would otherwise rest now and be waited for then.
template <class T>
class BlockWalk {
 public:
  BlockWalk(const Attention<T>& a, int64_t b, int64_t kv_head, int64_t end)
      : a_(a), b_(b), kv_head_(kv_head), end_(end) {}

  // Goes to block n; the work on it has so many steps.
  const Block<T>& go_to(int64_t n, int64_t steps) {
    auto &next = two_[now_], &now = two_[now_ ^= 1];
    if (next_at_ != n) make(now, n);
    row_ = of_step_ = 0;
    if (n + 1 < end_ && steps) {
      make(next, next_at_ = n + 1);
      of_step_ = parts(next->count, steps);
    }
    return *now;
  }
  void step() {
    if (of_step_ == 0) return;
    const Block<T>& next = *two_[now_ ^ 1];
    for (const int64_t until = std::min(row_ + of_step_, next.count); row_ < until; ++row_) {
      ask(next.key[row_], a_.depth);
      ask(next.value[row_], a_.value_depth);
    }
  }

 private:
  void make(std::optional<Block<T>>& block, int64_t n) { block.emplace(a_, b_, kv_head_, a_.blocks[b_][n]); }
  static void ask(const T* row, int64_t width) {
    for (int64_t d = 0; d < width; d += 64 / sizeof(T)) __builtin_prefetch(row + d, 0, 2);
  }

  const Attention<T>& a_;
  int64_t b_, kv_head_, end_, next_at_ = -1, of_step_ = 0, row_ = 0;
  std::optional<Block<T>> two_[2];
  int now_ = 0;
};

// The rows of a tile that see anything of a block, and how many of its keys. `row` goes on to a whole tile,
// since rows that lie evenly are multiplied in place: if all see something, with the tile's rows behind the
// last, whose sums nobody reads, else with the last again.
template <class T>
struct Viewers {
  static constexpr int64_t MOST_ROWS = TileKernels<T>::MOST_ROWS;
  int64_t row[MOST_ROWS], keys[MOST_ROWS], count = 0, most = 0, least = AttentionKernels<T>::MOST_KEYS;
  bool all = true;

  // `least_seen`, of any row
  Viewers(const int64_t* seen, int64_t least_seen, int64_t first, int64_t end, const Block<T>& block) {
    if (least_seen - block.first >= block.count) {
      count = end - first, most = least = block.count;
      std::iota(row, row + MOST_ROWS, first);
      std::fill_n(keys, count, block.count);
      return;
    }
    for (int64_t r = first; r < end; ++r) {
      const int64_t n = std::clamp<int64_t>(seen[r] - block.first, 0, block.count);
      if (n == 0) {
        all = false;
        continue;
      }
      row[count] = r, keys[count++] = n;
      least = std::min(least, n), most = std::max(most, n);
    }
    for (int64_t i = count; count && i < MOST_ROWS; ++i) row[i] = all ? first + i : row[count - 1];
  }
};

// Products with a block's keys or values as columns: logits [rows, block_keys].
template <class T, class A = typename wide<T>::type>
class Columns {
 public:
  Columns(int64_t depth, bool in_place)
      : depth_(depth),
        in_place_(in_place),
        packed_(parts(attention_kernels<T>().keys, k_.columns), in_place ? 0 : panel_bytes<T>(depth)) {}

  void take(const T* const* of, int64_t count) {
    of_ = of, count_ = count;
    for (int64_t p = 0; !in_place_ && p * k_.columns < count; ++p)
      k_.pack_columns(packed_.row(p), of + p * k_.columns, depth_, used(p));
  }
  // c [panels][a tile] = left @ the columns, `most` of them
  void multiply(A* c, const T* const* left, int64_t count, int64_t most) const {
    for (int64_t p = 0; p * k_.columns < most; ++p, c += k_.rows * k_.columns)
      if (in_place_)
        k_.multiply_columns(c, nullptr, left, count, of_ + p * k_.columns, used(p), depth_);
      else
        k_.multiply(c, nullptr, left, k_.group, count, packed_.row(p), k_.columns, depth_);
  }

 private:
  int64_t used(int64_t p) const { return std::min(k_.columns, count_ - p * k_.columns); }

  const TileKernels<T>& k_ = tile_kernels<T>();
  int64_t depth_, count_ = 0;
  bool in_place_;
  Buffer<char> packed_;
  const T* const* of_ = nullptr;
};

// Products with rows of features, [rows, features], where they lie or packed.
template <class T, class A = typename wide<T>::type>
class Lines {
 public:
  Lines(int64_t most, int64_t width, bool in_place)
      : width_(width), in_place_(in_place), packed_(panels(), panel_bytes<T>(most)) {}

  int64_t panels() const { return parts(width_, k_.columns); }
  int64_t used(int64_t p) const { return std::min(k_.columns, width_ - p * k_.columns); }
  const T* row(int64_t k) const { return of_[k]; }
  // Rows of float32 that follow one another need no packing, unless what they are multiplied with is packed.
  void take(const T* const* of, int64_t count, bool left_is_packed = false) {
    of_ = of;
    adjacent_ = sizeof(T) > 2 && !left_is_packed && count && of[count - 1] - of[0] == (count - 1) * width_;
    for (int64_t p = 0; p < panels(); ++p)
      if (!lies_ready(p)) k_.pack_rows(packed_.row(p), of, p * k_.columns, count, used(p));
  }
  // c = start + left @ the first `depth` rows, panel p
  void multiply(A* c, const A* const* start, const T* const* left, int64_t step, int64_t count, int64_t p,
                int64_t depth) const {
    if (lies_ready(p))
      k_.multiply_rows(c, start, left, count, of_, p * k_.columns, depth);
    else
      k_.multiply(c, start, left, step, count, packed_.row(p), used(p), depth);
  }

 private:
  bool lies_ready(int64_t p) const { return (in_place_ || adjacent_) && used(p) == k_.columns; }

  const TileKernels<T>& k_ = tile_kernels<T>();
  int64_t width_;
  bool in_place_, adjacent_ = false;
  Buffer<char> packed_;
  const T* const* of_ = nullptr;
};

// Rows of sums, laid out as the tiles that they are made in.
template <class T, class A = typename wide<T>::type>
class RowSums {
 public:
  RowSums(int64_t rows, int64_t width)
      : panels_(parts(width, k_.columns)), tiles_(parts(rows, k_.rows)), of_(tiles_, panels_ * size()) {}

  void clear() { std::fill_n(of_.data(), tiles_ * panels_ * size(), A(0)); }
  A* row(int64_t r, int64_t p) const { return of_.row(r / k_.rows) + p * size() + r % k_.rows * k_.columns; }
  int64_t panels() const { return panels_; }
  void scale(int64_t r, A factor) const {
    for (int64_t p = 0; p < panels_; ++p) attention_kernels<T>().scale(row(r, p), factor, k_.columns);
  }
  // to = factor * row r
  void put(T* to, int64_t r, A factor, int64_t width) const {
    scale(r, factor);
    for (int64_t p = 0; p < panels_; ++p)
      row_kernels<T>().narrow(to + p * k_.columns, row(r, p), std::min(k_.columns, width - p * k_.columns));
  }

  // The rows of a tile take on weights [a tile's rows, block_keys] @ lines. What only some of the rows see
  // they add one by one: 0 times what the others do not see could be nan.
  void add(const Viewers<T>& v, int64_t block_count, const Buffer<T>& weights, int64_t first_weight,
           const Lines<T>& lines) {
    const T* left[TileKernels<T>::MOST_ROWS];
    const A* start[TileKernels<T>::MOST_ROWS];
    const int64_t common = v.least == block_count ? v.least : v.least / k_.group * k_.group;
    for (int64_t i = 0; i < k_.rows; ++i) left[i] = weights.row(first_weight + i);
    alignas(64) A apart[TileKernels<T>::MOST_ROWS * TileKernels<T>::MOST_COLUMNS];
    for (int64_t p = 0; p < panels_; ++p) {
      A* const c = v.all ? row(v.row[0], p) : apart;
      for (int64_t i = 0; i < k_.rows; ++i) start[i] = v.all ? c + i * k_.columns : row(v.row[i], p);
      if (common) lines.multiply(c, start, left, k_.group, v.count, p, common);
      if (v.all && common == v.most) continue;
      for (int64_t i = 0; i < v.count; ++i) {
        A* const to = row(v.row[i], p);
        if (common && !v.all) std::copy_n(c + i * k_.columns, lines.used(p), to);
        for (int64_t j = common; j < v.keys[i]; ++j)
          row_kernels<T>().accumulate(to, as_wide(weights.row(first_weight + i)[j]),
                                      lines.row(j) + p * k_.columns, lines.used(p));
      }
    }
  }

 private:
  static A as_wide(T x) {
    if constexpr (sizeof(T) == 2)
      return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
    else
      return x;
  }
  int64_t size() const { return k_.rows * k_.columns; }

  const TileKernels<T>& k_ = tile_kernels<T>();
  int64_t panels_, tiles_;
  Buffer<A> of_;
};

// At so few rows packing takes longer than it saves.
template <class T>
constexpr int64_t FEW_ROWS = 4 * sizeof(T);

}  // namespace mmfast
