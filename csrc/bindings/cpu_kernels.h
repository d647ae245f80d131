// The CPU's kernels as bindings run them: cuda_kernels.h has the same for GPUs.
#pragma once

#include <stdexcept>

#include "../attention.h"

namespace attn_ops {

class CpuKernels {
 public:
  explicit CpuKernels(Threads threads, const char* isa = nullptr) : threads_(threads), isa_(isa) {}

  size_t workspace_bytes(const AttentionParams& p) const {
    return cpu::forward_workspace_bytes(p, threads_.count, isa_);
  }
  size_t workspace_bytes(const BackwardParams& p) const {
    return cpu::backward_workspace_bytes(p, threads_.count, isa_);
  }

  void run(const AttentionParams& p, Workspace workspace) const { check(cpu::forward(p, threads_, workspace, isa_)); }
  void run(const BackwardParams& p, Workspace workspace) const { check(cpu::backward(p, threads_, workspace, isa_)); }

 private:
  static void check(bool done) {
    if (!done) throw std::runtime_error("the kernel refused its workspace");
  }

  Threads threads_;
  const char* isa_;  // null: the default one
};

}  // namespace attn_ops
