// Tensors and memory for one call, both uninitialised, and who keeps what lies idle.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "simd/rows.h"

namespace mmfast {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

template <class T>
constexpr ScalarType scalar_type = std::is_same_v<T, double>  ? ScalarType::Double
                                   : std::is_same_v<T, float> ? ScalarType::Float
                                                              : ScalarType::BFloat16;

inline size_t element_size(ScalarType type) {
  return type == ScalarType::Double  ? sizeof(double)
         : type == ScalarType::Float ? sizeof(float)
                                     : sizeof(bf16);
}

inline int64_t product(const Shape& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

// Elements from the first to the last.
inline int64_t extent(const Shape& shape, const Shape& strides) {
  int64_t last = 0;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] == 0) return 0;
    last += (shape[d] - 1) * strides[d];
  }
  return last + 1;
}

// Blocks of memory, uninitialised. The system gives a large one page by page as it is first written, which
// takes longer than to write it, and glibc gives a large one back to the system as soon as it is freed, or a
// little later. So large blocks lie in pages of 2 MiB, and are handed on from call to call.
class Memory {
 public:
  static constexpr size_t LARGE = 16 << 20;  // bytes
  static constexpr size_t MOST_IDLE = 256;   // MiB, unless MMFAST_IDLE_MIB says otherwise

  struct Block {
    void* at;
    size_t bytes;
  };

  // Of at least so many bytes; a block that was handed on may have a quarter more.
  static Block take(size_t bytes) {
    if (bytes > LARGE)
      if (const std::unique_lock lock(all().mutex_, std::try_to_lock); lock) {  // see give()
        auto& idle = all().idle_;
        auto best = idle.end();
        for (auto block = idle.begin(); block != idle.end(); ++block)
          if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4)
            if (best == idle.end() || block->bytes <= best->bytes) best = block;
        if (best != idle.end()) {
          const Block found = *best;
          idle.erase(best);
          return found;
        }
      }
    constexpr size_t LINE = 64;
    Block made{nullptr, bytes};
    // aligned_alloc would want whole lines, and AddressSanitizer would miss what is read past the end.
    if (posix_memalign(&made.at, LINE, bytes)) throw std::bad_alloc();
#ifdef __linux__
    if (bytes > LARGE) advise(made, MADV_HUGEPAGE);
#endif
    return made;
  }

  static void give(Block block) {
    // Never waits: whoever held the lock may be missing in a forked process.
    if (block.bytes > LARGE && block.bytes <= most_idle())
      if (const std::unique_lock lock(all().mutex_, std::try_to_lock); lock) {
        auto& idle = all().idle_;
        size_t total = block.bytes;
        for (const Block& other : idle) total += other.bytes;
        for (; total > most_idle(); idle.erase(idle.begin())) {  // the one idle for longest
          total -= idle.front().bytes;
          std::free(idle.front().at);
        }
        return idle.push_back(block);
      }
    std::free(block.at);
  }

 private:
  static size_t most_idle() {
    static const size_t bytes = [] {
      const char* const wanted = std::getenv("MMFAST_IDLE_MIB");
      if (!wanted || !*wanted) return MOST_IDLE;
      char* end;
      const size_t mib = std::strtoul(wanted, &end, 10);
      if (*end) std::fprintf(stderr, "MMFAST_IDLE_MIB=%s: no number, using %zu\n", wanted, MOST_IDLE);
      return *end ? MOST_IDLE : mib;
    }() << 20;
    return bytes;
  }

  // Never destroyed: a tensor may outlive whatever is.
  static Memory& all() {
    static Memory* const memory = new Memory;
    return *memory;
  }

#ifdef __linux__
  static void advise(Block block, int advice) {
    constexpr uintptr_t PAGE = 2 << 20;
    const auto begin = reinterpret_cast<uintptr_t>(block.at), first = (begin + PAGE - 1) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(first), (begin + block.bytes) / PAGE * PAGE - first, advice);
  }
#endif

  std::mutex mutex_;
  std::vector<Block> idle_;
};

inline Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  return strides;
}

inline Tensor empty(const Shape& shape, const Shape& strides, ScalarType type) {
  if (const size_t bytes = extent(shape, strides) * element_size(type); bytes > Memory::LARGE) {
    const Memory::Block block = Memory::take(bytes);
    return torch::stable::from_blob(block.at, shape, strides, {DeviceType::CPU}, type,
                                    [block](void*) { Memory::give(block); });
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor empty(const Shape& shape, ScalarType type) {
  return empty(shape, contiguous_strides(shape), type);
}

// Zeros that take neither time nor memory until they are written, since a mapping begins as zeros. None where
// the system is another, or the tensor is small.
template <class T>
std::optional<Tensor> untouched_zeros(const Shape& shape) {
#ifdef __linux__
  constexpr size_t LEAST = 1 << 20;
  const size_t bytes = product(shape) * sizeof(T);
  if (bytes < LEAST) return {};
  const auto unmap = [bytes](void* block) { munmap(block, bytes); };
  void* const block = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED) throw std::bad_alloc();
  std::unique_ptr<void, decltype(unmap)> held(block, unmap);
  const Tensor made = torch::stable::from_blob(block, shape, contiguous_strides(shape), {DeviceType::CPU},
                                               scalar_type<T>, unmap);
  held.release();
  return made;
#else
  return {};
#endif
}

// Memory for one call, uninitialised.
template <class T>
class Buffer {
 public:
  Buffer(int64_t rows, int64_t columns) : columns_(columns) {
    if (const size_t bytes = rows * columns * sizeof(T)) block_ = Memory::take(bytes);
  }
  Buffer(Buffer&& other) noexcept : block_(std::exchange(other.block_, {})), columns_(other.columns_) {}
  ~Buffer() { Memory::give(block_); }
  T* data() const { return static_cast<T*>(block_.at); }
  T* row(int64_t r) const { return data() + r * columns_; }

 private:
  Memory::Block block_{};
  int64_t columns_;
};

}  // namespace mmfast
