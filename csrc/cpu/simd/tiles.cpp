// See tiles.h. No torch header and no linkage but MM_KERNELS_ENTRY: see dispatch.h.
#include "tiles.h"

#ifdef __AMX_BF16__
#include "amx.h"
#endif
#include "activations.h"

using mmfast::TileKernels;

namespace {

constexpr int ROWS = TILE_ROWS<float>, VECTORS = TILE_VECTORS;  // of vectors of sums

#ifdef __AVX512BF16__
template <class T>
constexpr bool PAIRS = sizeof(T) == 2;  // products of bfloat16, two k at a time
#else
template <class T>
constexpr bool PAIRS = false;
#endif
template <class T>
constexpr int GROUP = PAIRS<T> ? 2 : 1;

// An element of the packed right-hand side: bfloat16 is widened where there are no pairs.
template <class T>
struct Packed {
  using type = Acc<T>;
};
#ifdef __AVX512BF16__
template <>
struct Packed<bf16> {
  using type = bf16;
};
#endif
template <class T>
using Element = typename Packed<T>::type;

template <class T>
Element<T> packed(T x) {
  if constexpr (sizeof(T) == sizeof(Element<T>))
    return x;
  else
    return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

// to[k / group][j][k % group] = from[k][first + j], as a row's elements lie
template <class T, class To, int WIDTH, class F>
void pack(To* to, const T* const* from, int64_t first, int64_t depth, int64_t count, F convert) {
  constexpr int G = GROUP<T>;
  for (int64_t k = 0; k < depth; k += G, to += WIDTH * G) {
    const T* rows[G];
    for (int g = 0; g < G; ++g) rows[g] = from[k + g < depth ? k + g : k] + first;
    if (count == WIDTH && k + G <= depth)  // the same as below, for the compiler to make vectors of
      for (int j = 0; j < WIDTH; ++j)
        for (int g = 0; g < G; ++g) to[j * G + g] = convert(rows[g][j]);
    else
      for (int j = 0; j < WIDTH; ++j)
        for (int g = 0; g < G; ++g) to[j * G + g] = j < count && k + g < depth ? convert(rows[g][j]) : To{};
  }
}

template <class T>
void pack_left(void* to_, const T* const* from, int64_t first, int64_t depth, int64_t count) {
  T* to = static_cast<T*>(to_);
  int64_t k = 0;
#ifdef __AVX512BF16__
  if constexpr (PAIRS<T>)  // the compiler would move one element at a time
    for (; count == ROWS && k + 2 <= depth; k += 2, to += 2 * ROWS) {
      const __m128i a = _mm_maskz_loadu_epi16((1 << ROWS) - 1, from[k] + first);
      const __m128i b = _mm_maskz_loadu_epi16((1 << ROWS) - 1, from[k + 1] + first);
      _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi16(a, b));
      _mm_storel_epi64((__m128i*)(to + 8), _mm_unpackhi_epi16(a, b));
    }
#endif
  pack<T, T, ROWS>(to, from + k, first, depth - k, count, [](T x) { return x; });
}

template <class T>
void pack_rows(void* to, const T* const* from, int64_t first, int64_t depth, int64_t count) {
  pack<T, Element<T>, COLUMNS<T>>(static_cast<Element<T>*>(to), from, first, depth, count, packed<T>);
}

template <class T>
void pack_columns(void* to_, const T* const* from, int64_t depth, int64_t count) {
  constexpr int64_t G = GROUP<T>, WIDTH = COLUMNS<T>, L = lanes<float>;
  struct Group {
    Element<T> of[G];
  };
  Group* const to = static_cast<Group*>(to_);
  const int64_t groups = (depth + G - 1) / G;
  const auto one = [&](int64_t k, int64_t j) {
    Group group{};
    for (int64_t g = 0; g < G && j < count && k * G + g < depth; ++g)
      group.of[g] = packed(from[j][k * G + g]);
    to[k * WIDTH + j] = group;
  };
  int64_t done = 0;
  if constexpr (sizeof(Group) == 4 && sizeof(T) == sizeof(Element<T>))
    for (; (done + L) * G <= depth; done += L)
      for (int64_t j = 0; j < WIDTH; j += L) {
        static const T nothing[L * G] = {};
        Lines lines;
#pragma GCC unroll 16
        for (int64_t i = 0; i < L; ++i)
          lines[i] = bits<Uint>(j + i < count ? from[j + i] + done * G : nothing, L * G);
        transpose(lines);
#pragma GCC unroll 16
        for (int64_t k = 0; k < L; ++k) __builtin_memcpy(&to[(done + k) * WIDTH + j], &lines[k], BYTES);
      }
  for (; done < groups; ++done)
    for (int64_t j = 0; j < WIDTH; ++j) one(done, j);
}

template <class T>
void add_rows(Acc<T>* sums, const T* const* from, int64_t first, int64_t depth, int64_t count) {
  int64_t j = 0;
  for (; j + COLUMNS<T> <= count; j += COLUMNS<T>) {  // side by side: each addition waits for the one before
    Vec<T> sum[VECTORS] = {};
    for (int64_t k = 0; k < depth; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[v] += load(from[k] + first + j + v * lanes<T>, Whole{});
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) store(sums + j + v * lanes<T>, sum[v], Whole{});
  }
  sweep<Acc<T>>(count - j, [&](int64_t c, auto part) {
    Vec<T> sum{};
    for (int64_t k = 0; k < depth; ++k) sum += load(from[k] + first + j + c, part);
    store(sums + j + c, sum, part);
  });
}

// One group of k: the sums of R rows, V vectors each, take on left[.][at ... at + used) @ right.
template <class T, int R, int V, class Fetch>
__attribute__((always_inline)) inline void step_on(Vec<T> (&sum)[R][V], const T* const* left, int64_t at,
                                                   int64_t k, int used, Fetch fetch) {
  Vec<T> right[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) right[v] = fetch(k, v, used);
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#ifdef __AVX512BF16__
    if constexpr (PAIRS<T>) {
      uint32_t pair = 0;
      __builtin_memcpy(&pair, left[i] + at, used * sizeof(T));
      const auto a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sum[i][v] = (Float)_mm512_dpbf16_ps((__m512)sum[i][v], a, (__m512bh)right[v]);
    } else
#endif
    {
      const Vec<T> a = packed(left[i][at]) - Vec<T>{};  // everywhere; x - 0 is x, its sign included
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] += a * right[v];
    }
  }
}

// One chain of n additions loses about n eps, chains of BLOCK that are then added up sqrt(n BLOCK) eps. For
// bfloat16 either is nothing; float64 is there to be exact.
template <class T>
constexpr int64_t BLOCK = sizeof(T) == 2   ? 1 << 14
                          : sizeof(T) == 4 ? 128
                                           : 16;

template <class T>
auto into_tile(Acc<T>* c) {
  return [c](int i, int v, Vec<T> sum) { __builtin_memcpy(c + (i * VECTORS + v) * lanes<T>, &sum, BYTES); };
}

// R rows of start + left @ right, the first V vectors of each, where fetch(k, v, used) is vector v of the
// right-hand side's rows k ... k + used, as it lies once packed. put(i, v, sums) takes them; c is for what is
// added up on the way.
template <class T, int R, int V = VECTORS, class Fetch, class Put>
__attribute__((always_inline)) inline void multiply_by(Acc<T>* c, const Acc<T>* const* start,
                                                       const T* const* left, int64_t step, int64_t depth,
                                                       Fetch fetch, Put put) {
  constexpr int64_t G = GROUP<T>;
  const T* row[R];
  const Acc<T>* own[R];
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) row[i] = left[i], own[i] = c + i * COLUMNS<T>;
  int64_t at = 0, k = 0;
  Vec<T> sum[R][V];
  const auto add_up = [&](int64_t end, auto take) __attribute__((always_inline)) {
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] = Vec<T>{};
    for (; k + G <= end; k += G, at += step) step_on<T>(sum, row, at, k, G, fetch);
    if (k < end) step_on<T>(sum, row, at, k, 1, fetch), k = end;
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        take(i, v, start ? sum[i][v] + bits<Vec<T>>(start[i] + v * lanes<T>, lanes<T>) : sum[i][v]);
  };
  for (; depth - k > BLOCK<T>; start = own) add_up(k + BLOCK<T>, into_tile<T>(c));
  add_up(depth, put);
}

template <class T>
auto from_packed(const void* right) {
  return [right](int64_t k, int v, int) {
    const auto* const row = static_cast<const Element<T>*>(right) + k * COLUMNS<T>;
    return bits<Vec<T>>(row + v * lanes<T> * GROUP<T>, lanes<T> * GROUP<T>);
  };
}

// As few vectors of each row as `used` columns need.
template <class T, int V = VECTORS>
void multiply(Acc<T>* c, const Acc<T>* const* start, const T* const* left, int64_t step, int64_t count,
              const void* right, int64_t used, int64_t depth) {
  if constexpr (V > 1)
    if (used <= (V - 1) * lanes<T>)
      return multiply<T, V - 1>(c, start, left, step, count, right, used, depth);
  multiply_by<T, ROWS, V>(c, start, left, step, depth, from_packed<T>(right), into_tile<T>(c));
}

template <class T, Activation activation>
void multiply_into_as(T* const* out, T* const* preact, Acc<T>* c, const Acc<T>* const* start,
                      const T* const* left, int64_t step, const void* right, int64_t depth) {
  multiply_by<T, ROWS>(c, start, left, step, depth, from_packed<T>(right), [=](int i, int v, Vec<T> sum) {
    if (preact) store(preact[i] + v * lanes<T>, sum, Whole{});
    store(out[i] + v * lanes<T>, activate<T>(activation, sum), Whole{});
  });
}

template <class T>
void multiply_into(T* const* out, T* const* preact, Activation activation, Acc<T>* c,
                   const Acc<T>* const* start, const T* const* left, int64_t step, const void* right,
                   int64_t depth) {
  switch (activation) {
    case Activation::relu:
      return multiply_into_as<T, Activation::relu>(out, preact, c, start, left, step, right, depth);
    case Activation::gelu:
      return multiply_into_as<T, Activation::gelu>(out, preact, c, start, left, step, right, depth);
    case Activation::silu:
      return multiply_into_as<T, Activation::silu>(out, preact, c, start, left, step, right, depth);
    default:
      return multiply_into_as<T, Activation::none>(out, preact, c, start, left, step, right, depth);
  }
}

// f<n>(first) for rows first ... first + n of `count`, up to ROWS at once
template <int R = ROWS, class F>
void with_rows(int64_t count, F f, int64_t first = 0) {
  for (; R == ROWS && count > R; first += R, count -= R) f.template operator()<R>(first);
  if constexpr (R > 1)
    if (count < R) return with_rows<R - 1>(count, f, first);
  f.template operator()<R>(first);
}

template <class T>
void multiply_rows(Acc<T>* c, const Acc<T>* const* start, const T* const* left, int64_t count,
                   const T* const* right, int64_t first, int64_t depth) {
  const auto fetch = [right, first](int64_t k, int v, int used) {
    if constexpr (PAIRS<T>) {
      using Line = uint16_t __attribute__((vector_size(BYTES)));
      const int64_t column = first + v / 2 * 2 * lanes<T>;
      Line order;
      for (int i = 0; i < 2 * lanes<T>; ++i) order[i] = i / 2 + v % 2 * lanes<T> + i % 2 * 2 * lanes<T>;
      const Line row = bits<Line>(right[k] + column, 2 * lanes<T>);
      const Line next = used == 2 ? bits<Line>(right[k + 1] + column, 2 * lanes<T>) : Line{};
      return (Vec<T>)__builtin_shuffle(row, next, order);
    } else {
      return load(right[k] + first + v * lanes<T>, Whole{});
    }
  };
  with_rows(count, [&]<int R>(int64_t i) {
    Acc<T>* const own = c + i * COLUMNS<T>;
    multiply_by<T, R>(own, start ? start + i : nullptr, left + i, GROUP<T>, depth, fetch, into_tile<T>(own));
  });
}

// The sum over each vector's lanes, at the front of one vector, by shuffles that need no register for their
// order.
template <class V>
__attribute__((always_inline)) inline V totals(const V (&v)[VECTORS]) {
  constexpr int L = sizeof(V) / sizeof(v[0][0]);
  using Places = decltype(v[0] < v[0]);
  if constexpr (L == 2) {
    return __builtin_shuffle(v[0], v[1], Places{0, 2}) + __builtin_shuffle(v[0], v[1], Places{1, 3});
  } else {
    Places low, high, first, second, fourth, eighth;
    for (int i = 0; i < L; ++i) {
      low[i] = i / 4 * 4 + i % 4 / 2 + i % 2 * L, high[i] = low[i] + 2;
      first[i] = i / 4 * 4 + i % 2 + i % 4 / 2 * L, second[i] = first[i] + 2;
      fourth[i] = (i + 4) % L, eighth[i] = (i + 8) % L;
    }
    // each four of the lanes holds sums of vectors 0 1 0 1, then of 0 1 2 3
    const auto pair = [&](V x, V y) { return __builtin_shuffle(x, y, low) + __builtin_shuffle(x, y, high); };
    const V a = pair(v[0], v[1]), b = pair(v[VECTORS - 2], v[VECTORS - 1]);
    V sum = __builtin_shuffle(a, b, first) + __builtin_shuffle(a, b, second);
    if constexpr (L > 8) sum += __builtin_shuffle(sum, eighth);
    if constexpr (L > 4) sum += __builtin_shuffle(sum, fourth);
    return sum;
  }
}

// `sum` takes on the products of a vector of k, or what Part says of it, of R rows and VECTORS columns.
template <class T, int R, class P>
__attribute__((always_inline)) inline void products(Vec<T> (&sum)[R][VECTORS], const T* const (&left)[R],
                                                    const T* const (&right)[VECTORS], int64_t k, P part) {
#ifdef __AVX512BF16__
  if constexpr (PAIRS<T>) {
    const auto pairs = [k, part](const T* x) {
      if constexpr (__is_same(P, Whole))
        return (__m512bh)bits<Float>(x + k, 2 * lanes<T>);
      else
        return (__m512bh)head<Float>(x + k, part.count);
    };
    __m512bh b[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) b[v] = pairs(right[v]);
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const __m512bh a = pairs(left[i]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = (Float)_mm512_dpbf16_ps((__m512)sum[i][v], a, b[v]);
    }
    return;
  }
#endif
  Vec<T> b[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) b[v] = load(right[v] + k, part);
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
    Vec<T> a = load(left[i] + k, part);
#ifdef __AVX2__
    asm("" : "+v"(a));  // loaded once: the compiler would read it again for each column
#endif
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[i][v] += a * b[v];
  }
}

// R rows and VECTORS columns of c = start + left @ right, both along k. By itself, for then the compiler
// keeps all sums in registers, of which AVX2 has one more than it takes.
template <class T, int R>
__attribute__((noinline)) void multiply_few(Acc<T>* c, const Acc<T>* const* start, int64_t column,
                                            const T* const (&left)[R], const T* const (&right)[VECTORS],
                                            int64_t depth) {
  constexpr int64_t STEP = lanes<T> * GROUP<T>;
  Vec<T> sum[R][VECTORS];
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = Vec<T>{};
  int64_t k = 0;
  for (; k + STEP <= depth; k += STEP) products<T, R>(sum, left, right, k, Whole{});
  if (k < depth) products<T, R>(sum, left, right, k, Part{depth - k});
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
    const Vec<T> before = start ? head<Vec<T>>(start[i] + column, VECTORS) : Vec<T>{};
    put_head(c + i * COLUMNS<T> + column, before + totals(sum[i]), VECTORS);
  }
}

template <class T>
void multiply_columns(Acc<T>* c, const Acc<T>* const* start, const T* const* left, int64_t count,
                      const T* const* right, int64_t columns, int64_t depth) {
  constexpr int64_t NEAR = 48 * lanes<T> * GROUP<T>;  // rows and columns stay in the first cache
  with_rows(count, [&]<int R>(int64_t row) {
    Acc<T>* const own = c + row * COLUMNS<T>;
    const Acc<T>* before[R];
    for (int i = 0; start && i < R; ++i) before[i] = start[row + i];
    bool begins = !start;
    int64_t first = 0;
    do {
      const int64_t used = depth - first < NEAR ? depth - first : NEAR;
      const T *a[R], *b[VECTORS];
      for (int i = 0; i < R; ++i) a[i] = left[row + i] + first;
      for (int64_t j = 0; j < columns; j += VECTORS) {
        for (int v = 0; v < VECTORS; ++v) b[v] = right[j + v < columns ? j + v : j] + first;
        multiply_few<T, R>(own, begins ? nullptr : before, j, a, b, used);
      }
      for (int i = 0; i < R; ++i) before[i] = own + i * COLUMNS<T>;
      begins = false;
      first += used;
    } while (first < depth);
  });
}

static_assert(TileKernels<bf16>::WHOLE_TILES % TILE_ROWS<bf16> == 0 &&
              TileKernels<float>::WHOLE_TILES % ROWS == 0);
static_assert(TILE_ROWS<bf16> <= TileKernels<bf16>::MOST_ROWS && ROWS <= TileKernels<float>::MOST_ROWS &&
              COLUMNS<float> <= TileKernels<float>::MOST_COLUMNS);

#ifdef __AMX_BF16__
static_assert(amx::ROWS <= TileKernels<float>::LARGE_ROWS && amx::WIDTH == COLUMNS<float>);

template <class T>
constexpr TileKernels<T> amx_kernels = {
    .rows = amx::ROWS,
    .columns = amx::WIDTH,
    .group = amx::DEPTH,
    .few = amx::FEW<T>,
    .left_bytes = amx::PIECES<T> * sizeof(bf16),
    .right_bytes = amx::PIECES<T> * sizeof(bf16),
    .begin = amx::begin,
    .end = amx::end,
    .pack_left = amx::pack_left<T>,
    .pack_rows = amx::pack_rows<T>,
    .pack_columns = amx::pack_columns<T>,
    .add_rows = add_rows<T>,
    .multiply = amx::multiply<T>,
    .multiply_rows = multiply_rows<T>,
    .multiply_columns = multiply_columns<T>,
};
constexpr TileKernels<float> amx_floats = [] {
  TileKernels<float> all = amx_kernels<float>;
  all.multiply_into = amx::multiply_into;
  return all;
}();
#endif

template <class T>
constexpr const TileKernels<T>* large_kernels() {
#ifdef __AMX_BF16__
  if constexpr (sizeof(T) == 4) return &amx_floats;
#endif
  return nullptr;
}

template <class T>
constexpr TileKernels<T> kernels = {
    .rows = ROWS,
    .columns = COLUMNS<T>,
    .group = GROUP<T>,
    .few = 16 * sizeof(T),
    .left_bytes = sizeof(T),
    .right_bytes = sizeof(Element<T>),
    .pack_left = pack_left<T>,
    .pack_rows = pack_rows<T>,
    .pack_columns = pack_columns<T>,
    .add_rows = add_rows<T>,
    .multiply = multiply<T>,
    .multiply_into = multiply_into<T>,
    .multiply_rows = multiply_rows<T>,
    .multiply_columns = multiply_columns<T>,
    .large = large_kernels<T>(),
};
#ifdef __AMX_BF16__
template <>
constexpr TileKernels<bf16> kernels<bf16> = amx_kernels<bf16>;
#endif

}  // namespace

MM_KERNELS_ENTRY(tile_kernels)
