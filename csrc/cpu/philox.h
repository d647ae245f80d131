// Dropout: a counter-based random number per (seed, offset, batch, head, row, key), so the same bits come back in
// backward, for any tiling, on any machine. Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011.
//
//   counter = (key / 4, row, batch * num_heads + head, offset)    key = (seed low, seed high ^ offset high)
//   word (key % 4) of the result keeps the probability when it is >= rate * 2^32.
#pragma once

#include "simd.h"

namespace attn_ops::cpu {
namespace {

// One random stream per lane.
typedef uint32_t Words __attribute__((vector_size(sizeof(Vec<float>))));
constexpr int kWordLanes = sizeof(Words) / 4;

// High and low halves of the 64-bit products x * m.
ATTN_INLINE void multiply_wide(Words x, uint32_t m, Words* high, Words* low) {
  typedef uint64_t Longs __attribute__((vector_size(sizeof(Words))));
  const Longs even = Simd<float>::multiply_even((Longs)x, m);
  const Longs odd = Simd<float>::multiply_even((Longs)x >> 32, m);
  *low = (Words)((even & 0xffffffffu) | odd << 32);
  *high = (Words)(even >> 32 | (odd & ~uint64_t{0xffffffffu}));
}

ATTN_INLINE void philox(Words c[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    Words high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53u, &high0, &low0);
    multiply_wide(c[2], 0xCD9E8D57u, &high1, &low1);
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

struct Dropout {
  uint32_t key0, key1, offset, threshold, first_head;
  double keep_scale;  // 1 / (1 - rate)

  Dropout(const AttentionParams& p, int64_t batch)
      : key0(static_cast<uint32_t>(p.dropout_seed)),
        key1(static_cast<uint32_t>(p.dropout_seed >> 32) ^ static_cast<uint32_t>(p.dropout_offset >> 32)),
        offset(static_cast<uint32_t>(p.dropout_offset)),
        threshold(static_cast<uint32_t>(p.dropout_rate * 4294967296.0)),
        first_head(static_cast<uint32_t>(batch * p.num_heads)), keep_scale(1.0 / (1.0 - p.dropout_rate)) {}
};

// factor[j][r] = 1 / (1 - rate) or 0 for keys k0 <= k0 + j < k0 + keys (k0 a multiple of 4) and `lanes` rows, lane r
// being row `row[r]` of head `head[r]`.
template <class T>
__attribute__((noinline)) void dropout_factors(const Dropout& d, const uint32_t* row, const uint32_t* head, int lanes,
                                               int64_t k0, int64_t keys, T* factor) {
  const T keep = static_cast<T>(d.keep_scale);
  for (int64_t j = 0; j < keys; j += 4)
    for (int r0 = 0; r0 < lanes; r0 += kWordLanes) {
      Words c[4] = {Words{} + static_cast<uint32_t>((k0 + j) >> 2), Words{}, Words{}, Words{} + d.offset};
      const int n = lanes - r0 < kWordLanes ? lanes - r0 : kWordLanes;
      memcpy(&c[1], row + r0, n * 4);
      memcpy(&c[2], head + r0, n * 4);
      c[2] += d.first_head;
      philox(c, d.key0, d.key1);
      for (int64_t i = 0; i < 4 && j + i < keys; ++i) {
        uint32_t word[kWordLanes];
        memcpy(word, &c[i], sizeof word);
        for (int r = 0; r < n; ++r) factor[(j + i) * lanes + r0 + r] = word[r] >= d.threshold ? keep : T{0};
      }
    }
}

}  // namespace
}  // namespace attn_ops::cpu
