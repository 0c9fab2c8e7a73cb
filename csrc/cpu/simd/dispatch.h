// Which compiled copy of csrc/cpu/simd/*.cpp runs. Included by baseline files only.
//
// Each simd file ends in one `extern "C"` entry, MM_KERNELS_ENTRY(name), compiled once per instruction set.
// In a baseline file, in namespace mmfast, MM_KERNELS(name, Kernels) declares all of them and defines
// name<T>(), the Kernels<T> of the copy for this processor.
#pragma once

#include "rows.h"

namespace mmfast {

using KernelsEntry = const void*(RowType);

enum class Isa { plain, avx2, avx512, avx512bf16, amx };

// The best that this processor has, unless MMFAST_ISA in the environment or mmfast_isa() named a lesser one.
Isa isa();

}  // namespace mmfast

#ifdef MMFAST_HAS_avx2
#define MM_COPIES(name) name##_plain, name##_avx2, name##_avx512, name##_avx512bf16, name##_amx
#else
#define MM_COPIES(name) name##_plain
#endif

#define MM_KERNELS(name, Kernels)                                                         \
  extern "C" KernelsEntry MM_COPIES(mmfast_##name);                                       \
  template <class T>                                                                      \
  const Kernels<T>& name() {                                                              \
    static constexpr KernelsEntry* copies[] = {MM_COPIES(mmfast_##name)};                 \
    return *static_cast<const Kernels<T>*>(copies[static_cast<int>(isa())](row_type<T>)); \
  }
