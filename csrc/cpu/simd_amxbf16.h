// AMX with BF16 (Intel, from Sapphire Rapids on) beside AVX-512 with BF16: products of pairs as whole tiles; all else is AVX-512's.
//
//   tdpbf16ps   c[16][16] += sum of k < 16 of a[16][k] b[k][16]     a, b pairs of bfloat16, c float
//
// A row of a tile is 64 bytes. One instruction takes 16 cycles, in which vectors have room for 32 multiply-adds of their own, of
// 16 numbers each: it does 512. It rounds to nearest, and a subnormal number is 0 to it.
#pragma once

#include "float_mode.h"
#include "simd_avx512bf16.h"

namespace attn_ops::cpu {
namespace {

#ifdef ATTN_OPS_EMULATED_TILES  // tests/avx512
using Tiles = attn_ops_emulated::Tiles;
#else
// Tile numbers are a part of an instruction, so constants. Strides are in bytes.
struct Tiles {
  static ATTN_INLINE void configure(const void* shapes) {
    asm volatile("ldtilecfg %0" ::"m"(*static_cast<const char(*)[64]>(shapes)));
  }
  static ATTN_INLINE void release() { asm volatile("tilerelease"); }
  template <int t>
  static ATTN_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(t));
  }
  template <int t>
  static ATTN_INLINE void load(const void* rows, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(rows), "r"(stride) : "memory");
  }
  template <int t>
  static ATTN_INLINE void store(void* rows, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(t), "r"(rows), "r"(stride) : "memory");
  }
  // c += a b
  template <int c, int a, int b>
  static ATTN_INLINE void add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
  }
};
#endif

template <>
struct MatrixUnit<Pair> : private Tiles {
  using Tiles::add;
  using Tiles::zero;
  static constexpr int64_t depth = 16;
  static constexpr int tiles = 8;

  // All tiles whole, and none when it is over: frameworks bring shapes of their own, and what is in use is saved at each change
  // of threads.
  class Session {
   public:
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } shape;
      for (int i = 0; i < tiles; ++i) shape.row_bytes[i] = 64, shape.rows[i] = 16;
      Tiles::configure(&shape);
    }
    ~Session() { Tiles::release(); }
    Session(const Session&) = delete;
  };

  // Subnormal factors and sums are 0: bits must not hang on whether a product was the unit's.
  struct AsUnit : FloatMode {
    AsUnit() : FloatMode(kFlushing) {}
  };

  // A unit that has done nothing for some 0.4 us works at half its speed for longer than that: a product that nobody wants, of
  // 16 cycles, keeps it awake. Sums begin with what they put into the tile.
  static ATTN_INLINE void stay_awake() { add<0, tiles - 2, tiles - 1>(); }

  template <int t, class E>  // a pair, or a sum
  static ATTN_INLINE void load(const E* rows, int64_t ld) {
    Tiles::load<t>(rows, ld * static_cast<int64_t>(sizeof(E)));
  }
  template <int t>
  static ATTN_INLINE void store(float* rows, int64_t ld) {
    Tiles::store<t>(rows, ld * static_cast<int64_t>(sizeof(float)));
  }
};

}  // namespace
}  // namespace attn_ops::cpu
