// The instruction set that the kernels in simd/ run with.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef MMFAST_HAS_avx2
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "simd/dispatch.h"

namespace mmfast {

static constexpr const char* names[] = {"plain", "avx2", "avx512", "avx512bf16", "amx"};

#ifdef MMFAST_HAS_avx2
// Tiles are memory that each thread's state grows by: Linux wants to be asked before anyone uses them.
static bool has_amx() {
#ifdef __linux__
  constexpr unsigned TILE = 1u << 24, TILE_BF16 = 1u << 22;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  unsigned a, b, c, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILE) && (d & TILE_BF16) &&
         syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

static int best() {
#ifdef MMFAST_HAS_avx2
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return 2;
  static const bool amx = has_amx();
  return amx ? 4 : 3;
#else
  return 0;
#endif
}

// -1 where this processor or this build does not have it.
static int find(const char* name) {
  for (int i = 0; i <= best(); ++i)
    if (std::strcmp(names[i], name) == 0) return i;
  return -1;
}

static int at_start() {
  const char* wanted = std::getenv("MMFAST_ISA");
  if (!wanted || !*wanted) return best();
  const int found = find(wanted);
  if (found < 0) std::fprintf(stderr, "MMFAST_ISA=%s: not here, using %s\n", wanted, names[best()]);
  return found < 0 ? best() : found;
}

static std::atomic<int>& chosen() {
  static std::atomic<int> isa = at_start();
  return isa;
}

Isa isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

}  // namespace mmfast

// Switches to `name` unless it is null; returns the instruction set in use, or null where `name` is not here.
extern "C" __attribute__((visibility("default"))) const char* mmfast_isa(const char* name) {
  if (name) {
    const int found = mmfast::find(name);
    if (found < 0) return nullptr;
    mmfast::chosen() = found;
  }
  return mmfast::names[mmfast::chosen()];
}
