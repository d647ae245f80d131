// From products q k^T to what the softmax is taken of, in base 2, where there is more than an interval of keys per row:
// bias, boolean masks, dropout.
//
// A hidden score is -inf, and its probability is -0: no visible one is ever that, so the sign tells them apart.
#pragma once

#include "math.cuh"
#include "rows.cuh"

namespace attn_ops {
namespace cuda {

constexpr uint32_t kHiddenBits = 0x80000000u;
ATTN_DEVICE bool is_hidden(float probability) { return bits_of(probability) == kHiddenBits; }

// 2^(x - maximum); -0 when hidden.
ATTN_DEVICE float probability(float x, float maximum) {
  return bits_of(x) == 0xff800000u ? float_of(kHiddenBits) : exp2_fast(x - maximum);
}

// The same in the backward, where lse has been rounded: beside it, scores of thousands may be larger by a little, and
// their probabilities by much. None exceeds 1.
ATTN_DEVICE float recomputed_probability(float x, float lse) { return exp2_fast(min_or_nan(x - lse, 0.0f)); }

// One query row's line of a score-shaped view [batch, num_heads, seqlen_q, seqlen_k].
ATTN_DEVICE int64_t line(const StridedView& view, int batch, int head, int position) {
  return batch * view.stride[0] + head * view.stride[1] + position * view.stride[2];
}

//   x[i] = log2(e) (scale x[i] + bias)      or -inf where key(i) is not seen
//
// for `count` keys of one query row. Nothing outside the row's interval is read.
template <class M, int kCount, class Key>
ATTN_DEVICE void finish_scores(float (&x)[kCount], const AttentionParams& p, int batch, int head, int position,
                               Interval seen, Key key) {
  using Element = typename M::Element;
  const float scale = static_cast<float>(p.scale * kLog2EDouble);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int j = key(i);
    x[i] = j >= seen.begin && j < seen.end ? product(x[i], scale) : minus_infinity();
  }
  if (p.bias.data != nullptr) {
    const Element* bias = static_cast<const Element*>(p.bias.data) + line(p.bias, batch, head, position);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int j = key(i);
      if (j < seen.begin || j >= seen.end) continue;
      const float b = M::to_float(bias[j * p.bias.stride[3]]);
      // -inf hides, even a score of +inf or NaN.
      x[i] = bits_of(b) == 0xff800000u ? b : x[i] + b * kLog2E;
    }
  }
#pragma unroll
  for (int m = 0; m < kMaxMasks; ++m) {
    if (m >= p.num_masks) break;
    const uint8_t* mask = static_cast<const uint8_t*>(p.masks[m].data) + line(p.masks[m], batch, head, position);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int j = key(i);
      if (j >= seen.begin && j < seen.end && !mask[j * p.masks[m].stride[3]]) x[i] = minus_infinity();
    }
  }
}

// The same for kernels that may know of no bias and no boolean mask.
template <class M, bool kPlain, int kCount, class Key>
ATTN_DEVICE void hide_or_scale(float (&x)[kCount], const AttentionParams& p, int batch, int head, int position,
                               Interval seen, Key key) {
  if constexpr (kPlain) {
    const float scale = static_cast<float>(p.scale * kLog2EDouble);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = key(i) >= seen.begin && key(i) < seen.end ? product(x[i], scale) : minus_infinity();
    }
  } else {
    finish_scores<M>(x, p, batch, head, position, seen, key);
  }
}

// --- Dropout --------------------------------------------------------------------------------------------------------
//
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), with the counters of
// cpu/philox.h: the same mask for the same seed.
//
//   counter = (key / 4, row, batch * num_heads + head, offset)    key = (seed low, seed high ^ offset high)
//   word (key % 4) of the result keeps the probability when it is >= rate * 2^32.
struct Dropout {
  uint32_t key0, key1, offset, threshold, first_head;

  ATTN_DEVICE Dropout(const AttentionParams& p, int batch) {
    const uint64_t seed = p.dropout_words[0], words = p.dropout_words[1];
    key0 = static_cast<uint32_t>(seed);
    key1 = static_cast<uint32_t>(seed >> 32) ^ static_cast<uint32_t>(words >> 32);
    offset = static_cast<uint32_t>(words);
    threshold = static_cast<uint32_t>(p.dropout_rate * 4294967296.0);
    first_head = static_cast<uint32_t>(batch * p.num_heads);
  }

  // What is kept is multiplied by 1 / (1 - rate).
  ATTN_DEVICE static float keep_scale(const AttentionParams& p) {
    return static_cast<float>(1.0 / (1.0 - p.dropout_rate));
  }

  // Bit i: whether the probability of key 4 * quad + i is kept.
  ATTN_DEVICE uint32_t keep(int quad, int position, int head) const {
    uint32_t c[4] = {static_cast<uint32_t>(quad), static_cast<uint32_t>(position), first_head + head, offset};
    uint32_t k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
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

}  // namespace cuda
}  // namespace attn_ops
