// Products in the tiles of AMX, for tiles.cpp: its eight registers hold 16 rows of 64 bytes each, and pairs
// of bfloat16 are what it multiplies. Four are sums, 32 rows by 32 columns, two the left-hand side and two
// the right-hand side of 32 k. A tile of sums as tiles.h means it is twice as wide, so that what makes
// softmaxes of it need not know of AMX.
//
// A float32 has 24 bits, which are those of three bfloat16: x = x0 + x1 + x2, to the bit, x1 at most 2^-8 and
// x2 at most 2^-17 of x0. Of the nine products of two such sums the six largest are made; the others are at
// most 2^-24 of the whole, as much as float32 rounds off, and mostly far less (Henry, Tang and Heinecke 2019,
// "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations"). Six at
// sixteen times the rate take less than half the time of AVX-512's products of float32, and round a sum less
// often: six times in 32 k. AMX takes what is below 2^-126 for 0, in the pieces too: elements below 2^-103
// lose digits. From 2^128 - 2^119 on one counts as infinite.
//
// What is packed is packed as the registers hold it. Left: [depth / 32, pieces, 32 rows, 32 k]. Right:
// [depth / 32, pieces, 4 times 16 columns, 16 pairs of k, 16 columns, 2 k]. Pairs are neighbours in bfloat16,
// and of float32 k and k + 16.
#pragma once

#include "activations.h"

namespace {
namespace amx {

constexpr int64_t DEPTH = 32, ROWS = TILE_ROWS<bf16>, WIDTH = COLUMNS<bf16>, SIDE = 16, TILE = 1024;
constexpr int64_t LINE = WIDTH * sizeof(float);  // bytes of a row of sums
constexpr int64_t RIGHT = WIDTH * BYTES;         // bytes of a piece of DEPTH packed k
// Rows, see tiles.h; of float32 none, since AVX-512 makes other bits.
template <class T>
constexpr int64_t FEW = sizeof(T) == 2 ? 8 : 0;
template <class T>
constexpr int64_t PIECES = sizeof(T) == 2 ? 1 : 3;
template <class T>
constexpr int64_t PARTS = DEPTH * sizeof(T) / BYTES;  // vectors of DEPTH elements

// The compiler does not know what the intrinsics read.
void settle() { asm volatile("" ::: "memory"); }

void begin() {
  struct alignas(64) {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int i = 0; i < 8; ++i) shapes.bytes[i] = BYTES, shapes.rows[i] = SIDE;
  settle();
  _tile_loadconfig(&shapes);
}
void end() { _tile_release(); }

const char* bytes(const void* p) { return static_cast<const char*>(p); }

template <class V>
void put(void* to, const V& line) {
  static_assert(sizeof(V) == BYTES);
  __builtin_memcpy(to, &line, BYTES);
}

// DEPTH elements as they lie in a register's line: bfloat16, or float32 in two vectors.
template <class T>
struct Line {
  Uint of[PARTS<T>];

  // Its pieces, `apart` bytes from each other.
  void put(char* to, int64_t apart) const {
    if constexpr (PARTS<T> == 1) {
      amx::put(to, of[0]);
    } else {
      constexpr uint32_t HALF = 0x8000, UPPER = 0xffff0000;
      const auto join = [](Uint low, Uint high) {
        return (Uint)_mm512_mask_mov_epi16((__m512i)(low >> 16), 0xaaaaaaaa, (__m512i)high);
      };
      const Uint low0 = (of[0] + HALF) & UPPER, high0 = (of[1] + HALF) & UPPER;
      amx::put(to, join(low0, high0));
      const Float low = (Float)of[0] - (Float)low0, high = (Float)of[1] - (Float)high0;
      const Uint low1 = ((Uint)low + HALF) & UPPER, high1 = ((Uint)high + HALF) & UPPER;
      amx::put(to + apart, join(low1, high1));
      // what is left has no more than 8 bits, or is NaN
      amx::put(to + 2 * apart, join((Uint)(low - (Float)low1), (Uint)(high - (Float)high1)));
    }
  }
};

// `count` elements that follow one another, of which there may be none or more than a line has.
template <class T>
Line<T> some(const T* p, int64_t count) {
  constexpr int64_t L = BYTES / sizeof(T);
  Line<T> line{};
  if (count >= DEPTH)
    for (int64_t h = 0; h < PARTS<T>; ++h) line.of[h] = bits<Uint>(p + h * L, L);
  else
    for (int64_t h = 0; h < PARTS<T> && count > h * L; ++h)
      line.of[h] = head<Uint>(p + h * L, count - h * L < L ? count - h * L : L);
  return line;
}

// Pair p of SIDE columns from `first` on; `count` of them and `left` k are there.
template <class T>
Line<T> pair(const T* const* row, int64_t p, int64_t first, int64_t count, int64_t left) {
  const auto line = [&](int64_t k) {
    if constexpr (sizeof(T) == 2)
      return (Uint)_mm512_cvtepu16_epi32((__m256i)head<Half>(row[k] + first, count));
    else
      return head<Uint>(row[k] + first, count);
  };
  const auto there = [&](int64_t k) { return k < left && count > 0 ? line(k) : Uint{}; };
  if constexpr (sizeof(T) == 2)
    return {there(2 * p) | there(2 * p + 1) << 16};
  else if (count >= SIDE && left >= DEPTH)
    return {bits<Uint>(row[p] + first, SIDE), bits<Uint>(row[p + SIDE] + first, SIDE)};
  else
    return {there(p), there(p + SIDE)};
}

// Sixteen lines become what stands in their columns.
template <class T, class F>
void turn(char* to, int64_t apart, F line) {
  Lines of[PARTS<T>];
#pragma GCC unroll 16
  for (int64_t i = 0; i < SIDE; ++i) {
    const Line<T> l = line(i);
    for (int64_t h = 0; h < PARTS<T>; ++h) of[h][i] = l.of[h];
  }
  for (Lines& lines : of) transpose(lines);
#pragma GCC unroll 16
  for (int64_t i = 0; i < SIDE; ++i) {
    Line<T> l;
    for (int64_t h = 0; h < PARTS<T>; ++h) l.of[h] = of[h][i];
    l.put(to + i * BYTES, apart);
  }
}

template <class T>
void pack_left(void* to_, const T* const* from, int64_t first, int64_t depth, int64_t count) {
  char* to = static_cast<char*>(to_);
  for (int64_t k = 0; k < depth; k += DEPTH, to += PIECES<T> * ROWS * BYTES)
    for (int64_t i = 0; i < ROWS; i += SIDE) {
      const int64_t used = count - i < SIDE ? count - i : SIDE;
      turn<T>(to + i * BYTES, ROWS * BYTES,
              [&](int64_t p) { return pair(from + k, p, first + i, used, depth - k); });
    }
}

template <class T>
void pack_rows(void* to_, const T* const* from, int64_t first, int64_t depth, int64_t count) {
  char* to = static_cast<char*>(to_);
  for (int64_t k = 0; k < depth; k += DEPTH, to += PIECES<T> * RIGHT)
    for (int64_t j = 0; j < WIDTH; j += SIDE) {
      const int64_t used = count - j < SIDE ? count - j : SIDE;
      for (int64_t p = 0; p < SIDE; ++p)
        pair(from + k, p, first + j, used, depth - k).put(to + (j + p) * BYTES, RIGHT);
    }
}

template <class T>
void pack_columns(void* to_, const T* const* from, int64_t depth, int64_t count) {
  char* to = static_cast<char*>(to_);
  for (int64_t k = 0; k < depth; k += DEPTH, to += PIECES<T> * RIGHT)
    for (int64_t j = 0; j < WIDTH; j += SIDE)
      turn<T>(to + j * BYTES, RIGHT,
              [&](int64_t i) { return j + i < count ? some(from[j + i] + k, depth - k) : Line<T>{}; });
}

// Bytes from one of so many rows to the next, -1 where they do not lie evenly.
template <class X>
int64_t stride_of(const X* const* row, int64_t rows) {
  const int64_t stride = bytes(row[1]) - bytes(row[0]);
  bool even = true;
  for (int64_t i = 2; i < rows; ++i) even &= bytes(row[i]) - bytes(row[i - 1]) == stride;
  return even ? stride : -1;
}

// Where the left-hand side lies that the registers take: bytes from row to row, from piece to piece, and from
// group of k to group of k.
struct Left {
  const char* at;
  int64_t row, piece, group;
};

// `rows` rows, 16 or 32, and 32 columns of c = start + left @ right, over `groups` of k; after every four
// products meanwhile().
template <class T, int64_t rows, class F>
void multiply_half(float* c, const float* start, int64_t of_start, Left left, const char* right,
                   int64_t groups, F meanwhile) {
  constexpr bool two = rows > SIDE;
  if (const char* const from = bytes(start)) {
    _tile_loadd(0, from, of_start);
    _tile_loadd(1, from + BYTES, of_start);
    if (two) _tile_loadd(2, from + SIDE * of_start, of_start);
    if (two) _tile_loadd(3, from + SIDE * of_start + BYTES, of_start);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if (two) _tile_zero(2);
    if (two) _tile_zero(3);
  }
  for (int64_t g = 0; g < groups; ++g, left.at += left.group, right += PIECES<T> * RIGHT) {
    const auto load_left = [&](int piece) {
      const char* const from = left.at + piece * left.piece;
      _tile_loadd(4, from, left.row);
      if (two) _tile_loadd(5, from + SIDE * left.row, left.row);
    };
    const auto load_right = [&](int piece) {
      _tile_loadd(6, right + piece * RIGHT, BYTES);
      _tile_loadd(7, right + piece * RIGHT + TILE, BYTES);
    };
    const auto multiply = [&] {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (two) _tile_dpbf16ps(2, 5, 6);
      if (two) _tile_dpbf16ps(3, 5, 7);
      meanwhile();
    };
    if constexpr (PIECES<T> == 1) {
      load_right(0), load_left(0), multiply();
    } else {  // one side changes at a time
      load_left(0), load_right(2), multiply();
      load_right(1), multiply();
      load_left(1), multiply();
      load_right(0), multiply();
      load_left(2), multiply();
      load_left(0), multiply();
    }
  }
  _tile_stored(0, c, LINE);
  _tile_stored(1, c + SIDE, LINE);
  if (two) _tile_stored(2, c + SIDE * WIDTH, LINE);
  if (two) _tile_stored(3, c + SIDE * WIDTH + SIDE, LINE);
}

constexpr auto nothing = [] {};

template <int64_t rows>
void multiply_tile(float* c, const float* const* start, const bf16* const* left, int64_t step,
                   const char* right, int64_t used, int64_t depth) {
  const float* first = start ? start[0] : nullptr;
  int64_t of_start = start ? stride_of(start, rows) : 0;
  if (of_start < 0) {
    for (int64_t i = 0; i < rows; ++i)
      if (start[i] != c + i * WIDTH) __builtin_memcpy(c + i * WIDTH, start[i], LINE);
    first = c, of_start = LINE;
  }
  const auto add = [&](Left from, int64_t groups) {
    settle();
    for (int64_t j = 0; j < used; j += 2 * SIDE)
      multiply_half<bf16, rows>(c + j, first ? first + j : nullptr, of_start, from, right + j * BYTES, groups,
                                nothing);
    first = c, of_start = LINE, right += groups * RIGHT;
  };

  // Rows are read where they lie if they lie evenly. Only what is packed has zeros behind its end.
  const int64_t of_left = stride_of(left, rows);
  const bool packed = step != DEPTH;
  const int64_t there = packed ? (depth + DEPTH - 1) / DEPTH : of_left < 0 ? 0 : depth / DEPTH;
  if (there || depth == 0) add({bytes(left[0]), of_left, 0, step * int64_t{sizeof(bf16)}}, there);
  for (int64_t k = there * DEPTH; k < depth;) {
    constexpr int64_t GROUPS = 8, GROUP = rows * BYTES;
    alignas(64) char apart[GROUPS * GROUP];
    int64_t groups = 0;
    for (; groups < GROUPS && k < depth; ++groups, k += DEPTH)
      for (int64_t i = 0; i < rows; ++i)
        some(left[i] + k, depth - k).put(apart + groups * GROUP + i * BYTES, rows * BYTES);
    add({apart, BYTES, 0, GROUP}, groups);
  }
}

// Element k of a line of float32 whose pieces are `apart` bytes from each other. Where it is infinite so is
// the first of them, and the last is NaN.
float joined(const char* line, int64_t apart, int64_t k) {
  float sum = 0;
  for (int64_t p = 0; p < PIECES<float>; ++p) {
    uint16_t half;
    __builtin_memcpy(&half, line + p * apart + (k % SIDE * 2 + k / SIDE) * sizeof(half), sizeof(half));
    const float piece = __builtin_bit_cast(float, uint32_t{half} << 16);
    sum += piece;
    if (__builtin_isinf(sum)) break;
  }
  return sum;
}

// into(i, j, sums) takes each vector of complete sums.
template <int64_t rows, class F>
void multiply_tile(float* c, const float* const* start, const float* const* left, int64_t step, int64_t count,
                   const char* right, int64_t used, int64_t depth, F into) {
  constexpr int64_t P = PIECES<float>;
  constexpr int64_t BLOCK = 512;  // k of a chain of additions, see tiles.cpp
  constexpr Left PACKED = {nullptr, BYTES, ROWS * BYTES, P * ROWS * BYTES};
  const bool packed = step != DEPTH;
  alignas(64) float sums[rows * WIDTH];
  const auto add = [&](Left from, int64_t k, int64_t groups, auto meanwhile) {
    settle();
    for (int64_t j = 0; j < used; j += 2 * SIDE)
      multiply_half<float, rows>(sums + j, k % BLOCK ? sums + j : nullptr, LINE, from,
                                 right + k / DEPTH * P * RIGHT + j * BYTES, groups, meanwhile);
    settle();
  };
  // One by one: an infinite element's pieces are inf - inf, and those of a finite product may reach infinity.
  const auto sum = [&](int64_t i, int64_t j, int64_t k, int64_t end) {
    float all = 0;
    for (; k < end && all == all; ++k) {
      const int64_t g = k / DEPTH, at = k % DEPTH;
      const float x =
          packed ? joined(bytes(left[0]) + g * PACKED.group + i * BYTES, PACKED.piece, at) : left[i][k];
      const char* const line = right + g * P * RIGHT + (j / SIDE * SIDE + at % SIDE) * BYTES;
      all += x * joined(line, RIGHT, j % SIDE + at / SIDE * SIDE);
    }
    return all;
  };
  const auto finish = [&](int64_t k, int64_t end) {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < used; j += SIDE) {
        float* const own = sums + i * WIDTH + j;
        const auto all = [own] { return bits<Float>(own, SIDE); };
        const Float nothing = all() - all();  // or NaN where it is not finite
        if (_mm512_cmp_ps_mask((__m512)nothing, (__m512)nothing, _CMP_UNORD_Q))
          for (int64_t n = 0; n < SIDE; ++n)
            if (j + n < used && own[n] - own[n] != 0) own[n] = sum(i, j + n, k, end);
        const float* const before = k ? c + i * WIDTH : start ? start[i] : nullptr;
        const Float x = before ? all() + bits<Float>(before + j, SIDE) : all();
        if (end == depth)
          into(i, j, x);
        else
          put(c + i * WIDTH + j, x);
      }
  };
  const auto end_of = [depth](int64_t k) { return depth < k ? depth : k; };

  if (depth == 0) {
    __builtin_memset(sums, 0, sizeof(sums));
    finish(0, 0);
  }
  if (packed) {
    Left from = PACKED;
    from.at = bytes(left[0]);
    for (int64_t k = 0; k < depth; k += BLOCK, from.at += BLOCK / DEPTH * from.group) {
      const int64_t end = end_of(k + BLOCK);
      add(from, k, (end - k + DEPTH - 1) / DEPTH, nothing);
      finish(k, end);
    }
    return;
  }
  // The next ones are split while these are multiplied, which takes units of its own.
  constexpr int64_t GROUPS = 2, AHEAD = GROUPS * DEPTH, GROUP = P * rows * BYTES;
  constexpr int64_t STEP = (rows + 11) / 12;  // lines at each of the 12 times that come for a group
  alignas(64) char memory[2][GROUPS * GROUP];
  char *now = memory[0], *later = memory[1];
  const auto lines = [&](int64_t k) {
    return k < depth ? (end_of(k + AHEAD) - k + DEPTH - 1) / DEPTH * rows : 0;
  };
  const auto split = [&](char* to, int64_t k, int64_t line) {
    const int64_t g = line / rows, i = line % rows, at = k + g * DEPTH;
    some(left[i] + at, depth - at).put(to + g * GROUP + i * BYTES, rows * BYTES);
  };
  for (int64_t k = 0, done = 0; k < depth; k += AHEAD) {
    for (; done < lines(k); ++done) split(now, k, done);
    done = 0;
    const int64_t all = lines(k + AHEAD);
    add({now, BYTES, rows * BYTES, GROUP}, k, lines(k) / rows, [&] {
      for (int64_t n = 0; n < STEP && done < all; ++n) split(later, k + AHEAD, done++);
    });
    const int64_t end = end_of(k + AHEAD);
    if (end % BLOCK == 0 || end == depth) finish((end - 1) / BLOCK * BLOCK, end);
    char* const free = now;
    now = later, later = free;
  }
}

template <class T>
void multiply(float* c, const float* const* start, const T* const* left, int64_t step, int64_t count,
              const void* right, int64_t used, int64_t depth) {
  const auto of = [=]<int64_t rows> {
    if constexpr (PIECES<T> == 1)
      multiply_tile<rows>(c, start, left, step, bytes(right), used, depth);
    else
      multiply_tile<rows>(c, start, left, step, count, bytes(right), used, depth,
                          [c](int64_t i, int64_t j, const Float& x) { put(c + i * WIDTH + j, x); });
  };
  count > SIDE ? of.template operator()<2 * SIDE>() : of.template operator()<SIDE>();
}

void multiply_into(float* const* out, float* const* preact, mmfast::Activation activation, float* c,
                   const float* const* start, const float* const* left, int64_t step, const void* right,
                   int64_t depth) {
  multiply_tile<ROWS>(c, start, left, step, ROWS, bytes(right), WIDTH, depth,
                      [=](int64_t i, int64_t j, const Float& x) {
                        if (preact) put(preact[i] + j, x);
                        put(out[i] + j, activate<float>(activation, x));
                      });
}

}  // namespace amx
}  // namespace
