// The compiled kernels that are part of this library: one image for each architecture it was built for.
#pragma once

#include <cstdint>

namespace attn_ops {
namespace cuda {

struct Image {
  const char* architecture;  // sm_90a; compute_80 is PTX, which the driver compiles
  const unsigned char* data;
};
constexpr int kMostImages = 5;

// Compute capability 9.0 is 90.
constexpr int kLeastCapability = 80;

// The number of the image for a device, -1 if there is none. Code for 8.0 runs on 8.x, for 9.0a on 9.0 alone; PTX on
// everything newer than itself.
int image_for(int capability);
const Image& image(int number);

}  // namespace cuda
}  // namespace attn_ops
