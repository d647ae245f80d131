// What compilers make necessary and nothing else does. Each says what ptxas 13.0 (nvcc) or that of NVRTC 12.9 did
// without it; compile.py refuses kernels that spill, so taking one out tells whether it is still needed. (Shapes of
// tiles that registers decide are in config.h.)
#pragma once

#include "ptx.cuh"

namespace attn_ops::cuda {

#ifndef ATTN_OPS_HOST_LAYER  // which has both

// x, as if it were another number each time: what is computed from it is computed where it is needed. Else the
// addresses of all masks, biases and columns of a row were kept in registers throughout a kernel's loop (13.0; decode
// with a head dim of 256 on sm_120, 12.9: 140 bytes spilled).
ATTN_DEVICE int recomputed(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// x, of which the compiler knows nothing: not which bits of it are 0.
ATTN_DEVICE SharedAddress opaque(SharedAddress x) {
  asm("" : "+r"(x));
  return x;
}

// value = a == b ? candidate : value. Choosing one of an array's elements so keeps the array in registers: a compiler
// that sees through the comparison puts it into local memory to index it (13.0: 128 to 560 bytes of stack in every
// forward).
ATTN_DEVICE void replace_if_equal(float& value, float candidate, int a, int b) {
  asm("{\n.reg .pred equal;\nsetp.eq.s32 equal, %2, %3;\nselp.f32 %0, %1, %0, equal;\n}\n"
      : "+f"(value)
      : "f"(candidate), "r"(a), "r"(b));
}

#endif

// lane_index() for the addresses of operands. In float32 it is as if computed for each product: else all addresses that
// follow from it, many more than in 16 bits, were kept throughout a kernel's loop (13.0).
template <class M>
ATTN_DEVICE int operand_lane() {
  return M::kMmaK == 8 ? recomputed(lane_index()) : lane_index();
}

// Where gemm_nn asks whether there are columns from 16 n on. A branch keeps the compiler from fetching operands across
// it, which float32 never has the registers for, and 16 bits not in head dim 96 on sm_120 (13.0 and 12.9: 32 to 200
// bytes spilled); elsewhere asking costs instructions.
template <class M, int kDim>
ATTN_DEVICE constexpr bool asks_for_columns(int n) {
  return M::kMmaK == 8 ? n % 2 == 0 || kDim == 256 : kDim == 96 && n == 4;
}

// Where the kernel of dk and dv finds once more what dropout makes of its first key: in float32 of 16 rows at a time. Heads
// of 256 spilled 4 bytes for it on sm_120 and sm_90a (12.9).
template <class M, int kMmaN>
ATTN_DEVICE constexpr bool has_no_registers() {
  return M::kMmaK == 8 && kMmaN == 2;
}

// Whether an operand's address is one number of the lane (LaneRow): by NVRTC 12.9 that spilled 4 to 40 bytes in dq, dk and
// dv on sm_100 and sm_120, and without it, on sm_90a, dk and dv of float32 heads of 256 did 4.
template <int kRowBytes>
constexpr bool has_one_address() {
#ifndef __CUDACC_RTC__
  return true;
#else
  return __CUDA_ARCH__ < 1000 && kRowBytes == 1024;
#endif
}

// Up to which head dim keys pass once in the kernel of dq, where config.h has them do so: by NVRTC 12.9, 128 spilled 36
// bytes on sm_120.
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 1200
constexpr int kLargestSinglePass = 96;
#else
constexpr int kLargestSinglePass = 192;
#endif

// Whether operands are kept where config.h has them so: by NVRTC 12.9, at head dim 128, dk and dv spilled 20 to 28 bytes on
// sm_90a and sm_120, and dq needs a single pass.
template <int kDim>
constexpr bool may_keep_operands(bool queries_stay) {
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 900
  if (!queries_stay) return kDim < 128;
#endif
  return !queries_stay || kDim <= kLargestSinglePass;
}

// Then how much of a tile that passes is taken at a time: 32 keys or rows at head dim 128 spilled up to 24 bytes (13.0); by
// NVRTC 12.9 all 64 keys at 64 did, and 32 keys (or, on sm_120, rows) at 96 (sm_120: 104 bytes, 64).
template <int kDim>
constexpr int kept_step(bool queries_stay) {
  if (kDim == 128) return 16;
#ifdef __CUDACC_RTC__
  return kDim == 96 && (queries_stay || __CUDA_ARCH__ >= 1200) ? 16 : 32;
#else
  return queries_stay && kDim == 64 ? 64 : 32;
#endif
}

// Whether the kernel of dq finds its first row anew behind the loop: kept, it spilled at head dim 128; found anew, at 64
// (13.0).
template <int kDim>
constexpr bool kFindsFirstRow = kDim > 64;

// How far loops are unrolled: gemm_nt's over the dimension, further than which operands are fetched so early that
// registers run out (13.0; by 12.9, of 128 columns in dk and dv on sm_120: 36 bytes), and load_tile's over rows.
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 1200
constexpr int kLargestUnrolled = 96;
#else
constexpr int kLargestUnrolled = 128;
#endif
template <class M, int kDim>
constexpr int kGemmUnroll = M::kMmaK == 16 && kDim <= kLargestUnrolled ? kDim / 16 : 2;
template <class M>
constexpr int kLoadUnroll = M::kMmaK == 16 ? 8 : 1;

// How many keys' bytes of masks (or ids, blocks) a lane of the kernel of dk and dv reads at a time where it reads them one
// by one: all of them spilled 100 bytes in float32 heads of 256 (13.0).
template <class M, int kDim>
constexpr int kShownUnroll = M::kMmaK == 8 && kDim == 256 ? 1 : 16;

}  // namespace attn_ops::cuda
