// See tiles.h. No torch header and no linkage but MM_ENTRY: see dispatch.h.
#include "tiles.h"

#include "vectors.h"

using mmfast::RowType, mmfast::TileKernels;

namespace {

// 6 x 4 vectors of sums, 4 of the right-hand side and one of the left: 29 of AVX-512's 32 registers. Others
// have 16: 6 x 2 + 2 + 1.
constexpr int ROWS = 6, VECTORS = BYTES == 64 ? 4 : 2;

template <class T>
constexpr int COLUMNS = VECTORS * lanes<T>;

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
void pack_left(T* to, const T* const* from, int64_t first, int64_t depth, int64_t count) {
  pack<T, T, ROWS>(to, from, first, depth, count, [](T x) { return x; });
}

template <class T>
void pack_rows(void* to, const T* const* from, int64_t first, int64_t depth, int64_t count) {
  pack<T, Element<T>, COLUMNS<T>>(static_cast<Element<T>*>(to), from, first, depth, count, packed<T>);
}

using Lines = Uint[lanes<float>];

// Rows become columns: interleaving the halves of the list turns the index's bits by one place each time.
void transpose(Lines& rows) {
  constexpr int L = lanes<float>;
  Uint low{}, high{};
  for (int i = 0; i < L; ++i) {
    low[i] = i / 2 + i % 2 * L;
    high[i] = low[i] + L / 2;
  }
  for (int bit = 1; bit < L; bit *= 2) {
    Lines next;
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + L / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + L / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
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
        Lines lines{};
        for (int64_t i = 0; i < L && j + i < count; ++i)
          __builtin_memcpy(&lines[i], from[j + i] + done * G, BYTES);
        transpose(lines);
#pragma GCC unroll 16
        for (int64_t k = 0; k < L; ++k) __builtin_memcpy(&to[(done + k) * WIDTH + j], &lines[k], BYTES);
      }
  for (; done < groups; ++done)
    for (int64_t j = 0; j < WIDTH; ++j) one(done, j);
}

// One group of k: the sums of a tile take on left[.][0 .. used) @ right[0 .. used)[.]
template <class T>
__attribute__((always_inline)) inline void step_on(Vec<T> (&sum)[ROWS][VECTORS], const T* const* left,
                                                   int64_t at, const Element<T>* right, int used) {
  Vec<T> b[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) __builtin_memcpy(&b[v], right + v * lanes<T> * GROUP<T>, BYTES);
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) {
#ifdef __AVX512BF16__
    if constexpr (PAIRS<T>) {
      uint32_t pair = 0;
      __builtin_memcpy(&pair, left[i] + at, used * sizeof(T));
      const auto a = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v)
        sum[i][v] = (Float)_mm512_dpbf16_ps((__m512)sum[i][v], a, (__m512bh)b[v]);
    } else
#endif
    {
      const Vec<T> a = packed(left[i][at]) - Vec<T>{};  // everywhere; x - 0 is x, its sign included
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[i][v] += a * b[v];
    }
  }
}

// One chain of n additions loses about n eps, chains of BLOCK that are then added up sqrt(n BLOCK) eps.
constexpr int64_t BLOCK = 128;  // groups

template <class T>
void multiply(Acc<T>* c, const Acc<T>* const* start, const T* const* left, int64_t step, const void* right_,
              int64_t depth) {
  constexpr int64_t G = GROUP<T>;
  const Element<T>* right = static_cast<const Element<T>*>(right_);
  const T* row[ROWS];
  const Acc<T>* before[ROWS];
#pragma GCC unroll 6
  for (int i = 0; i < ROWS; ++i) row[i] = left[i], before[i] = start[i];
  int64_t at = 0, rest = depth;
  do {
    const int64_t used = rest < BLOCK * G ? rest : BLOCK * G;
    Vec<T> sum[ROWS][VECTORS] = {};
    for (int64_t k = 0; k < used / G; ++k, at += step, right += COLUMNS<T> * G)
      step_on<T>(sum, row, at, right, G);
    if (G == 2 && used % 2) step_on<T>(sum, row, at, right, 1);
#pragma GCC unroll 6
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        sum[i][v] += bits<Vec<T>>(before[i] + v * lanes<T>, lanes<T>);
        __builtin_memcpy(c + (i * VECTORS + v) * lanes<T>, &sum[i][v], BYTES);
      }
      before[i] = c + i * COLUMNS<T>;
    }
    rest -= used;
  } while (rest > 0);
}

template <class T>
constexpr TileKernels<T> kernels = {ROWS,         COLUMNS<T>,   GROUP<T>,        sizeof(Element<T>),
                                    pack_left<T>, pack_rows<T>, pack_columns<T>, multiply<T>};

}  // namespace

MM_KERNELS_ENTRY(mmfast_tiles)
