// Compiled once per instruction set, with ATTN_OPS_ISA naming it and the compiler flags to match.
#include "kernels.h"

#define ATTN_OPS_JOIN_(a, b) a##b
#define ATTN_OPS_JOIN(a, b) ATTN_OPS_JOIN_(a, b)
#define ATTN_OPS_STRING_(a) #a
#define ATTN_OPS_STRING(a) ATTN_OPS_STRING_(a)
#define ATTN_OPS_SIMD_HEADER(isa) ATTN_OPS_STRING(ATTN_OPS_JOIN(simd_, isa).h)
#include ATTN_OPS_SIMD_HEADER(ATTN_OPS_ISA)

#include "backward.h"
#include "bias_gradient.h"
#include "head_lanes.h"
#include "row_lanes.h"
#ifndef ATTN_OPS_OF_PAIRS_BESIDE
#include "probe.h"
#include "quantize.h"
#endif

namespace attn_ops::cpu {
namespace {

template <class E>
constexpr TypedKernels typed_kernels() {
  using T = Accumulator<E>;
  return {
      [](int64_t rows) { return Tiling<T>(rows).tiles; },
      [](int64_t dim) { return round_to_width<T>(dim); },
      few_rows<T>,
      RowLanesScratch<E>::bytes,
      forward_row_lanes<E>,
      kOfTiles<E> ? nullptr : HeadLanesScratch<E>::bytes,
      kOfTiles<E> ? nullptr : forward_head_lanes<E>,
      combine<T>,
      [](const BackwardParams& p) {
        const int64_t tiles = BackwardScratch<E>::bytes(p.forward), sums = bias_gradient_scratch<T>();
        return p.d_bias && sums > tiles ? sums : tiles;
      },
      backward<E>,
      reduce<T>,
      bias_gradient<T>,
  };
}

}  // namespace

extern const Kernels ATTN_OPS_JOIN(kernels_, ATTN_OPS_ISA) = {
    ATTN_OPS_STRING(ATTN_OPS_ISA),
#ifdef ATTN_OPS_OF_PAIRS_BESIDE  // simd_<isa>.h: kernels of pairs alone, and whose all others are
    &ATTN_OPS_JOIN(kernels_, ATTN_OPS_OF_PAIRS_BESIDE), typed_kernels<Pair>(), {}, {}, nullptr, nullptr};
#else
    nullptr, {}, typed_kernels<float>(), typed_kernels<double>(), quantize, probe_slice};
#endif

}  // namespace attn_ops::cpu
