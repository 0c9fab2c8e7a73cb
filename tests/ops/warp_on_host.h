// csrc/cuda/warp.h for a host without a GPU: every thread of a block is a fiber, which runs until it has to
// meet its warp or its block. What a meeting does is done by the last thread to come, as PTX documents it.
//
// Faults that a GPU hides most of the time show at once: a copy arrives when it is waited for and not before, or
// at once, over what others may still read; shared memory holds NaN at first, one warp runs ahead of the others
// as far as it can, in either order, and a meeting that not all come to is an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#include "warp.h"

namespace mmfast {

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  bool started, done;
  std::vector<char> stack = std::vector<char>(1 << 16);
  std::vector<Copy> issued;
  std::deque<std::vector<Copy>> groups;
};

struct Meeting {
  const char* what;
  int present;
  unsigned held;
};

struct WarpOnHost {
  Meeting meeting;
  alignas(16) char brought[32 * 64], made[32 * 16];
};

struct BlockOnHost {
  std::vector<Fiber> fibers;
  std::vector<WarpOnHost> warps;
  Meeting meeting;
  jmp_buf scheduler;
  std::function<void()> body;
  int current;
  bool moved, flag, any;
  const char* error;
};

inline BlockOnHost host;
inline bool reversed = false;       // threads, and blocks too, in the other order
inline bool early = false;          // copies arrive when they are issued
inline int64_t bank_conflicts = 0;  // of ldmatrix
inline int64_t bytes_copied = 0;

inline int thread_index() { return host.current; }

inline void leave() {
  if (!_setjmp(host.fibers[host.current].here)) _longjmp(host.scheduler, 1);
}

[[noreturn]] inline void fail(const char* error) {
  host.error = error;
  _longjmp(host.scheduler, 1);
}

template <class F>
void meet(Meeting& meeting, int all, const char* what, F last) {
  if (meeting.present == 0) meeting.what = what;
  if (std::strcmp(meeting.what, what)) fail("threads of a warp or block are at different instructions");
  const unsigned held = meeting.held;
  if (++meeting.present < all) {
    while (meeting.held == held) leave();
  } else {
    last();
    meeting.present = 0;
    ++meeting.held;
    host.moved = true;
  }
}

// Every thread of the warp brings something and takes something away.
template <class Out, class In, class F>
Out exchange(const char* what, const In& mine, F make) {
  WarpOnHost& warp = host.warps[host.current / 32];
  In* brought = reinterpret_cast<In*>(warp.brought);
  Out* made = reinterpret_cast<Out*>(warp.made);
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 16);
  brought[host.current % 32] = mine;
  meet(warp.meeting, 32, what, [&] { make(brought, made); });
  return made[host.current % 32];
}

inline void sync_warp() {
  meet(host.warps[host.current / 32].meeting, 32, "sync_warp", [] {});
}

inline bool any_of_block(bool flag) {
  host.flag |= flag;
  meet(host.meeting, static_cast<int>(host.fibers.size()), "any_of_block", [] {
    host.any = host.flag;
    host.flag = false;
  });
  return host.any;
}

inline void sync_block() {
  meet(host.meeting, static_cast<int>(host.fibers.size()), "sync_block", [] {});
}

template <class V>
V shuffle_xor(V value, int mask) {
  return exchange<V>("shuffle_xor", value, [mask](const V* in, V* out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[lane ^ mask];
  });
}

inline float shuffle(float value, int from) {
  struct Wish {
    float value;
    int from;
  };
  return exchange<float>("shuffle", Wish{value, from}, [](const Wish* in, float* out) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[in[lane].from].value;
  });
}

inline bool is_multiple_of_16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

inline void arrive(const Copy& copy) {
  std::memset(copy.to, 0, 16);
  std::memcpy(copy.to, copy.from, copy.bytes);
  bytes_copied += copy.bytes;
}

inline void copy_async(void* shared, const void* global, int bytes) {
  if (!is_multiple_of_16(shared) || !is_multiple_of_16(global)) fail("copy_async is not aligned");
  if (bytes < 0 || bytes > 16) fail("copy_async copies 0 to 16 bytes");
  const Copy copy{shared, global, bytes};
  if (early)
    arrive(copy);
  else
    host.fibers[host.current].issued.push_back(copy);
}

inline void commit() {
  Fiber& fiber = host.fibers[host.current];
  fiber.groups.push_back(std::move(fiber.issued));
  fiber.issued.clear();
}

template <int N>
void wait() {
  for (auto& groups = host.fibers[host.current].groups; groups.size() > N; groups.pop_front())
    for (const Copy& copy : groups.front()) arrive(copy);
}

using Registers = std::array<uint32_t, 4>;

inline Registers matrices(const char* what, const void* row, bool transposed) {
  return exchange<Registers>(what, row, [transposed](const void* const* rows, Registers* out) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) {
        const void* at = rows[8 * matrix + i];
        if (!is_multiple_of_16(at)) fail("a matrix's row is not aligned");
        banks |= 1u << reinterpret_cast<uintptr_t>(at) / 16 % 8;
        std::memcpy(elements[i], at, 16);
      }
      bank_conflicts += banks != 0xff;
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = transposed ? elements[j][i] : elements[i][j];
        const uint32_t high = transposed ? elements[j + 1][i] : elements[i][j + 1];
        out[lane][matrix] = low | high << 16;
      }
    }
  });
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const Registers loaded = matrices("load_matrices", row, false);
  std::memcpy(r, &loaded, sizeof r);
}

inline void load_transposed(uint32_t (&r)[4], const void* row) {
  const Registers loaded = matrices("load_transposed", row, true);
  std::memcpy(r, &loaded, sizeof r);
}

template <class T>
float widened(uint16_t bits);
template <>
inline float widened<Half>(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return x;
}
template <>
inline float widened<BFloat>(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

template <class T>
uint16_t narrowed(float x);
template <>
inline uint16_t narrowed<Half>(float x) {
  const _Float16 narrow = x;
  uint16_t bits;
  std::memcpy(&bits, &narrow, 2);
  return bits;
}
template <>
inline uint16_t narrowed<BFloat>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
}

template <class T>
uint32_t pack(float low, float high) {
  return narrowed<T>(low) | uint32_t{narrowed<T>(high)} << 16;
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Fragments {
    float c[4];
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.c, c, sizeof c);
  std::memcpy(mine.a, a, sizeof a);
  mine.b[0] = b0;
  mine.b[1] = b1;
  using Sums = std::array<float, 4>;
  const Sums sums = exchange<Sums>("multiply", mine, [](const Fragments* in, Sums* out) {
    float a[16][16], b[8][16];
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4, k = lane % 4 * 2 + half, shift = 16 * half;
        for (int part = 0; part < 4; ++part)
          a[row + part % 2 * 8][k + part / 2 * 8] = widened<T>(in[lane].a[part] >> shift);
        for (int part = 0; part < 2; ++part) b[row][k + 8 * part] = widened<T>(in[lane].b[part] >> shift);
      }
    for (int lane = 0; lane < 32; ++lane)
      for (int part = 0; part < 4; ++part) {
        float sum = in[lane].c[part];
        for (int k = 0; k < 16; ++k) sum += a[lane / 4 + part / 2 * 8][k] * b[lane % 4 * 2 + part % 2][k];
        out[lane][part] = sum;
      }
  });
  std::memcpy(c, &sums, sizeof c);
}

inline float power_of_two(float x) { return std::exp2(x); }

[[gnu::noinline]] inline void resume(int thread) {
  host.current = thread;
  Fiber& fiber = host.fibers[thread];
  if (_setjmp(host.scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void enter() {
  host.body();
  Fiber& fiber = host.fibers[host.current];
  fiber.done = host.moved = true;
  if (!fiber.issued.empty() || !fiber.groups.empty()) fail("a thread ends before its copies have arrived");
  _longjmp(host.scheduler, 1);
}

// Runs body() in each thread of one block; returns null or what went wrong.
template <class F>
const char* run_block(int threads, F body) {
  host.fibers.resize(threads);
  host.warps.assign(threads / 32, {});
  host.meeting = {};
  host.body = body;
  host.error = nullptr;
  host.flag = false;
  for (Fiber& fiber : host.fibers) {
    fiber.started = fiber.done = false;
    fiber.issued.clear();
    fiber.groups.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = fiber.stack.size();
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (int first = 0; first < threads; first += 32) {
      do {  // a warp goes as far as it can before the next one has its turn
        host.moved = false;
        for (int i = first; i < first + 32; ++i) {
          const int thread = reversed ? threads - 1 - i : i;
          if (!host.fibers[thread].done) resume(thread);
          if (host.error) return host.error;
        }
        any |= host.moved;
      } while (host.moved);
    }
  }
  for (const Fiber& fiber : host.fibers)
    if (!fiber.done) return "threads wait for others that do not come";
  return nullptr;
}

}  // namespace mmfast
