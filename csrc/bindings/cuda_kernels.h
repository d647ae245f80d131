// The kernels of libattn_ops_cuda.so on a stream, as bindings run them: cpu_kernels.h has the same for the CPU.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda_library.h"

namespace attn_ops {

// A valid call that the GPU's kernels do not take.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class CudaKernels {
 public:
  explicit CudaKernels(void* stream) : library_(cuda_library()), stream_(stream) {}

  size_t workspace_bytes(const AttentionParams& p) const {
    check_supported(p);
    return library_.forward_workspace_bytes(&p);
  }
  size_t workspace_bytes(const BackwardParams& p) const {
    check_supported(p.forward);
    return library_.backward_workspace_bytes(&p);
  }

  void run(const AttentionParams& p, Workspace workspace) const { check(library_.forward(&p, stream_, workspace)); }
  void run(const BackwardParams& p, Workspace workspace) const { check(library_.backward(&p, stream_, workspace)); }

 private:
  void check_supported(const AttentionParams& p) const {
    const std::string reason = library_.unsupported_reason(&p);
    if (!reason.empty()) throw Unsupported(reason);
  }
  void check(int error) const {
    if (error != 0) throw std::runtime_error(library_.error_text());
  }

  const CudaLibrary& library_;
  void* stream_;
};

}  // namespace attn_ops
