// Which compiled copy of csrc/cpu/simd/*.cpp runs. Included by baseline files only.
//
// Each simd file ends in one `extern "C"` entry, MM_ENTRY(name), compiled once per instruction set. In a
// baseline file MM_DISPATCH(name, signature) declares all of them and defines name(), the copy for this
// processor.
#pragma once

namespace mmfast {

enum class Isa { plain, avx2, avx512, avx512bf16 };

// The best that this processor has, unless MMFAST_ISA in the environment or mmfast_isa() named a lesser one.
Isa isa();

}  // namespace mmfast

#ifdef MMFAST_HAS_avx2
#define MM_DISPATCH(name, R, ...)                                                                           \
  extern "C" {                                                                                              \
  R name##_plain(__VA_ARGS__);                                                                              \
  R name##_avx2(__VA_ARGS__);                                                                               \
  R name##_avx512(__VA_ARGS__);                                                                             \
  R name##_avx512bf16(__VA_ARGS__);                                                                         \
  }                                                                                                         \
  static inline auto name() {                                                                               \
    decltype(&name##_plain) const copies[] = {name##_plain, name##_avx2, name##_avx512, name##_avx512bf16}; \
    return copies[static_cast<int>(mmfast::isa())];                                                         \
  }
#else
#define MM_DISPATCH(name, R, ...)         \
  extern "C" R name##_plain(__VA_ARGS__); \
  static inline auto name() { return &name##_plain; }
#endif
