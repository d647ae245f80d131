// The compiled kernels that are built into the library: one cubin per architecture, and PTX for those to come.
#pragma once

#include <cstddef>

namespace attn_ops {
namespace cuda {

struct Image {
  const char* name;  // "sm_90a", "compute_80"
  const unsigned char *begin, *end;
};

constexpr int kNumImages = 5;
// For capability 8.x, 9.0, 10.x, 12.x; the last is PTX, which the driver compiles for any card that is newer.
extern const Image kImages[kNumImages];

}  // namespace cuda
}  // namespace attn_ops
