// Products of bfloat16 in the tiles of AMX, for tiles.cpp: its eight registers hold 16 rows of 64 bytes each.
// Four are sums, 32 rows by 32 columns, two the left-hand side and two the right-hand side of 32 k. A tile of
// sums as tiles.h means it is twice as wide, so that what makes softmaxes of it need not know of AMX.
//
// What is packed is packed as the registers hold it. Left: [depth / 32, 32 rows, 32 k]. Right: [depth / 32,
// 4 times 16 columns, 16 pairs of k, 16 columns, 2 k].
#pragma once

#include "vectors.h"

namespace {
namespace amx {

constexpr int64_t DEPTH = 32, ROWS = TILE_ROWS<bf16>, WIDTH = COLUMNS<bf16>, SIDE = 16, TILE = 1024;
constexpr int64_t FEW = 8;                       // rows, see tiles.h
constexpr int64_t LINE = WIDTH * sizeof(float);  // bytes of a row of sums
constexpr int64_t RIGHT = WIDTH / SIDE * TILE;   // bytes of DEPTH packed k

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

template <class X>
const char* bytes(const X* p) {
  return reinterpret_cast<const char*>(p);
}

// `count` elements, of which there may be none or more than a vector has.
Uint some(const bf16* p, int64_t count) {
  return count >= DEPTH ? bits<Uint>(p, DEPTH) : count > 0 ? head<Uint>(p, count) : Uint{};
}
// Pairs of two rows' elements.
Uint zip(const bf16* const* row, int64_t first, int64_t count, int64_t left) {
  const auto line = [&](int64_t k) {
    return k < left && count > 0 ? (Uint)_mm512_cvtepu16_epi32((__m256i)head<Half>(row[k] + first, count))
                                 : Uint{};
  };
  return line(0) | line(1) << 16;
}
void put(void* to, const Uint& line, int64_t at) { __builtin_memcpy((char*)to + at * BYTES, &line, BYTES); }

void pack_left(bf16* to, const bf16* const* from, int64_t first, int64_t depth, int64_t count) {
  for (int64_t k = 0; k < depth; k += DEPTH)
    for (int64_t i = 0; i < ROWS; i += SIDE, to += SIDE * DEPTH) {
      const int64_t used = count - i < SIDE ? count - i : SIDE;
      Lines pairs;
#pragma GCC unroll 16
      for (int64_t p = 0; p < SIDE; ++p) pairs[p] = zip(from + k + 2 * p, first + i, used, depth - k - 2 * p);
      transpose(pairs);
#pragma GCC unroll 16
      for (int64_t r = 0; r < SIDE; ++r) put(to, pairs[r], r);
    }
}

void pack_rows(void* to_, const bf16* const* from, int64_t first, int64_t depth, int64_t count) {
  char* to = static_cast<char*>(to_);
  for (int64_t k = 0; k < depth; k += DEPTH)
    for (int64_t j = 0; j < WIDTH; j += SIDE, to += TILE) {
      const int64_t used = count - j < SIDE ? count - j : SIDE;
      for (int64_t p = 0; p < SIDE; ++p)
        put(to, zip(from + k + 2 * p, first + j, used, depth - k - 2 * p), p);
    }
}

void pack_columns(void* to_, const bf16* const* from, int64_t depth, int64_t count) {
  char* to = static_cast<char*>(to_);
  for (int64_t k = 0; k < depth; k += DEPTH)
    for (int64_t j = 0; j < WIDTH; j += SIDE, to += TILE) {
      Lines pairs;
#pragma GCC unroll 16
      for (int64_t i = 0; i < SIDE; ++i) pairs[i] = j + i < count ? some(from[j + i] + k, depth - k) : Uint{};
      transpose(pairs);
#pragma GCC unroll 16
      for (int64_t p = 0; p < SIDE; ++p) put(to, pairs[p], p);
    }
}

// Bytes from one of so many rows to the next, -1 where they do not lie evenly.
template <class X>
int64_t stride_of(const X* const* row, int64_t rows) {
  const int64_t stride = bytes(row[1]) - bytes(row[0]);
  bool even = true;
  for (int64_t i = 2; i < rows; ++i) even &= bytes(row[i]) - bytes(row[i - 1]) == stride;
  return even ? stride : -1;
}

// `rows` rows, 16 or 32, and 32 columns of c = start + left @ right, over `groups` of k
template <int64_t rows>
void multiply_half(float* c, const float* start, int64_t of_start, const bf16* left, int64_t step,
                   int64_t of_left, const char* right, int64_t groups) {
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
  for (int64_t g = 0; g < groups; ++g, left += step, right += RIGHT) {
    _tile_loadd(6, right, BYTES);
    _tile_loadd(4, left, of_left);
    _tile_loadd(7, right + TILE, BYTES);
    if (two) _tile_loadd(5, bytes(left) + SIDE * of_left, of_left);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (two) _tile_dpbf16ps(2, 5, 6);
    if (two) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, LINE);
  _tile_stored(1, c + SIDE, LINE);
  if (two) _tile_stored(2, c + SIDE * WIDTH, LINE);
  if (two) _tile_stored(3, c + SIDE * WIDTH + SIDE, LINE);
}

template <int64_t rows>
void multiply_tile(float* c, const float* const* start, const bf16* const* left, int64_t step,
                   const void* right_, int64_t used, int64_t depth) {
  const char* right = static_cast<const char*>(right_);
  const float* first = start ? start[0] : nullptr;
  int64_t of_start = start ? stride_of(start, rows) : 0;
  if (of_start < 0) {
    for (int64_t i = 0; i < rows; ++i)
      if (start[i] != c + i * WIDTH) __builtin_memcpy(c + i * WIDTH, start[i], LINE);
    first = c, of_start = LINE;
  }
  const auto add = [&](const bf16* from, int64_t of_left, int64_t groups) {
    settle();
    for (int64_t j = 0; j < used; j += 2 * SIDE)
      multiply_half<rows>(c + j, first ? first + j : nullptr, of_start, from, step, of_left,
                          right + j / SIDE * TILE, groups);
    first = c, of_start = LINE, right += groups * RIGHT;
  };

  // Rows are read where they lie if they lie evenly. Only what is packed has zeros behind its end.
  const int64_t of_left = stride_of(left, rows);
  const int64_t there = step != DEPTH ? (depth + DEPTH - 1) / DEPTH : of_left < 0 ? 0 : depth / DEPTH;
  if (there || depth == 0) add(left[0], of_left, there);
  step = rows * DEPTH;
  for (int64_t k = there * DEPTH; k < depth;) {
    constexpr int64_t GROUPS = 8;
    alignas(64) bf16 apart[GROUPS * rows * DEPTH];
    int64_t groups = 0;
    for (; groups < GROUPS && k < depth; ++groups, k += DEPTH)
      for (int64_t i = 0; i < rows; ++i) put(apart, some(left[i] + k, depth - k), groups * rows + i);
    add(apart, BYTES, groups);
  }
}

void multiply(float* c, const float* const* start, const bf16* const* left, int64_t step, int64_t count,
              const void* right, int64_t used, int64_t depth) {
  const auto of = count > SIDE ? multiply_tile<2 * SIDE> : multiply_tile<SIDE>;
  of(c, start, left, step, right, used, depth);
}

}  // namespace amx
}  // namespace
