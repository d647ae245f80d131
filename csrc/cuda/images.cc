#include "images.h"

// ATTN_OPS_IMAGES: the directory with what compile.py made. (PTX is text, which ends with a zero.)
#define ATTN_OPS_IMAGE(symbol, file)                                                             \
  __asm__(".section .rodata\n.balign 64\n.hidden " #symbol "_begin\n.hidden " #symbol "_end\n" #symbol "_begin:\n" \
          ".incbin \"" ATTN_OPS_IMAGES "/" file "\"\n" #symbol "_end:\n.byte 0\n.previous\n");    \
  extern "C" const unsigned char symbol##_begin[], symbol##_end[];

ATTN_OPS_IMAGE(attn_ops_sm_80, "sm_80.cubin")
ATTN_OPS_IMAGE(attn_ops_sm_90a, "sm_90a.cubin")
ATTN_OPS_IMAGE(attn_ops_sm_100, "sm_100.cubin")
ATTN_OPS_IMAGE(attn_ops_sm_120, "sm_120.cubin")
ATTN_OPS_IMAGE(attn_ops_compute_80, "compute_80.ptx")

namespace attn_ops {
namespace cuda {

const Image kImages[kNumImages] = {
    {"sm_80", attn_ops_sm_80_begin, attn_ops_sm_80_end},
    {"sm_90a", attn_ops_sm_90a_begin, attn_ops_sm_90a_end},
    {"sm_100", attn_ops_sm_100_begin, attn_ops_sm_100_end},
    {"sm_120", attn_ops_sm_120_begin, attn_ops_sm_120_end},
    {"compute_80", attn_ops_compute_80_begin, attn_ops_compute_80_end},
};

}  // namespace cuda
}  // namespace attn_ops
