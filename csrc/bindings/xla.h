// The operators as custom calls of XLA: what frameworks that compile with XLA register.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace attn_ops::xla {

struct Handler {
  const char* platform;  // "Host" (JAX: "cpu") or "CUDA". The latter says at its calls when there is no library
  const char* name;      // the target of the custom call
  XLA_FFI_Handler* run;
};

// Operands and attributes are those of AttnOps>Decode and AttnOps>Backward in their order, except that there is no
// gradient of the bias when d_bias is false, and that the seed may be four words of 32 bits (JAX has no others by
// default). Arrays are contiguous.
//
// Those named .lent have one result more, uint8 [bytes], as the workspace of the CUDA kernels: they ask XLA for no memory,
// so that XLA may put their launches into a CUDA graph. How many bytes: _core.cuda_workspace_bytes. On CPUs nobody writes it.
// attn_ops.append, on CPUs alone: xla_append.h.
inline constexpr int kNumHandlers = 9;
extern const Handler kHandlers[kNumHandlers];

}  // namespace attn_ops::xla
