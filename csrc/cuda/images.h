// The compiled kernels that are part of this library: one image for each architecture it was built for.
#pragma once

namespace attn_ops::cuda {

struct Image {
  const char* name;  // "sm_90a"; "compute_80" is PTX, which the driver compiles
  const unsigned char* data;
};
constexpr int kMostImages = 6;

// The number of the image for a device of a compute capability (9.0 is 90); -1 if there is none.
int image_for(int capability);
// That of the kernels which Hopper alone has (hopper/), likewise.
int hopper_image_for(int capability);
const Image& image(int number);

}  // namespace attn_ops::cuda
