// What a thread asks of its warp, its block and the tensor cores, in PTX of sm_80. A host compiler finds none
// of it here: whoever includes this for the host brings his own, as tests/ops/warp_on_host.h does.
#pragma once

#include "types.h"

namespace mmfast {

// float16 and bfloat16 in memory.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

#ifdef __CUDACC__

MM_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
MM_DEVICE void sync_warp() { __syncwarp(); }
MM_DEVICE void sync_block() { __syncthreads(); }
MM_DEVICE bool any_of_block(bool flag) { return __syncthreads_or(flag); }

template <class V>
MM_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
MM_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

MM_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// 16 bytes, both addresses aligned to 16; those from `bytes` on become 0 and are not read.
MM_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(bytes)
               : "memory");
}
MM_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all groups of this thread but the newest N have arrived.
template <int N>
MM_DEVICE void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16 bits; lane i brings the address of row i % 8 of matrix i / 8, and is given
// elements 2 (i % 4) and the next of row i / 4 of each, or of the transposed.
MM_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
MM_DEVICE void load_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16, 8] += a [16, 16] @ b [16, 8].
template <class T>
MM_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
MM_DEVICE void multiply<Half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
MM_DEVICE void multiply<BFloat>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers, each rounded to the nearest; `low` comes first in memory.
template <class T>
MM_DEVICE uint32_t pack(float low, float high);
template <>
MM_DEVICE uint32_t pack<Half>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
template <>
MM_DEVICE uint32_t pack<BFloat>(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// 2 ** x in one instruction, with an error of 2 ** -22 of it.
MM_DEVICE float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

}  // namespace mmfast
