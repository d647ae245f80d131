// Which keys of a block the rows of a tile see.
//
// Visibility is bits: bit i of visible[j] tells whether lane i sees key k0 + j. Boolean masks are read along the keys, as
// they lie, 64 to a word, ANDed there, and only a block that is seen in part has its words transposed. A mask of bytes
// turned into vectors row by row and transposed as numbers took 1.5 times the unmasked time (AVX-512).
#pragma once

#include "row_tile.h"

namespace attn_ops {
namespace cpu {
namespace {

// How much of a block a tile sees.
enum class Seen { kNothing, kSome, kAll };

// Bits begin <= i < end of a word.
ATTN_INLINE uint64_t bits_between(int64_t begin, int64_t end) {
  const auto below = [](int64_t n) { return n <= 0 ? uint64_t{0} : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; };
  return below(end) & ~below(begin);
}

// Bit i = (i-th byte, `stride` bytes apart, != 0), for up to 64 bytes; the rest is 0.
ATTN_INLINE uint64_t bits_of(const char* bytes, int64_t stride, int64_t n) {
  if (stride == 0) return *bytes ? bits_between(0, n) : 0;
  uint64_t bits = 0;
  int64_t i = 0;
  if (stride == 1)
    for (; i + 8 <= n; i += 8) {
      uint64_t x;
      memcpy(&x, bytes + i, 8);
      constexpr uint64_t low7 = 0x7f7f7f7f7f7f7f7f;
      x = (((x & low7) + low7) | x) >> 7 & 0x0101010101010101;  // each byte to 0 or 1
      bits |= (x * 0x0102040810204080 >> 56) << i;              // gathers the eight bits: no two products overlap
    }
  for (; i < n; ++i) bits |= uint64_t{bytes[i * stride] != 0} << i;
  return bits;
}

// Bit j of a[i] <-> bit i of a[j]: halves of ever smaller squares change places.
inline void transpose_bits(uint64_t* a) {
  uint64_t low = 0x00000000ffffffff;
  for (int half = 32; half > 0; half /= 2, low ^= low << half)
    for (int base = 0; base < 64; base += 2 * half)
      for (int i = base; i < base + half; ++i) {
        const uint64_t t = ((a[i] >> half) ^ a[i + half]) & low;
        a[i] ^= t << half;
        a[i + half] ^= t;
      }
}

// A score-shaped view that is the same for all rows of the tile, such as key padding.
template <class T>
bool same_for_all_rows(const HeadRows& r, const RowTile<T>& tile, const StridedView& v) {
  return tile.rows == 1 || (v.stride[2] == 0 && (r.group == 1 || v.stride[1] == 0));
}

// ANDs into visible[0 .. keys) what the masks with a row of their own for each lane say.
template <class T>
void and_row_masks(const HeadRows& r, const RowTile<T>& tile, int64_t k0, int64_t keys, uint64_t* visible) {
  const AttentionParams& p = r.p;
  constexpr int kWords = kBlockKeys / 64;
  const int64_t words = (keys + 63) / 64;
  uint64_t rows[kWords][64] = {};
  bool all = true;
  for (int i = 0; i < tile.rows; ++i) {
    for (int64_t w = 0; w < words; ++w) rows[w][i] = ~uint64_t{0};
    for (int m = 0; m < p.num_masks; ++m) {
      const StridedView& mask = p.masks[m];
      if (same_for_all_rows(r, tile, mask)) continue;
      const char* const row = r.score_row(mask, tile.position[i], tile.head[i]) + k0 * mask.stride[3];
      for (int64_t w = 0; w < words; ++w) {
        __builtin_prefetch(row + (keys + 64 * w) * mask.stride[3]);  // of the next block
        rows[w][i] &= bits_of(row + 64 * w * mask.stride[3], mask.stride[3], keys - 64 * w < 64 ? keys - 64 * w : 64);
      }
    }
    for (int64_t w = 0; w < words; ++w) all = all && rows[w][i] == bits_between(0, keys - 64 * w);
  }
  if (all) return;
  for (int64_t w = 0; w < words; ++w) {
    transpose_bits(rows[w]);
    for (int64_t j = 64 * w; j < keys && j < 64 * w + 64; ++j) visible[j] &= rows[w][j - 64 * w];
  }
}

// Whether the bias is -inf everywhere. Mostly the first element tells that it is not.
template <class T>
bool bias_hides_all(const HeadRows& r, const RowTile<T>& tile, int64_t k0, int64_t keys) {
  const StridedView& bias = r.p.bias;
  const int64_t stride = bias.stride[3] * static_cast<int64_t>(size_of(bias.dtype));
  const int rows = same_for_all_rows(r, tile, bias) ? 1 : tile.rows;
  for (int i = 0; i < rows; ++i) {
    T values[kBlockKeys];
    load_row<T>(bias.dtype, r.score_row(bias, tile.position[i], tile.head[i]) + k0 * stride, stride, keys, false,
                values);
    for (int64_t j = 0; j < keys; ++j)
      if (values[j] != -kInfinity<T>) return false;
  }
  return true;
}

// visible[0 .. keys) by intervals and boolean masks, to be used only where the answer is kSome; kNothing also where a bias
// of -inf hides all. Lanes not in use do not count.
template <class T>
__attribute__((noinline)) Seen visible_keys(const HeadRows& r, const RowTile<T>& tile, int64_t k0, int64_t keys,
                                            uint64_t* visible) {
  const AttentionParams& p = r.p;
  if (p.bias.data && bias_hides_all<T>(r, tile, k0, keys)) return Seen::kNothing;
  const bool by_interval = !tile.all_see(k0, k0 + keys);
  if (!by_interval && p.num_masks == 0) return Seen::kAll;

  for (int64_t j = 0; j < keys; ++j) visible[j] = ~uint64_t{0};
  bool by_row = false;
  for (int m = 0; m < p.num_masks; ++m) {
    const StridedView& mask = p.masks[m];
    if (!same_for_all_rows(r, tile, mask)) {
      by_row = true;
      continue;
    }
    const char* const row = r.score_row(mask, tile.position[0], tile.head[0]) + k0 * mask.stride[3];
    for (int64_t j = 0; j < keys; ++j)
      if (!row[j * mask.stride[3]]) visible[j] = 0;
  }
  if (by_row) and_row_masks<T>(r, tile, k0, keys, visible);
  if (by_interval) {  // the ends of the intervals never move back: the lanes that see a key are neighbours
    int begin = 0, end = 0;
    for (int64_t j = 0; j < keys; ++j) {
      while (begin < tile.rows && tile.hi[begin] <= k0 + j) ++begin;
      while (end < tile.rows && tile.lo[end] <= k0 + j) ++end;
      visible[j] &= bits_between(begin, end);
    }
  }
  const uint64_t used = bits_between(0, tile.rows);
  uint64_t any = 0, every = ~uint64_t{0};
  for (int64_t j = 0; j < keys; ++j) {
    any |= visible[j];
    every &= visible[j];
  }
  return !(any & used) ? Seen::kNothing : (every & used) == used ? Seen::kAll : Seen::kSome;
}

// scores[j * ld + lane] = -inf where the lane does not see key j; `visible` null: all do. see(v, score) is told the
// result.
template <class T, int NV, class See>
ATTN_INLINE void hide_scores(const RowTile<T>& tile, const uint64_t* visible, int64_t keys, T* scores, int64_t ld,
                             const See& see) {
  using S = Simd<T>;
  using I = typename S::I;
  constexpr int W = S::width;
  using Bits = decltype(I{}[0] + 0);
  I lane_bit;
  for (int i = 0; i < W; ++i) lane_bit[i] = Bits{1} << i;
  const uint64_t used = bits_between(0, tile.rows);
  for (int64_t j = 0; j < keys; ++j) {
    T* const at = scores + j * ld;
    if (!visible || (visible[j] & used) == used) {
      for (int v = 0; v < NV; ++v) see(v, S::load(at + v * W));
      continue;
    }
    for (int v = 0; v < NV; ++v) {
      const I bits = I{} + static_cast<Bits>(visible[j] >> (v * W) & ((uint64_t{1} << W) - 1));
      const Vec<T> s = S::select((bits & lane_bit) != 0, S::load(at + v * W), S::set1(-kInfinity<T>));
      S::store(at + v * W, s);
      see(v, s);
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace attn_ops
