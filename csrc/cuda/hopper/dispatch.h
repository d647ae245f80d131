// Which calls Hopper has kernels of its own for, and their launches.
#pragma once

#include "../driver.h"

namespace attn_ops {
struct AttentionParams;
struct BackwardParams;
}  // namespace attn_ops

namespace attn_ops::cuda::hopper {

bool takes(const AttentionParams& p, const Device& device);
bool takes(const BackwardParams& b, const Device& device);

// 0 or an error code. Of calls that are taken.
int launch_forward(const AttentionParams& p, const Device& device, void* stream);
// `delta`: [batch, num_heads, seqlen_q].
int launch_backward(const BackwardParams& b, const Device& device, void* stream, float* delta);

}  // namespace attn_ops::cuda::hopper
