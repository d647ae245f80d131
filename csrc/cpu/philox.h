// Dropout: a counter-based random number per (seed, offset, batch, head, row, key), so the same bits come back in
// backward, for any tiling, on any machine. Philox4x32-7: Salmon et al., "Parallel random numbers: as easy as
// 1, 2, 3", SC 2011.
//
//   counter = (key / 4, row, batch * num_heads + head, offset)    key = (seed low, seed high ^ offset high)
//   word (key % 4) of the result keeps the probability when it is >= rate * 2^32.
//
// Of a call that is a part of a larger one all are counted as there (DropoutOrigin), so that its keys may begin within four.
#pragma once

#include "simd.h"

namespace attn_ops::cpu {
namespace {

// One random stream per lane.
typedef uint32_t Words __attribute__((vector_size(sizeof(Vec<float>))));
constexpr int kWordLanes = sizeof(Words) / 4;

constexpr int kRounds = 7;

// The keys of the rounds, each as a vector: they stay in the cache, while to make one costs as much as a product.
typedef Simd<float>::Longs Longs;
struct RoundKeys {
  Longs first[kRounds], second[kRounds];
  RoundKeys(uint32_t key0, uint32_t key1) {
    for (int round = 0; round < kRounds; ++round) {
      first[round] = (Longs)(Words{} + key0);
      second[round] = (Longs)(Words{} + key1);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }
};

// All rounds on words that are the low halves of 64-bit numbers: those that a product is made of, and half of what it gives.
// What is in upper halves never counts.
ATTN_INLINE void philox_rounds(Longs c[4], const RoundKeys& keys) {
#pragma GCC unroll kRounds
  for (int round = 0; round < kRounds; ++round) {
    const Longs product0 = Simd<float>::multiply_even(c[0], 0xD2511F53u);
    const Longs product1 = Simd<float>::multiply_even(c[2], 0xCD9E8D57u);
    c[0] = product1 >> 32 ^ c[1] ^ keys.first[round];
    c[1] = product1;
    c[2] = product0 >> 32 ^ c[3] ^ keys.second[round];
    c[3] = product0;
  }
}

ATTN_INLINE void philox(Words c[4], const RoundKeys& keys) {
  Longs even[4], odd[4];
  for (int i = 0; i < 4; ++i) even[i] = (Longs)c[i], odd[i] = (Longs)c[i] >> 32;
  philox_rounds(even, keys);
  philox_rounds(odd, keys);
  for (int i = 0; i < 4; ++i) c[i] = (Words)Simd<float>::low_halves(even[i], odd[i]);
}

struct Dropout {
  uint32_t key0, key1, offset, threshold, first_head, first_row, first_key;
  double keep_scale;  // 1 / (1 - rate)

  Dropout(const AttentionParams& p, int64_t batch)
      : key0(static_cast<uint32_t>(p.dropout_seed)),
        key1(static_cast<uint32_t>(p.dropout_seed >> 32) ^ static_cast<uint32_t>(p.dropout_offset >> 32)),
        offset(static_cast<uint32_t>(p.dropout_offset)),
        threshold(static_cast<uint32_t>(p.dropout_rate * 4294967296.0)),
        first_head(p.dropout_origin.first_head + static_cast<uint32_t>(batch) * p.dropout_origin.heads_of_entry),
        first_row(p.dropout_origin.first_row), first_key(p.dropout_origin.first_key), keep_scale(1.0 / (1.0 - p.dropout_rate)) {}
};

ATTN_INLINE Words load_words(const uint32_t* from) {
  Words words;
  memcpy(&words, from, sizeof words);
  return words;
}
ATTN_INLINE Words first_words(const uint32_t* from, int n) {
  Words words{};
  memcpy(&words, from, n * 4);
  return words;
}

// factor[j][r] = 1 / (1 - rate) or 0 for keys k0 <= k0 + j < k0 + keys (k0 a multiple of 4) and `lanes` rows, lane r
// being row `row[r]` of head `head[r]`.
template <class T>
__attribute__((noinline)) void dropout_factors(const Dropout& d, const uint32_t* row, const uint32_t* head, int lanes,
                                               int64_t k0, int64_t keys, T* factor) {
  const T keep = static_cast<T>(d.keep_scale);
  const RoundKeys round_keys(d.key0, d.key1);
  const uint32_t first_key = d.first_key + static_cast<uint32_t>(k0);
  for (int64_t j = -static_cast<int64_t>(first_key & 3); j < keys; j += 4)
    for (int r0 = 0; r0 < lanes; r0 += kWordLanes) {
      const int n = lanes - r0 < kWordLanes ? lanes - r0 : kWordLanes;
      const bool whole = n == kWordLanes;
      // In registers, which a copy of unknown size into them would not let them be.
      Words c[4] = {Words{} + ((first_key + static_cast<uint32_t>(j)) >> 2),
                    (whole ? load_words(row + r0) : first_words(row + r0, n)) + d.first_row,
                    (whole ? load_words(head + r0) : first_words(head + r0, n)) + d.first_head, Words{} + d.offset};
      philox(c, round_keys);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (static_cast<uint64_t>(j + i) >= static_cast<uint64_t>(keys)) continue;
        T* const at = factor + (j + i) * lanes + r0;
        if (sizeof(T) == 4 && whole) {
          const Words factors = (Words)Simd<float>::set1(static_cast<float>(keep)) & (Words)(c[i] >= d.threshold);
          memcpy(at, &factors, sizeof factors);
          continue;
        }
        uint32_t word[kWordLanes];
        memcpy(word, &c[i], sizeof word);
        for (int r = 0; r < n; ++r) at[r] = word[r] >= d.threshold ? keep : T{0};
      }
    }
}

}  // namespace
}  // namespace attn_ops::cpu
