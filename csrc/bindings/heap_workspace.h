// A kernel's workspace from the heap, for bindings whose framework lends none.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../attention.h"

namespace attn_ops {

class HeapWorkspace {
 public:
  explicit HeapWorkspace(size_t bytes)
      : bytes_(rounded_up(bytes)),
        memory_(bytes_ > 0 ? std::aligned_alloc(kAlignment, bytes_) : nullptr, std::free) {
    if (bytes_ > 0 && memory_ == nullptr) throw std::bad_alloc();
  }
  Workspace lend() const { return {memory_.get(), bytes_}; }

 private:
  static constexpr size_t kAlignment = 64;

  static size_t rounded_up(size_t bytes) {
    if (bytes > PTRDIFF_MAX) throw std::bad_alloc();
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  size_t bytes_;
  std::unique_ptr<void, void (*)(void*)> memory_;
};

}  // namespace attn_ops
