// The instructions that kernels are made of, one wrapper each. Everything a kernel does to the machine goes through
// this file, so that a test can put another one in its place (ATTN_OPS_HOST_LAYER) and run the same kernels on a CPU.
//
// No header of CUDA or of the host is needed beyond <cstdint>: NVRTC compiles this too.
#pragma once

#include <cstdint>

#ifdef ATTN_OPS_HOST_LAYER
#include ATTN_OPS_HOST_LAYER
#else

#define ATTN_DEVICE __device__ __forceinline__
// A kernel: one parameter, `args`, and its block of `threads`.
#define ATTN_KERNEL(name, threads, Args) \
  extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Args args)

namespace attn_ops::cuda {

// --- Where this thread is -------------------------------------------------------------------------------------------

ATTN_DEVICE int thread_index() { return threadIdx.x; }
ATTN_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }  // of fewer than 2^31 (driver.cc)
ATTN_DEVICE int lane_index() { return threadIdx.x & 31; }
ATTN_DEVICE int warp_index() { return threadIdx.x >> 5; }

// The block's dynamic shared memory, 128-byte aligned.
ATTN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// --- Waiting for each other -----------------------------------------------------------------------------------------

ATTN_DEVICE void sync_block() { __syncthreads(); }
// The same; whether any thread's `value` is true.
ATTN_DEVICE bool sync_block_or(bool value) { return __syncthreads_or(value); }
ATTN_DEVICE void sync_warp() { __syncwarp(); }

// --- Within a warp --------------------------------------------------------------------------------------------------

ATTN_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
ATTN_DEVICE float shuffle(float value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
ATTN_DEVICE uint32_t shuffle(uint32_t value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

ATTN_DEVICE bool any_in_warp(bool value) { return __any_sync(0xffffffffu, value); }

// --- Memory ---------------------------------------------------------------------------------------------------------

// Where something lies in shared memory, as a number.
using SharedAddress = uint32_t;
ATTN_DEVICE SharedAddress shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Starts a copy of 16 bytes to shared memory; of zeros where nothing `exists`, which is not read then.
ATTN_DEVICE void copy_async(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(exists ? 16 : 0));
}
// The same of 4 or 8 bytes, by way of the first-level cache.
template <int kBytes>
ATTN_DEVICE void copy_async_few(void* shared, const void* global, bool exists) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(shared_address(shared)), "l"(global),
               "n"(kBytes), "r"(exists ? kBytes : 0));
}
// Closes a group of this thread's copies.
ATTN_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::); }
// Waits until at most `pending` of this thread's groups are on their way.
template <int pending>
ATTN_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the address of row r (16 bytes) of matrix i. Lane l gets
// of each matrix the elements 2 (l % 4), 2 (l % 4) + 1 of row l / 4; transposed, of column l / 4.
ATTN_DEVICE void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}
ATTN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row));
}

// What a plain load or store of 16 bytes moves.
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

// What this thread has written, and what others have and it knows of by a barrier, is visible to the device before what
// it writes next; what it, or others that a barrier tells, read next is at least as new as what it has read before.
ATTN_DEVICE void fence_acquire_release() { asm volatile("fence.acq_rel.gpu;\n" ::: "memory"); }
// If *address == expected, stores desired; what was there before.
ATTN_DEVICE uint64_t compare_and_swap(uint64_t* address, uint64_t expected, uint64_t desired) {
  return atomicCAS(reinterpret_cast<unsigned long long*>(address), expected, desired);
}

// --- Matrix products: d += a b, of 16 x 8, in float32 ----------------------------------------------------------------
//
// With g = lane / 4 and t = lane % 4, a lane holds
//   d[0..3]   rows g, g, g + 8, g + 8 of columns 2t, 2t + 1, 2t, 2t + 1
//   16 bits   a[0..3]: rows g, g + 8, g, g + 8 of columns 2t and 2t + 1 (a[2], a[3]: 8 further), b[0..1]: rows 2t and
//             2t + 1 (b[1]: 8 further) of column g                                               16 x 16 times 16 x 8
//   TF32      a[0..3]: rows g, g + 8, g, g + 8 of column t (a[2], a[3]: t + 4), b[0..1]: rows t, t + 4 of column g;
//             of each number, the upper 19 bits count                                             16 x 8 times 8 x 8

ATTN_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
ATTN_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
ATTN_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- Numbers --------------------------------------------------------------------------------------------------------

ATTN_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
ATTN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Within 2 units in the last place; results below 2^-126 are 0.
ATTN_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2(x) within 2^-22 or so; -inf of 0.
ATTN_DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ATTN_DEVICE float log_of(float x) { return logf(x); }
ATTN_DEVICE float tanh_of(float x) { return tanhf(x); }
// x y, rounded: never fused with an addition that follows.
ATTN_DEVICE float product(float x, float y) { return __fmul_rn(x, y); }
// The smaller one; NaN if one is NaN.
ATTN_DEVICE float min_or_nan(float x, float y) {
  float z;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
// The high half of the 64-bit product.
ATTN_DEVICE uint32_t multiply_high(uint32_t x, uint32_t y) { return __umulhi(x, y); }

// To the nearest number with the 11 significant bits of TF32, ties away from zero; at the end of the range, infinity.
ATTN_DEVICE uint32_t round_to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Two numbers in one word, `low` in the lower half.
ATTN_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
ATTN_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
ATTN_DEVICE float from_f16(uint16_t bits) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  return y;
}

}  // namespace attn_ops::cuda

#endif
