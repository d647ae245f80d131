// libattn_ops_cuda.so for the bindings. It lies beside the library that this code is part of, and is opened when it is
// first asked for: where there is no GPU nothing of it is ever loaded.
#pragma once

#include <string>

#include "../cuda/library.h"

namespace attn_ops {

struct CudaLibrary {
  decltype(&attn_ops_cuda_unavailable_reason) unavailable_reason;
  decltype(&attn_ops_cuda_unsupported_reason) unsupported_reason;
  decltype(&attn_ops_cuda_forward_workspace_bytes) forward_workspace_bytes;
  decltype(&attn_ops_cuda_backward_workspace_bytes) backward_workspace_bytes;
  decltype(&attn_ops_cuda_forward) forward;
  decltype(&attn_ops_cuda_backward) backward;
  decltype(&attn_ops_cuda_error_text) error_text;
};

// Throws std::runtime_error with the reason where it cannot be had.
const CudaLibrary& cuda_library();

// Whether the file is there. Opens nothing.
bool cuda_library_exists();

// Why the kernels cannot run on a device, by its number; "" when they can.
std::string cuda_unavailable_reason(int device);

}  // namespace attn_ops
