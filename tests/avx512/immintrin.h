// Stands before the compiler's <immintrin.h> and gives the AVX-512 intrinsics, those of BF16 among them, and the tiles of AMX
// that csrc/cpu uses to a processor which has only AVX2, FMA and F16C: the same results bit by bit, by halves. See run.py.
//
// The types are the compiler's own, which has 64-byte vectors for every processor. An intrinsic that is missing here
// fails to compile ("target specific option mismatch") and has to be added.
#pragma once

#include_next <immintrin.h>

#ifdef __AVX512F__
#error "emulation of AVX-512 for a compiler that may use AVX-512"
#endif

#define EMULATED static inline __attribute__((always_inline))

namespace attn_ops_emulated {
namespace {

template <class Whole, class Half>
union Halves {
  Whole whole;
  Half half[2];
};
typedef Halves<__m512, __m256> Floats;
typedef Halves<__m512d, __m256d> Doubles;
typedef Halves<__m512i, __m256i> Integers;

// f of the lower and of the upper halves.
template <class Pair, class F, class... Whole>
EMULATED auto by_halves(const F& f, const Whole&... x) {
  Pair result;
  for (int i = 0; i < 2; ++i) result.half[i] = f(Pair{x}.half[i]...);
  return result.whole;
}

// The 128-bit lanes `control` names, two of a and then two of b, two bits each.
template <class Vector>
EMULATED Vector shuffle_lanes(Vector a, Vector b, int control) {
  typedef long long Lane __attribute__((vector_size(16)));
  union {
    Vector whole;
    Lane lane[4];
  } x{a}, y{b}, result;
  for (int i = 0; i < 4; ++i) result.lane[i] = (i < 2 ? x : y).lane[control >> 2 * i & 3];
  return result.whole;
}

typedef unsigned Words __attribute__((vector_size(64)));
typedef short Halves16 __attribute__((vector_size(64)));

EMULATED __m512 max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
EMULATED __m512 min_ps(__m512 a, __m512 b) { return a < b ? a : b; }
EMULATED __m512d max_pd(__m512d a, __m512d b) { return a > b ? a : b; }
EMULATED __m512d min_pd(__m512d a, __m512d b) { return a < b ? a : b; }

EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves<Floats>([](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
EMULATED __m512d fmadd_pd(__m512d a, __m512d b, __m512d c) {
  return by_halves<Doubles>([](__m256d x, __m256d y, __m256d z) { return _mm256_fmadd_pd(x, y, z); }, a, b, c);
}

EMULATED __m512 set1_ps(float x) { return x - __m512{}; }
EMULATED __m512d set1_pd(double x) { return x - __m512d{}; }
EMULATED __m512i set1_epi64(long long x) { return x - __m512i{}; }

// Reads the elements whose bit is set, and nothing beside them; the others are 0.
template <class Vector, class T>
EMULATED Vector masked_load(unsigned mask, const void* from) {
  union {
    Vector whole;
    T element[sizeof(Vector) / sizeof(T)];
  } result{};
  for (unsigned i = 0; i < sizeof(Vector) / sizeof(T); ++i) {
    if (mask >> i & 1) __builtin_memcpy(&result.element[i], static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
  }
  return result.whole;
}

EMULATED unsigned movepi32_mask(__m512i a) {
  const Integers x{a};
  return _mm256_movemask_ps((__m256)x.half[0]) | _mm256_movemask_ps((__m256)x.half[1]) << 8;
}
EMULATED unsigned movepi64_mask(__m512i a) {
  const Integers x{a};
  return _mm256_movemask_pd((__m256d)x.half[0]) | _mm256_movemask_pd((__m256d)x.half[1]) << 4;
}
EMULATED __m512i mul_epu32(__m512i a, __m512i b) {
  return by_halves<Integers>([](__m256i x, __m256i y) { return _mm256_mul_epu32(x, y); }, a, b);
}

EMULATED __m512i cvtepi8_epi32(__m128i a) {
  return Integers{.half = {_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))}}.whole;
}
EMULATED __m512 cvtepi32_ps(__m512i a) {
  const Integers x{a};
  return Floats{.half = {_mm256_cvtepi32_ps(x.half[0]), _mm256_cvtepi32_ps(x.half[1])}}.whole;
}

EMULATED __m512i mask_shuffle_epi32(__m512i a, unsigned mask, __m512i b, int control) {
  Words result = (Words)a;
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) result[i] = ((Words)b)[i / 4 * 4 + (control >> 2 * (i % 4) & 3)];
  return (__m512i)result;
}

// The classes that `kNotFinite` names, and no others.
template <int kClasses, class Vector>
EMULATED bool not_finite(Vector x) {
  static_assert(kClasses == 0x99, "only NaN and infinity are known here");
  const Vector zero = x - x;
  for (unsigned i = 0; i < sizeof x / sizeof x[0]; ++i)
    if (!(zero[i] == 0)) return true;
  return false;
}

EMULATED __m512 cvtph_ps(__m256i a) {
  return Floats{.half = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))}}
      .whole;
}
template <int kRounding>
EMULATED __m256i cvtps_ph(__m512 a) {
  const Floats x{a};
  return _mm256_set_m128i(_mm256_cvtps_ph(x.half[1], kRounding), _mm256_cvtps_ph(x.half[0], kRounding));
}

EMULATED __m512 unpacklo_ps(__m512 a, __m512 b) {
  return by_halves<Floats>([](__m256 x, __m256 y) { return _mm256_unpacklo_ps(x, y); }, a, b);
}
EMULATED __m512 unpackhi_ps(__m512 a, __m512 b) {
  return by_halves<Floats>([](__m256 x, __m256 y) { return _mm256_unpackhi_ps(x, y); }, a, b);
}
EMULATED __m512d unpacklo_pd(__m512d a, __m512d b) {
  return by_halves<Doubles>([](__m256d x, __m256d y) { return _mm256_unpacklo_pd(x, y); }, a, b);
}
EMULATED __m512d unpackhi_pd(__m512d a, __m512d b) {
  return by_halves<Doubles>([](__m256d x, __m256d y) { return _mm256_unpackhi_pd(x, y); }, a, b);
}
template <int kControl>
EMULATED __m512 shuffle_ps(__m512 a, __m512 b) {
  return by_halves<Floats>([](__m256 x, __m256 y) { return _mm256_shuffle_ps(x, y, kControl); }, a, b);
}

// bfloat16, to nearest even; NaN stays NaN.
EMULATED Words rounded_to_bf16(__m512 x) {
  const Words bits = (Words)x;
  return (Words)(x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : bits >> 16 | 0x40u);
}
EMULATED __m512bh cvtne2ps_pbh(__m512 a, __m512 b) {
  const Words high = rounded_to_bf16(a), low = rounded_to_bf16(b);
  Halves16 both{};
  for (int i = 0; i < 16; ++i) both[i] = static_cast<short>(low[i]), both[16 + i] = static_cast<short>(high[i]);
  return (__m512bh)both;
}
EMULATED __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const Words x = (Words)a, y = (Words)b;
  sum = fmadd_ps((__m512)(x & 0xffff0000u), (__m512)(y & 0xffff0000u), sum);
  return fmadd_ps((__m512)(x << 16), (__m512)(y << 16), sum);
}
EMULATED __m512i permutexvar_epi16(__m512i order, __m512i x) {
  Halves16 moved{};
  for (int i = 0; i < 32; ++i) moved[i] = ((Halves16)x)[((Halves16)order)[i] & 31];
  return (__m512i)moved;
}
// x - floor(x), 0 of infinities.
EMULATED __m512 above_floor(__m512 x) {
  const auto of_half = [](__m256 half) { return _mm256_sub_ps(half, _mm256_floor_ps(half)); };
  const __m512 above = by_halves<Floats>(of_half, x);
  return x - x == __m512{} || x != x ? above : __m512{};
}
EMULATED unsigned not_less(__m512 x, __m512 y) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(!(x[i] < y[i])) << i;
  return mask;
}
// x 2^floor(y) of the lanes in the mask, and 0.
EMULATED __m512 maskz_scalef_ps(unsigned mask, __m512 x, __m512 y) {
  __m512 scaled{};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) scaled[i] = y[i] != y[i] ? y[i] : __builtin_ldexpf(x[i], static_cast<int>(__builtin_floorf(y[i])));
  }
  return scaled;
}

// The tile registers of AMX. Reading or writing one before they are configured, or after they are released, ends the process.
struct Tiles {
  typedef float Row __attribute__((vector_size(64), aligned(4), may_alias));
  typedef float Matrix[16][16];

  static void configure(const void* shapes) {
    for (int i = 0; i < 8; ++i) {
      const auto* const of = static_cast<const unsigned char*>(shapes);
      if (of[0] != 1 || of[16 + 2 * i] != 64 || of[48 + i] != 16) __builtin_trap();
    }
    configured() = true;
  }
  static void release() { configured() = false; }
  template <int t>
  static void zero() {
    __builtin_memset(tile(t), 0, sizeof(Matrix));
  }
  template <int t>
  static void load(const void* rows, long stride) {
    for (int r = 0; r < 16; ++r) __builtin_memcpy(tile(t)[r], static_cast<const char*>(rows) + r * stride, 64);
  }
  template <int t>
  static void store(void* rows, long stride) {
    for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<char*>(rows) + r * stride, tile(t)[r], 64);
  }
  // Sums of the first and of the second numbers of pairs, each in order, and then their sum: as Intel's manual has it, with
  // subnormal numbers as 0.
  template <int c, int a, int b>
  static void add() {
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    for (int r = 0; r < 16; ++r) {
      __m512 first{}, second{};
      for (int k = 0; k < 16; ++k) {
        unsigned pair;
        __builtin_memcpy(&pair, &tile(a)[r][k], 4);
        const Words x = Words{} + pair, y = (Words) *reinterpret_cast<const Row*>(tile(b)[k]);
        first = fmadd_ps((__m512)(x << 16), (__m512)(y << 16), first);
        second = fmadd_ps((__m512)(x & 0xffff0000u), (__m512)(y & 0xffff0000u), second);
      }
      *reinterpret_cast<Row*>(tile(c)[r]) += first + second;
    }
    _mm_setcsr(mode);
  }

 private:
  static bool& configured() {
    static thread_local bool now = false;
    return now;
  }
  static Matrix& tile(int i) {
    static thread_local Matrix all[8];
    if (!configured()) __builtin_trap();
    return all[i];
  }
};

EMULATED __m256i extract_half(__m512i x, int half) { return Integers{x}.half[half]; }

}  // namespace
}  // namespace attn_ops_emulated

#undef EMULATED
#undef _mm512_cmp_ps_mask
#undef _mm512_cvtps_ph
#undef _mm512_extracti64x4_epi64
#undef _mm512_fpclass_pd_mask
#undef _mm512_fpclass_ps_mask
#undef _mm512_mask_shuffle_epi32
#undef _mm512_maskz_scalef_ps
#undef _mm512_reduce_ps
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_f64x2
#undef _mm512_shuffle_ps
#define _mm_maskz_loadu_epi8(mask, p) attn_ops_emulated::masked_load<__m128i, char>(mask, p)
#define _mm256_maskz_loadu_epi16(mask, p) attn_ops_emulated::masked_load<__m256i, short>(mask, p)
#define ATTN_OPS_EMULATED_TILES
#define _mm512_castsi512_si256(x) attn_ops_emulated::extract_half(x, 0)
#define _mm512_cvtepi32_ps attn_ops_emulated::cvtepi32_ps
#define _mm512_cvtepi8_epi32 attn_ops_emulated::cvtepi8_epi32
#define _mm512_cvtne2ps_pbh attn_ops_emulated::cvtne2ps_pbh
#define _mm512_cvtph_ps attn_ops_emulated::cvtph_ps
#define _mm512_cvtps_ph(a, rounding) attn_ops_emulated::cvtps_ph<rounding>(a)
#define _mm512_dpbf16_ps attn_ops_emulated::dpbf16_ps
#define _mm512_extracti64x4_epi64 attn_ops_emulated::extract_half
#define _mm512_fmadd_pd attn_ops_emulated::fmadd_pd
#define _mm512_fmadd_ps attn_ops_emulated::fmadd_ps
#define _mm512_fpclass_pd_mask(x, classes) attn_ops_emulated::not_finite<classes>(x)
#define _mm512_fpclass_ps_mask(x, classes) attn_ops_emulated::not_finite<classes>(x)
#define _mm512_mask_shuffle_epi32 attn_ops_emulated::mask_shuffle_epi32
#define _mm512_cmp_ps_mask(x, y, predicate) attn_ops_emulated::not_less(x, y)
#define _mm512_maskz_scalef_ps attn_ops_emulated::maskz_scalef_ps
#define _mm512_reduce_ps(x, mode) attn_ops_emulated::above_floor(x)
#define _mm512_maskz_loadu_pd(mask, p) attn_ops_emulated::masked_load<__m512d, double>(mask, p)
#define _mm512_maskz_loadu_ps(mask, p) attn_ops_emulated::masked_load<__m512, float>(mask, p)
#define _mm512_max_pd attn_ops_emulated::max_pd
#define _mm512_max_ps attn_ops_emulated::max_ps
#define _mm512_min_pd attn_ops_emulated::min_pd
#define _mm512_min_ps attn_ops_emulated::min_ps
#define _mm512_movepi32_mask attn_ops_emulated::movepi32_mask
#define _mm512_movepi64_mask attn_ops_emulated::movepi64_mask
#define _mm512_mul_epu32 attn_ops_emulated::mul_epu32
#define _mm512_permutexvar_epi16 attn_ops_emulated::permutexvar_epi16
#define _mm512_set1_epi64 attn_ops_emulated::set1_epi64
#define _mm512_set1_pd attn_ops_emulated::set1_pd
#define _mm512_set1_ps attn_ops_emulated::set1_ps
#define _mm512_shuffle_f32x4(a, b, control) attn_ops_emulated::shuffle_lanes<__m512>(a, b, control)
#define _mm512_shuffle_f64x2(a, b, control) attn_ops_emulated::shuffle_lanes<__m512d>(a, b, control)
#define _mm512_shuffle_ps(a, b, control) attn_ops_emulated::shuffle_ps<control>(a, b)
#define _mm512_unpackhi_pd attn_ops_emulated::unpackhi_pd
#define _mm512_unpackhi_ps attn_ops_emulated::unpackhi_ps
#define _mm512_unpacklo_pd attn_ops_emulated::unpacklo_pd
#define _mm512_unpacklo_ps attn_ops_emulated::unpacklo_ps
