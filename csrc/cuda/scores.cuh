// From products q k^T to what the softmax is taken of, in base 2, where there is more than an interval of keys per row:
// bias and boolean masks.
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
ATTN_DEVICE void finish_scores(float (&x)[kCount], const Head& h, int head, int position, Interval seen, Key key) {
  using Element = typename M::Element;
  const AttentionParams& p = h.p;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int j = key(i);
    x[i] = j >= seen.begin && j < seen.end ? product(x[i], h.factors.scale_log2e) : minus_infinity();
  }
  if (p.bias.data != nullptr) {
    const Element* bias = static_cast<const Element*>(p.bias.data) + line(p.bias, h.batch, head, position);
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
    const uint8_t* mask = static_cast<const uint8_t*>(p.masks[m].data) + line(p.masks[m], h.batch, head, position);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int j = key(i);
      if (j >= seen.begin && j < seen.end && !mask[j * p.masks[m].stride[3]]) x[i] = minus_infinity();
    }
  }
}

// The same for kernels that may know of no bias and no boolean mask.
template <class M, bool kPlain, int kCount, class Key>
ATTN_DEVICE void hide_or_scale(float (&x)[kCount], const Head& h, int head, int position, Interval seen, Key key) {
  if constexpr (kPlain) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = key(i) >= seen.begin && key(i) < seen.end ? product(x[i], h.factors.scale_log2e) : minus_infinity();
    }
  } else {
    finish_scores<M>(x, h, head, position, seen, key);
  }
}

}  // namespace cuda
}  // namespace attn_ops
