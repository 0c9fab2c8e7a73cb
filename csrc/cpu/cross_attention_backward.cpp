// The gradients of cross_attention on the CPU, in one pass over the keys: P and dS of a block of keys are
// made once and serve dQ, dK and dV.
#include "cross_attention.h"

namespace mmfast {
namespace {

// Which gradients are asked for; keys and values have one of each source.
struct Needs {
  bool query, bias;
  std::vector<bool> key, value;

  Needs(const std::vector<bool>& needs, int64_t n)
      : query(needs[0]),
        bias(needs[2 * n + 1]),
        key(needs.begin() + 1, needs.begin() + 1 + n),
        value(needs.begin() + 1 + n, needs.begin() + 1 + 2 * n) {}
};

// Where the gradients go; [B, Hkv, S, features] and dense. A pointer is null where none is asked for.
template <class T>
struct Gradients {
  struct OfSource {
    T* data;
    bool cleared;  // what nobody sees is 0 already

    bool to_clear() const { return data && !cleared; }
  };
  T* query = nullptr;
  std::vector<OfSource> key, value;
};

// Blocks from ... until of the keys of one head's sample.
struct Task {
  int64_t b, kv_head, from, until;
};

template <class T, class A = typename wide<T>::type>
class Worker {
 public:
  // Of queries; their weights stay in the second cache.
  static constexpr int64_t ROWS = TileKernels<T>::WHOLE_TILES;

  Worker(const Attention<T>& a, const Needs& needs, const Heads<T>& grad, const Elements<A>& grad_lse,
         const A* normalizers, const A* delta, const Gradients<T>& out)
      : a_(a),
        needs_(needs),
        grad_(grad),
        grad_lse_(grad_lse),
        normalizers_(normalizers),
        delta_(delta),
        out_(out),
        keys_(a.depth, false),
        values_(a.value_depth, false),
        key_lines_(a.block_keys, a.depth, false),
        query_lines_(ROWS, a.depth, false),
        grad_lines_(ROWS, a.value_depth, false),
        d_key_(a.block_keys, a.depth),
        d_value_(a.block_keys, a.value_depth),
        query_(a.rows),
        grad_row_(a.rows),
        seen_(a.rows),
        seen_of_all_(a.rows),
        bias_(a.rows),
        logits_(parts(a.block_keys, k_.columns), k_.rows * k_.columns),
        d_weights_(parts(a.block_keys, k_.columns), k_.rows * k_.columns),
        p_(ROWS, a.block_keys),
        ds_(ROWS, a.block_keys),
        left_(1, whole_groups<T>(ROWS) * k_.rows) {
    std::fill_n(p_.data(), ROWS * a.block_keys, T{});
    std::fill_n(ds_.data(), ROWS * a.block_keys, T{});
  }

  // d_query becomes what these keys give, and of_source, unless null, the sums of dS and of P [rows, n, 2].
  void run(const Task& task, RowSums<T>& d_query, A* of_source) {
    d_query.clear();
    if (of_source) std::fill_n(of_source, a_.rows * a_.sources * 2, A(0));
    for (int64_t r = 0; r < a_.rows; ++r) {
      query_[r] = a_.query_row(task.b, task.kv_head, r);
      grad_row_[r] = grad_.row(task.b, a_.head(task.kv_head, r), r % a_.queries);
      seen_of_all_[r] = 0;
      for (int64_t i = 0; i < a_.sources; ++i) seen_of_all_[r] += a_.seen(task.b, task.kv_head, i, r);
    }
    const auto& blocks = a_.blocks[task.b];
    const int64_t end = std::min<int64_t>(task.until, blocks.size());
    BlockWalk<T> walk(a_, task.b, task.kv_head, end);
    for (int64_t n = task.from; n < end; ++n) {
      const int64_t i = blocks[n].source;
      if (n == task.from || i != blocks[n - 1].source) {
        for (int64_t r = 0; r < a_.rows; ++r) {
          seen_[r] = a_.seen(task.b, task.kv_head, i, r);
          bias_[r] = a_.bias(task.b, a_.head(task.kv_head, r), i) * LOG2_E<A>;
        }
        least_ = a_.rows ? *std::min_element(seen_.begin(), seen_.end()) : 0;
      }
      block(task, i, walk.go_to(n, parts(a_.rows, ROWS) * parts(ROWS, k_.rows)), walk, d_query, of_source);
    }
  }

 private:
  void block(const Task& task, int64_t i, const Block<T>& block, BlockWalk<T>& walk, RowSums<T>& d_query,
             A* of_source) {
    d_key_.clear();
    d_value_.clear();
    const auto needed = [&](const std::vector<bool>& of) {
      return i < a_.sources ? of[i] : std::find(of.begin(), of.end(), true) != of.end();
    };
    const bool needs_key = needed(needs_.key), needs_value = needed(needs_.value);
    bool ready = false;
    for (int64_t first = 0; first < a_.rows; first += ROWS) {
      int64_t count = 0;  // rows that see anything
      for (int64_t r = first; r < std::min(first + ROWS, a_.rows); r += k_.rows) {
        const Viewers<T> v(seen_.data(), least_, r, std::min({r + k_.rows, first + ROWS, a_.rows}), block);
        walk.step();
        if (v.count == 0) continue;
        if (!ready) {
          keys_.take(block.key, block.count);
          values_.take(block.value, block.count);
          key_lines_.take(block.key, block.count);
          ready = true;
        }
        for (int64_t k = 0; k < v.count; ++k) {
          queries_[count + k] = query_[v.row[k]];
          grads_[count + k] = grad_row_[v.row[k]];
        }
        weights(task, i, v, count, of_source);
        if (needs_.query) d_query.add(v, block.count, ds_, count, key_lines_);
        count += v.count;
      }
      if (count == 0) continue;
      if (needs_value) add_transposed(d_value_, p_, count, block.count, grad_lines_, grads_);
      if (needs_key) add_transposed(d_key_, ds_, count, block.count, query_lines_, queries_);
    }
    for (const auto* p = block.part; p < block.part + block.part_count; ++p) {
      const int64_t head = (task.b * a_.kv_heads + task.kv_head) * a_.key[p->source].rows;
      for (int64_t j = p->from; j < p->until; ++j) {
        const int64_t to = head + a_.of(task.b, p->source).place(p->first + j - p->from);
        if (T* const key = out_.key[p->source].data) d_key_.put(key + to * a_.depth, j, a_.scale, a_.depth);
        if (T* const value = out_.value[p->source].data)
          d_value_.put(value + to * a_.value_depth, j, 1, a_.value_depth);
      }
    }
  }

  // P and dS of a tile's rows, from row `to` of theirs on.
  void weights(const Task& task, int64_t i, const Viewers<T>& v, int64_t to, A* of_source) {
    const auto multiply = [&](const Columns<T>& columns, Buffer<A>& c, const T* const* rows) {
      const T* left[TileKernels<T>::MOST_ROWS];  // a short tile's last row fills it up
      for (int64_t k = 0; k < k_.rows; ++k) left[k] = rows[to + std::min(k, v.count - 1)];
      columns.multiply(c.data(), left, v.count, v.most);
    };
    multiply(keys_, logits_, queries_);
    multiply(values_, d_weights_, grads_);
    for (int64_t k = 0; k < v.count; ++k) {
      const int64_t r = v.row[k], at = a_.output_row(task.b, task.kv_head, r);
      const bool alone = v.keys[k] == seen_of_all_[r];
      const A delta = alone ? -grad_lse_(task.b, a_.head(task.kv_head, r), r % a_.queries) : delta_[at];
      softmax_.softmax_backward(p_.row(to + k), ds_.row(to + k), logits_.data() + k * k_.columns,
                                d_weights_.data() + k * k_.columns, v.keys[k], a_.scale2, bias_[r],
                                normalizers_[2 * at], normalizers_[2 * at + 1], delta, alone,
                                of_source ? of_source + (r * a_.sources + i) * 2 : nullptr);
    }
  }

  // sums [keys] += weights[0 .. count).T @ rows
  void add_transposed(RowSums<T>& sums, const Buffer<T>& weights, int64_t count, int64_t keys,
                      Lines<T>& lines, const T* const* rows) {
    lines.take(rows, count, true);
    const T* from[ROWS];
    for (int64_t k = 0; k < count; ++k) from[k] = weights.row(k);
    const T* left[TileKernels<T>::MOST_ROWS];
    const A* start[TileKernels<T>::MOST_ROWS];
    for (int64_t i = 0; i < k_.rows; ++i) left[i] = left_.data() + i * k_.group;
    for (int64_t j = 0; j < keys; j += k_.rows) {
      k_.pack_left(left_.data(), from, j, count, std::min(k_.rows, a_.block_keys - j));
      for (int64_t p = 0; p < sums.panels(); ++p) {
        for (int64_t i = 0; i < k_.rows; ++i) start[i] = sums.row(j, p) + i * k_.columns;
        lines.multiply(sums.row(j, p), start, left, k_.rows * k_.group, std::min(k_.rows, keys - j), p,
                       count);
      }
    }
  }

  const Attention<T>& a_;
  const Needs& needs_;
  const Heads<T>& grad_;
  const Elements<A>& grad_lse_;
  const A *normalizers_, *delta_;
  const Gradients<T>& out_;
  const TileKernels<T>& k_ = tile_kernels<T>();
  const AttentionKernels<T>& softmax_ = attention_kernels<T>();
  Columns<T> keys_, values_;
  Lines<T> key_lines_, query_lines_, grad_lines_;
  RowSums<T> d_key_, d_value_;
  std::vector<const T*> query_, grad_row_;   // of each row
  std::vector<int64_t> seen_, seen_of_all_;  // its keys of a source, and of all of them
  int64_t least_ = 0;                        // in seen_
  std::vector<A> bias_;
  Buffer<A> logits_, d_weights_;
  Buffer<T> p_, ds_, left_;
  const T *queries_[ROWS], *grads_[ROWS];  // of those that see a block
};

// Elements of the gradients of all heads that are 0 since no query of their sample sees the key or value.
template <class T>
int64_t hidden(const Attention<T>& a, const Gradients<T>& out) {
  int64_t elements = 0;
  for (int64_t i = 0; i < a.sources; ++i) {
    const int64_t width = out.key[i].to_clear() * a.depth + out.value[i].to_clear() * a.value_depth;
    for (int64_t b = 0; b < a.batch; ++b) elements += (a.key[i].rows - a.of(b, i).count) * width;
  }
  return elements * a.kv_heads;
}

// Those of one head; past the caches if `streamed`.
template <class T>
void clear_hidden(const Attention<T>& a, int64_t h, const Gradients<T>& out, bool streamed) {
  constexpr int64_t PAGE = 1024;  // elements; a shorter run is not worth its end
  for (int64_t i = 0; i < a.sources; ++i) {
    const Keys& k = a.of(h / a.kv_heads, i);
    const int64_t size = a.key[i].rows;
    const auto clear_of = [&](const auto& to, int64_t s, int64_t end, int64_t width) {
      if (!to.to_clear()) return;
      T* const first = to.data + (h * size + s) * width;
      const int64_t count = (end - s) * width;
      if (streamed && count >= PAGE)
        row_kernels<T>().stream_zeros(first, count);
      else
        std::fill_n(first, count, T{});
    };
    const auto clear = [&](int64_t s, int64_t end) {
      clear_of(out.key[i], s, end, a.depth);
      clear_of(out.value[i], s, end, a.value_depth);
    };
    int64_t next = 0;
    for (const int64_t s : k.at) clear(next, s), next = s + 1;
    clear(k.at.empty() ? k.count : next, size);
  }
}

// Of one key head h, from the sums of dS and P for each of its rows and sources. A row's dS add up to the
// gradient of its lse, but for what rounding `out` has done to delta, which is taken out here: with few
// sources the difference is all there is.
template <class T, class A = typename wide<T>::type>
void bias_gradient(const Attention<T>& a, int64_t h, const A* of_source, const Elements<A>& grad_lse, A* to) {
  for (int64_t head = h * a.group; head < (h + 1) * a.group; ++head) {
    std::vector<Wider<A>> sums(a.sources, 0);
    for (int64_t l = 0; l < a.queries; ++l, of_source += a.sources * 2) {
      Wider<A> rest = 0, all = 0;
      for (int64_t i = 0; i < a.sources; ++i) rest += of_source[i * 2], all += of_source[i * 2 + 1];
      rest -= grad_lse(head / a.heads, head % a.heads, l);
      for (int64_t i = 0; i < a.sources; ++i)
        if (of_source[i * 2 + 1] != 0) sums[i] += of_source[i * 2] - rest / all * of_source[i * 2 + 1];
    }
    std::copy(sums.begin(), sums.end(), to + head * a.sources);
  }
}

// [B, H, L]: sum of grad * out, less the gradient of lse.
template <class T, class A = typename wide<T>::type>
Buffer<A> deltas(const Attention<T>& a, const Heads<T>& grad, const Elements<A>& grad_lse, const T* out) {
  const int64_t rows = a.batch * a.heads * a.queries;
  Buffer<A> delta(rows, 1);
  parallel_rows(rows, a.value_depth, [&](int64_t from, int64_t until) {
    std::vector<A> wide_out(a.value_depth);
    for (int64_t r = from; r < until; ++r) {
      const int64_t b = r / a.queries / a.heads, h = r / a.queries % a.heads, l = r % a.queries;
      row_kernels<T>().widen(wide_out.data(), out + r * a.value_depth, a.value_depth);
      delta.data()[r] =
          row_kernels<T>().dot(grad.row(b, h, l), wide_out.data(), a.value_depth) - grad_lse(b, h, l);
    }
  });
  return delta;
}

template <class T>
Tensors backward(const Attention<T>& a, const Tensor& grad_, const Maybe& grad_lse_, const Tensor& out,
                 const Tensor& normalizers, const std::vector<bool>& needs_) {
  using A = typename wide<T>::type;
  const Needs needs(needs_, a.sources);
  const Heads<T> grad(grad_);
  const Elements<A> grad_lse(grad_lse_, 0);
  const Buffer<A> delta = deltas(a, grad, grad_lse, data<T>(out));

  Tensors made;
  Gradients<T> to;
  const auto keep = [&](const Tensor& t) { return data<T>(made.emplace_back(t)); };
  if (needs.query) to.query = keep(empty({a.batch, a.heads, a.queries, a.depth}, scalar_type<T>));
  const auto make = [&](int64_t i, bool needed, int64_t width) -> typename Gradients<T>::OfSource {
    if (!needed) return {nullptr, false};
    const Shape shape{a.batch, a.kv_heads, a.key[i].rows, width};
    bool seen = false;
    for (int64_t b = 0; b < a.batch; ++b) seen |= a.of(b, i).count > 0;
    if (!seen)
      if (const auto zeros = untouched_zeros<T>(shape)) return {keep(*zeros), true};
    return {keep(empty(shape, scalar_type<T>)), false};
  };
  for (int64_t i = 0; i < a.sources; ++i) to.key.push_back(make(i, needs.key[i], a.depth));
  for (int64_t i = 0; i < a.sources; ++i) to.value.push_back(make(i, needs.value[i], a.value_depth));
  A* const d_bias =
      needs.bias ? data<A>(made.emplace_back(empty({a.batch, a.heads, a.sources}, scalar_type<A>))) : nullptr;

  // One task a head, or where that leaves threads without, several that share its keys: their dQ are added
  // up, as long as there is memory for them.
  constexpr int64_t LEAST_KEYS = 256, MOST_BYTES = 48 << 20;
  const int64_t heads = a.batch * a.kv_heads, wanted = 4 * torch::stable::get_num_threads();
  const int64_t bytes = std::max<int64_t>(heads * a.rows * a.depth * sizeof(A), 1);
  const int64_t splits =
      heads >= wanted || heads == 0
          ? 1
          : std::clamp<int64_t>(std::min(a.most_blocks * a.block_keys / LEAST_KEYS, MOST_BYTES / bytes), 1,
                                parts(wanted, heads));
  const int64_t span = std::max<int64_t>(parts(a.most_blocks, splits), 1);
  std::vector<RowSums<T>> d_queries;
  if (splits > 1)
    for (int64_t k = 0; k < heads * splits; ++k) d_queries.emplace_back(a.rows, needs.query ? a.depth : 0);
  const int64_t of_bias = needs.bias ? a.rows * a.sources * 2 : 0;
  const Buffer<A> of_sources(heads * splits, of_bias);
  const auto finish = [&](int64_t h, RowSums<T>* sums) {
    A* const of_source = of_sources.row(h * splits);
    for (int64_t s = 1; s < splits; ++s) {
      for (int64_t r = 0; r < a.rows; ++r)
        for (int64_t p = 0; p < sums->panels(); ++p)
          row_kernels<A>().accumulate(sums->row(r, p), 1, sums[s].row(r, p), tile_kernels<T>().columns);
      row_kernels<A>().accumulate(of_source, 1, of_sources.row(h * splits + s), of_bias);
    }
    if (needs.bias) bias_gradient(a, h, of_source, grad_lse, d_bias);
    for (int64_t r = 0; needs.query && r < a.rows; ++r)
      sums->put(to.query + a.output_row(h / a.kv_heads, h % a.kv_heads, r) * a.depth, r, a.scale, a.depth);
  };
  // In the tasks, so that as a rule one thread writes zeros while the others multiply: memory is theirs to
  // share. Of more zeros than a cache holds the first are gone before they are read.
  const int64_t zeros = hidden(a, to);
  const bool streamed = zeros * int64_t(sizeof(T)) > 16 << 20;
  const int64_t cost =
      a.rows * std::min(span, a.most_blocks) * a.block_keys * 5 * (a.depth + a.value_depth) / 2 +
      zeros / std::max<int64_t>(heads * splits, 1);
  take_turns<T>(heads, splits, cost, [&](auto take) {
    Worker<T> worker(a, needs, grad, grad_lse, data<A>(normalizers), delta.data(), to);
    std::optional<RowSums<T>> own;
    if (splits == 1) own.emplace(a.rows, needs.query ? a.depth : 0);
    for (int64_t k; (k = take()) >= 0;) {
      const int64_t h = k / splits, from = k % splits * span;
      RowSums<T>& sums = splits == 1 ? *own : d_queries[k];
      if (from == 0) clear_hidden(a, h, to, streamed);
      worker.run({h / a.kv_heads, h % a.kv_heads, from, from + span}, sums,
                 needs.bias ? of_sources.row(k) : nullptr);
      if (splits == 1) finish(h, &sums);
    }
  });
  if (splits > 1)
    parallel_rows(heads, a.rows * splits * a.depth, [&](int64_t from, int64_t until) {
      for (int64_t h = from; h < until; ++h) finish(h, d_queries.data() + h * splits);
    });
  return made;
}

Tensors cross_attention_backward(Tensor grad, Maybe grad_lse, Tensor query, Tensors keys, Tensors values,
                                 MaybeTensors lengths, MaybeTensors masks, Maybe present,
                                 std::vector<bool> causal, Maybe source_bias, std::optional<double> scale,
                                 Tensor out, Tensor, Tensor normalizers, std::vector<bool> needs) {
  const size_t narrow = std::count(needs.begin(), needs.end() - 1, true);  // all but the bias's gradient
  return by_type("cross_attention: query", query.scalar_type(), narrow, [&](auto zero, auto to) {
    return backward<decltype(zero)>(
        {to(query), to(keys), to(values), lengths, masks, present, causal, source_bias, scale, false},
        to(grad), grad_lse, to(as_contiguous(out)), as_contiguous(normalizers), needs);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mmfast, CPU, m) {
  bind<&cross_attention_backward>(m, "cross_attention_backward.cpu");
}

}  // namespace mmfast
