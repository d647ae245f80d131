// Which probabilities dropout keeps: a function of the seed and the place, computed anew wherever it is needed.
//
// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), with the counters of
// cpu/philox.h: the same mask for the same seed.
//
//   counter = (key / 4, row, batch * num_heads + head, offset)    key = (seed low, seed high ^ offset high)
//   word (key % 4) of the result keeps the probability when it is >= rate * 2^32.
//
// Four keys' numbers come at once and cost some sixty instructions. Lanes that hold some of the same four make each a
// part of what all of them need, and tell the others.
#pragma once

#include "rows.cuh"

namespace attn_ops::cuda {

struct Dropout {
  uint32_t key0, key1, offset, threshold, first_head;

  ATTN_DEVICE explicit Dropout(const Head& h) {
    const uint64_t seed = h.p.dropout_words[0], words = h.p.dropout_words[1];
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(words >> 32);
    offset = static_cast<uint32_t>(words);
    threshold = h.factors.drop_below;
    first_head = static_cast<uint32_t>(h.batch * h.p.num_heads);
  }

  // Bit i: whether the probability of key 4 * quad + i is kept.
  ATTN_DEVICE uint32_t keep(int quad, int position, int head) const {
    uint32_t c[4] = {static_cast<uint32_t>(quad), static_cast<uint32_t>(position), first_head + head, offset};
    uint32_t k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint32_t high0 = multiply_high(c[0], 0xD2511F53u), low0 = c[0] * 0xD2511F53u;
      const uint32_t high1 = multiply_high(c[2], 0xCD9E8D57u), low1 = c[2] * 0xCD9E8D57u;
      c[0] = high1 ^ c[1] ^ k0;
      c[1] = low1;
      c[2] = high0 ^ c[3] ^ k1;
      c[3] = low0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= (c[i] >= threshold ? 1u : 0u) << i;
    return bits;
  }
};

// With query rows down: of kMmaN times eight keys, a lane holds keys 8 n + 2 t + i of a row. Two lanes share each four.
template <int kMmaN>
struct KeptOfRow {
  uint32_t even = 0, odd = 0;  // of even and of odd n: bit 4 (n / 2) + i

  ATTN_DEVICE KeptOfRow(const Head& h, int first_key, int position, int head) {
    const Dropout dropout(h);
    const int t = lane_index() & 3, second = t & 1;
    uint32_t own = 0;
#pragma unroll
    for (int n = 0; n < kMmaN; n += 2) {
      const int makes = kMmaN == 1 ? 0 : n + second;
      own |= dropout.keep((first_key >> 2) + 2 * makes + (t >> 1), position, head) << 2 * n;
    }
    const uint32_t other = kMmaN == 1 ? own : shuffle(own, lane_index() ^ 1);
    even = (second ? other : own) >> 2 * second;
    odd = (second ? own : other) >> 2 * second;
  }
  ATTN_DEVICE bool operator()(int n, int i) const { return (n % 2 == 0 ? even : odd) >> (4 * (n / 2) + i) & 1; }
};

// With keys down: of 16 keys and kMmaN times eight query rows, a lane holds keys 8 j + g of rows 8 n + 2 t + i. Four
// lanes share each four keys.
template <int kMmaN>
struct KeptOfKeys {
  uint32_t made_by[4];  // bit 4 n, for j and i, was made by the lane with g % 4 == 2 j + i

  ATTN_DEVICE void make(const Head& h, int first_row, int first_key) {
    const Dropout dropout(h);
    const int lane = lane_index(), g = lane >> 2, t = lane & 3;
    uint32_t own = 0;
#pragma unroll
    for (int n = 0; n < kMmaN; ++n) {
      const int row = first_row + 8 * n + 2 * t + (g & 1), position = h.position(row);
      const int quad = (first_key >> 2) + (g & 2) + (g >> 2);
      own |= dropout.keep(quad, position, h.head(row, position)) << 4 * n;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) made_by[i] = shuffle(own, (lane & ~12) | i << 2) >> (g & 3);
  }
  ATTN_DEVICE bool operator()(int j, int n, int i) const { return made_by[2 * j + i] >> 4 * n & 1; }
};

}  // namespace attn_ops::cuda
