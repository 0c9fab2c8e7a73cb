// Tensors and memory for one call, both uninitialised, and who keeps what lies idle.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
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
// little later. So large blocks are handed on from call to call, and lie in pages of 2 MiB as far as they
// fill such. Small ones, of which a call wants several, are handed on within a thread.
class Memory {
 public:
  static constexpr size_t LARGE = 1 << 20;
  static constexpr size_t SMALL = 1 << 18;

  struct Block {
    void* at;
    size_t bytes;
  };

  // Of at least so many bytes; a block that was handed on may have a quarter more, a small one
  // twice as many.
  static Block take(size_t bytes) {
    constexpr size_t LINE = 64;
    Block block{nullptr, bytes};
    if (bytes > LARGE ? idle().find(block) : bytes <= SMALL && near().find(block)) return block;
    // aligned_alloc would want whole lines, and AddressSanitizer would miss what is read past the end.
    const auto allocate = [&] { return posix_memalign(&block.at, LINE, bytes) == 0; };
    if (!allocate() && !(idle().clear(), allocate())) throw std::bad_alloc();
    if (bytes > LARGE) in_huge_pages(block);
    return block;
  }

  static void give(Block block) {
    if (!block.at) return;
    if (block.bytes > LARGE ? idle().keep(block) : block.bytes <= SMALL && near().keep(block)) return;
    std::free(block.at);
  }

 private:
  // Blocks that nobody uses, the longest first. Nobody waits for the lock: a forked process may miss whoever
  // held it.
  class Idle {
   public:
    Idle() { blocks_.reserve(64); }

    // One that is large enough and little larger, in place of `block`.
    bool find(Block& block) {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      if (!lock) return false;
      auto best = blocks_.end();
      for (auto b = blocks_.begin(); b != blocks_.end(); ++b)
        if (b->bytes >= block.bytes && b->bytes <= block.bytes + block.bytes / 4)
          if (best == blocks_.end() || b->bytes <= best->bytes) best = b;
      if (best == blocks_.end()) return false;
      block = *best;
      blocks_.erase(best);
      return true;
    }
    bool keep(Block block) {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      if (!lock || block.bytes > most_) return false;
      free_down_to(most_ - block.bytes);
      if (blocks_.size() == blocks_.capacity()) {
        std::free(blocks_.front().at);
        blocks_.erase(blocks_.begin());
      }
      blocks_.push_back(block);
      return true;
    }
    void clear() {
      const std::unique_lock lock(mutex_, std::try_to_lock);
      if (lock) free_down_to(0);
    }
    bool wanted() const { return most_ > 0; }

   private:
    void free_down_to(size_t most) {
      size_t total = 0;
      for (const Block& b : blocks_) total += b.bytes;
      for (; total > most; blocks_.erase(blocks_.begin())) {
        total -= blocks_.front().bytes;
        std::free(blocks_.front().at);
      }
    }
    static size_t most_bytes() {
      constexpr size_t USUAL = 256;  // MiB
      const char* const wanted = std::getenv("MMFAST_IDLE_MIB");
      char* end = nullptr;
      const size_t mib = wanted && *wanted ? std::strtoul(wanted, &end, 10) : USUAL;
      if (end && *end) std::fprintf(stderr, "MMFAST_IDLE_MIB=%s: no number, using %zu\n", wanted, USUAL);
      return (end && *end ? USUAL : mib) << 20;
    }

    const size_t most_ = most_bytes();
    std::mutex mutex_;
    std::vector<Block> blocks_;
  };

  // The small blocks that a thread gave last.
  class Near {
   public:
    bool find(Block& block) {
      for (Block& own : blocks_)
        if (own.bytes >= block.bytes && own.bytes / 2 <= block.bytes) {
          block = std::exchange(own, {});
          return true;
        }
      return false;
    }
    bool keep(Block block) {
      if (!idle().wanted()) return false;
      Block* place = std::find_if(blocks_, blocks_ + COUNT, [](const Block& own) { return !own.at; });
      if (place == blocks_ + COUNT) place = &blocks_[next_++ % COUNT];
      std::free(std::exchange(*place, block).at);
      return true;
    }
    ~Near() {
      for (const Block& block : blocks_) std::free(block.at);
    }

   private:
    static constexpr size_t COUNT = 8;
    Block blocks_[COUNT] = {};
    size_t next_ = 0;
  };

  static Near& near() {
    static thread_local Near blocks;
    return blocks;
  }

  // Never destroyed: a tensor may outlive whatever is.
  static Idle& idle() {
    static Idle* const blocks = new Idle;
    return *blocks;
  }

  static void in_huge_pages([[maybe_unused]] Block block) {
#ifdef __linux__
    constexpr uintptr_t PAGE = 2 << 20;
    const auto begin = reinterpret_cast<uintptr_t>(block.at), first = (begin + PAGE - 1) / PAGE * PAGE;
    madvise(reinterpret_cast<void*>(first), (begin + block.bytes) / PAGE * PAGE - first, MADV_HUGEPAGE);
#endif
  }
};

inline Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0; stride *= std::max<int64_t>(shape[d], 1)) strides[d] = stride;
  return strides;
}

// A tensor on memory of our own, and how to free that.
template <class F>
Tensor on(void* memory, const Shape& shape, const Shape& strides, ScalarType type, const F& free) {
  std::unique_ptr<void, F> held(memory, free);
  const Tensor made = torch::stable::from_blob(memory, shape, strides, {DeviceType::CPU}, type, free);
  held.release();
  return made;
}

inline Tensor empty(const Shape& shape, const Shape& strides, ScalarType type) {
  if (const size_t bytes = extent(shape, strides) * element_size(type); bytes > Memory::LARGE) {
    const Memory::Block block = Memory::take(bytes);
    return on(block.at, shape, strides, type, [block](void*) { Memory::give(block); });
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
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return on(memory, shape, contiguous_strides(shape), scalar_type<T>,
            [bytes](void* block) { munmap(block, bytes); });
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
