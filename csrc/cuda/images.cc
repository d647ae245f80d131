#include "images.h"

#include <cstdint>

// The build gives the file of each architecture that it compiles for (compile.py). PTX is text, which ends with a zero.
#define EMBED(name, file)                                                                                             \
  __asm__(".section .rodata; .balign 64; .hidden attn_ops_image_" #name "; attn_ops_image_" #name ": .incbin \"" file \
          "\"; .byte 0; .balign 64; .previous");                                                                      \
  extern "C" __attribute__((visibility("hidden"))) const unsigned char attn_ops_image_##name[];

#ifdef ATTN_OPS_IMAGE_sm_80
EMBED(sm_80, ATTN_OPS_IMAGE_sm_80)
#endif
#ifdef ATTN_OPS_IMAGE_sm_90a
EMBED(sm_90a, ATTN_OPS_IMAGE_sm_90a)
#endif
#ifdef ATTN_OPS_IMAGE_sm_90a_hopper
EMBED(sm_90a_hopper, ATTN_OPS_IMAGE_sm_90a_hopper)
#endif
#ifdef ATTN_OPS_IMAGE_sm_100
EMBED(sm_100, ATTN_OPS_IMAGE_sm_100)
#endif
#ifdef ATTN_OPS_IMAGE_sm_120
EMBED(sm_120, ATTN_OPS_IMAGE_sm_120)
#endif
#ifdef ATTN_OPS_IMAGE_compute_80
EMBED(compute_80, ATTN_OPS_IMAGE_compute_80)
#endif

namespace attn_ops::cuda {
namespace {

struct Built {
  Image image;
  int first, last;  // the capabilities it runs on
  bool is_code = true;  // and not PTX
};

// Orin (8.7, 8.8) and Thor (10.1, which CUDA 13 calls 11.0) do not take code for other cards of their generation:
// "binary compatibility is supported only for the desktop" (CUDA C++ Programming Guide).
constexpr bool is_tegra(int capability) {
  return capability == 87 || capability == 88 || capability == 101 || capability == 110;
}

// Code for 8.0 runs on 8.x, code for 9.0a on 9.0 alone, PTX on everything newer. The first that fits is taken.
constexpr Built kBuilt[] = {
#ifdef ATTN_OPS_IMAGE_sm_80
    {{"sm_80", attn_ops_image_sm_80}, 80, 89},
#endif
#ifdef ATTN_OPS_IMAGE_sm_90a
    {{"sm_90a", attn_ops_image_sm_90a}, 90, 90},
#endif
#ifdef ATTN_OPS_IMAGE_sm_100
    {{"sm_100", attn_ops_image_sm_100}, 100, 109},
#endif
#ifdef ATTN_OPS_IMAGE_sm_120
    {{"sm_120", attn_ops_image_sm_120}, 120, 129},
#endif
#ifdef ATTN_OPS_IMAGE_compute_80
    {{"compute_80", attn_ops_image_compute_80}, 80, INT32_MAX, false},
#endif
};
constexpr int kNumBuilt = sizeof kBuilt / sizeof kBuilt[0];

// What Hopper has beside those, after them.
constexpr Image kOfHopper[] = {
#ifdef ATTN_OPS_IMAGE_sm_90a_hopper
    {"sm_90a_hopper", attn_ops_image_sm_90a_hopper},
#endif
    {"", nullptr}};
static_assert(kNumBuilt < kMostImages, "kMostImages");

}  // namespace

int image_for(int capability) {
  for (int i = 0; i < kNumBuilt; ++i) {
    const Built& built = kBuilt[i];
    if (built.is_code && is_tegra(capability)) continue;
    if (built.first <= capability && capability <= built.last) return i;
  }
  return -1;
}

int hopper_image_for(int capability) {
  constexpr bool kBuiltForIt = sizeof kOfHopper / sizeof kOfHopper[0] > 1;
  return kBuiltForIt && capability == 90 ? kNumBuilt : -1;
}

const Image& image(int number) { return number < kNumBuilt ? kBuilt[number].image : kOfHopper[0]; }

}  // namespace attn_ops::cuda
