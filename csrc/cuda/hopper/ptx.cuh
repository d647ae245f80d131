// What Hopper (sm_90a) has beyond ../ptx.cuh, one wrapper each: products of warpgroups, the copy engine, barriers in
// shared memory that count its bytes, and registers that move from warps which copy to warps which compute.
//
// Sections named are of the PTX ISA, version 8.0 and up.
#pragma once

#include "../ptx.cuh"
#include "args.h"
#include "config.h"

namespace attn_ops::cuda::hopper {

// --- Warps and warpgroups (four warps, the first of a number that four divides) --------------------------------------

ATTN_DEVICE int warpgroup_index() { return __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroup, 0); }

// "setmaxnreg": all warps of a warpgroup, once, from what __launch_bounds__ gave them.
template <int kRegisters>
ATTN_DEVICE void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
ATTN_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// The block's dynamic shared memory, aligned for panels (kAlignment more was asked for).
ATTN_DEVICE char* panel_memory() {
  char* memory = shared_memory();
  return memory + (kAlignment - shared_address(memory) % kAlignment) % kAlignment;
}

// Barrier `id` (1 to 15) of `threads` threads: all wait; or some say that they are there, and do not.
ATTN_DEVICE void sync_some(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
ATTN_DEVICE void arrive_at(int id, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}
// The same as sync_some; whether any thread's `value` is true.
ATTN_DEVICE bool sync_some_or(int id, int threads, bool value) {
  uint32_t any;
  asm volatile(
      "{\n.reg .pred own, all;\nsetp.ne.u32 own, %1, 0;\nbar.red.or.pred all, %2, %3, own;\nselp.u32 %0, 1, 0, "
      "all;\n}\n"
      : "=r"(any)
      : "r"(value ? 1u : 0u), "r"(id), "r"(threads)
      : "memory");
  return any != 0;
}

// --- Barriers in shared memory ("mbarrier") --------------------------------------------------------------------------

struct Barrier {
  uint64_t* at;

  ATTN_DEVICE void init(uint32_t arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(at)), "r"(arrivals));
  }
  ATTN_DEVICE void arrive() const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(at)) : "memory");
  }
  // Arrives, and lets the phase wait for so many bytes of copies.
  ATTN_DEVICE void arrive_and_expect(uint32_t bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(at)), "r"(bytes)
                 : "memory");
  }
  // Until the phase with this parity is over; the one before the first counts as one with parity 1.
  ATTN_DEVICE void wait(uint32_t parity) const {
    uint32_t done;
    do {
      asm volatile(
          "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}\n"
          : "=r"(done)
          : "r"(shared_address(at)), "r"(parity)
          : "memory");
    } while (done == 0);
  }
};

// After the barriers' init and before anybody else uses them (a block barrier follows).
ATTN_DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
// Between what threads wrote to shared memory and what tensor cores or the copy engine read there; a barrier follows.
ATTN_DEVICE void fence_writes() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// --- The copy engine ("cp.async.bulk.tensor") ------------------------------------------------------------------------

ATTN_DEVICE void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory"); }
// Copies the box that begins at element (x, y, z, w) to shared memory (aligned to 1024 bytes: the swizzle is of the
// address); elements outside the array arrive as zeros, and count.
ATTN_DEVICE void copy_box(void* shared, const TensorMap& map, int x, int y, int z, int w, Barrier barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];\n" ::"r"(shared_address(shared)),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(barrier.at))
      : "memory");
}

// --- Products of a warpgroup ("wgmma"): d += a b, 64 rows, in float32 ------------------------------------------------
//
// They run on their own: between products_begin and products_wait nothing may touch their registers. Accumulators, and a
// left operand in registers, lie as those of mma_* in ../ptx.cuh: warp w has rows 16 w to 16 w + 16.

ATTN_DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
ATTN_DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int pending>
ATTN_DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory");
}
// What was computed is there from here on: the compiler does not know that products_wait waits for it.
template <int kN>
ATTN_DEVICE void arrived(float (&d)[1][kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(d[0][n][i])::"memory");
}

#define ATTN_LIST_4(x, i) x(i), x(i + 1), x(i + 2), x(i + 3)
#define ATTN_LIST_16(x, i) ATTN_LIST_4(x, i), ATTN_LIST_4(x, i + 4), ATTN_LIST_4(x, i + 8), ATTN_LIST_4(x, i + 12)
#define ATTN_LIST_32(x) ATTN_LIST_16(x, 0), ATTN_LIST_16(x, 16)
#define ATTN_LIST_48(x) ATTN_LIST_32(x), ATTN_LIST_16(x, 32)
#define ATTN_LIST_64(x) ATTN_LIST_48(x), ATTN_LIST_16(x, 48)
#define ATTN_LIST_128(x) \
  ATTN_LIST_64(x), ATTN_LIST_16(x, 64), ATTN_LIST_16(x, 80), ATTN_LIST_16(x, 96), ATTN_LIST_16(x, 112)
#define ATTN_ACC(i) "+f"(d[0][(i) / 4][(i) % 4])

#define ATTN_FIRST_32                                                      \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTN_FIRST_48 \
  ATTN_FIRST_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define ATTN_FIRST_64                                                                \
  ATTN_FIRST_32                                                                      \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ATTN_FIRST_128                                                                           \
  ATTN_FIRST_64                                                                                  \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// multiply(d, a, b, adds): a and b are descriptors of shared memory (tiles.cuh), b with its summed index along rows of
// 128 bytes. multiply_registers(d, a, b): a in registers; b lies transposed, its summed index across rows. With
// `adds` 0, d was not there before.
#define ATTN_PRODUCTS(N, count, type, name, after0, after1, after2, after3, after4)                             \
  ATTN_DEVICE void multiply_##name(float (&d)[1][N / 8][4], uint64_t a, uint64_t b, int adds) {                 \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, %" after2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                 "k16.f32." #type "." #type " {" ATTN_FIRST_##count "}, %" after0 ", %" after1                  \
                                                                    ", adds, 1, 1, 0, 0;\n}\n"                  \
                 : ATTN_LIST_##count(ATTN_ACC)                                                                  \
                 : "l"(a), "l"(b), "r"(adds));                                                                  \
  }                                                                                                             \
  ATTN_DEVICE void multiply_registers_##name(float (&d)[1][N / 8][4], const uint32_t (&a)[4], uint64_t b) {     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." #type "." #type " {" ATTN_FIRST_##count      \
                 "}, {%" after0 ", %" after1 ", %" after2 ", %" after3 "}, %" after4 ", 1, 1, 1, 1;\n"          \
                 : ATTN_LIST_##count(ATTN_ACC)                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                         \
  }

ATTN_PRODUCTS(64, 32, f16, f16, "32", "33", "34", "35", "36")
ATTN_PRODUCTS(64, 32, bf16, bf16, "32", "33", "34", "35", "36")
ATTN_PRODUCTS(96, 48, f16, f16, "48", "49", "50", "51", "52")
ATTN_PRODUCTS(96, 48, bf16, bf16, "48", "49", "50", "51", "52")
ATTN_PRODUCTS(128, 64, f16, f16, "64", "65", "66", "67", "68")
ATTN_PRODUCTS(128, 64, bf16, bf16, "64", "65", "66", "67", "68")
ATTN_PRODUCTS(256, 128, f16, f16, "128", "129", "130", "131", "132")
ATTN_PRODUCTS(256, 128, bf16, bf16, "128", "129", "130", "131", "132")

#undef ATTN_PRODUCTS
#undef ATTN_FIRST_32
#undef ATTN_FIRST_48
#undef ATTN_FIRST_64
#undef ATTN_FIRST_128
#undef ATTN_ACC
#undef ATTN_LIST_4
#undef ATTN_LIST_16
#undef ATTN_LIST_32
#undef ATTN_LIST_48
#undef ATTN_LIST_64
#undef ATTN_LIST_128

}  // namespace attn_ops::cuda::hopper
