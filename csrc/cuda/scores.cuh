// From products q k^T to what the softmax is taken of, where there is more than an interval of keys per row: the algebra
// of attention.h and boolean masks.
//
// Scores are in natural units, and only what is left when a row's maximum is subtracted is multiplied by log2(e): a
// score of up to the largest float32 is one, where log2(e) times it would be infinite.
//
// A hidden score is -inf, and its probability is -0: no visible one is ever that, so the sign tells them apart.
#pragma once

#include "math.cuh"
#include "rows.cuh"

namespace attn_ops::cuda {

constexpr uint32_t kHiddenBits = 0x80000000u;
ATTN_DEVICE bool is_hidden(float probability) { return bits_of(probability) == kHiddenBits; }

// e^x, for x <= 0 or hardly more.
ATTN_DEVICE float exponential(float x) { return exp2_fast(x * kLog2E); }

// Where what is subtracted from a row's scores is up to this large (in natural units), scale, log2(e) and subtraction are
// one instruction: the exponent is then off by a rounding of either product, 2^-24 1024 1.44 2 = 1.8e-4, less than what a
// weight loses on its way to 16 bits. (Of scores of 10^9 it would be off by 2^6, and the row be gone.)
constexpr float kFusedLimit = 1024.0f;
template <class M>
constexpr bool kFuses = M::kMath != Math::kFloat32;
ATTN_DEVICE bool fits_fused(float subtrahend) { return fabsf(subtrahend) <= kFusedLimit; }

// e^(scale x - subtrahend), of a product q k^T; where the subtrahend is known times log2(e).
ATTN_DEVICE float weight(float x, float scale, float subtrahend) { return exponential(product(x, scale) - subtrahend); }
ATTN_DEVICE float fused_weight(float x, float scale, float subtrahend_2) {
  return exp2_fast(fmaf(x, scale * kLog2E, -subtrahend_2));
}

// e^(x - maximum); -0 when hidden.
ATTN_DEVICE float probability(float x, float maximum) {
  return is_minus_infinity(x) ? float_of(kHiddenBits) : exponential(x - maximum);
}

// The same in the backward, divided by the row's sum. Its scores may differ from those of the forward by their own
// rounding, and so be larger than the maximum, if those of thousands by much: no probability exceeds 1.
ATTN_DEVICE float recomputed_probability(float x, float maximum, float inverse_sum) {
  return exp2_fast(min_or_nan((x - maximum) * kLog2E, 0.0f)) * inverse_sum;
}

// scale x + bias, of which finite numbers make a finite score, beyond the largest float32 the largest.
ATTN_DEVICE float score(float x, float scale, float bias) {
  constexpr uint32_t kLargest = 0x7f7fffffu;
  const float sum = product(x, scale) + bias;
  const bool overflows = !is_finite(sum) && is_finite(x) && is_finite(bias);
  return overflows ? float_of(kLargest | (bits_of(sum) & kHiddenBits)) : sum;
}

// The soft cap of a product q k^T, scaled: cap tanh(scale x / cap), and what the gradient of that is multiplied with.
ATTN_DEVICE float capped_score(float x, const Factors& f) { return f.cap * tanh_of(x * f.into_cap); }
ATTN_DEVICE float cap_slope(float x, const Factors& f) {
  const float t = tanh_of(x * f.into_cap);
  return 1.0f - t * t;
}
// What comes to nothing, as beyond the cap, is as if hidden: no infinity that the product was made of shall count.
ATTN_DEVICE float through_cap(float gradient, float slope) {
  const float result = gradient * slope;
  return result == 0.0f ? float_of(kHiddenBits) : result;
}

// Lets the sink of a head, if there is one, join the maximum and the sum of a row; returns what its weights so far are to
// be multiplied with.
ATTN_DEVICE float join_sink(const AttentionParams& p, int head, float& maximum, float& sum) {
  if (p.sinks == nullptr) return 1.0f;
  const float sink = static_cast<const float*>(p.sinks)[head], before = maximum;
  if (!(sink > minus_infinity()) || before != before) return 1.0f;
  maximum = fmaxf(before, sink);
  const float factor = before == maximum ? 1.0f : exponential(before - maximum);
  sum = sum * factor + exponential(sink - maximum);
  return factor;
}

// One query row's line of a score-shaped view [batch, num_heads, seqlen_q, seqlen_k].
ATTN_DEVICE int64_t line(const StridedView& view, int batch, int head, int position) {
  return batch * view.stride[0] + head * view.stride[1] + position * view.stride[2];
}

// The keys that a lane has of a row of a warp's products. Where they lie along the row, kCount of them are spread over
// 4 kCount, and the four lanes of a quad have all.
struct KeysAlongRow {
  static constexpr bool kAlongRow = true;
  int first, t;  // t: which lane of the quad it is
  ATTN_DEVICE int operator()(int i) const { return first + 8 * (i >> 1) + 2 * t + (i & 1); }
};
struct KeysAcrossRows {
  static constexpr bool kAlongRow = false;
  int first;
  uint32_t shown;  // bit 8 i: whether the row sees key i, where there is more than an interval to look at
  ATTN_DEVICE int operator()(int i) const { return first + 8 * i; }
};

// Four bits, of four bytes: each product of the multiplication is a bit of its own.
ATTN_DEVICE uint32_t nonzero_bytes(uint32_t x) {
  const uint32_t highest = (((x & 0x7f7f7f7fu) + 0x7f7f7f7fu) | x) >> 7 & 0x01010101u;
  return highest * 0x01020408u >> 24 & 15u;
}

// A bit for each of the next kCount bytes, which are aligned to that number.
template <int kCount>
ATTN_DEVICE uint32_t nonzero_bytes_from(const uint8_t* from) {
  struct alignas(kCount) Words {
    uint32_t word[kCount / 4];
  };
  const Words bytes = *reinterpret_cast<const Words*>(from);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kCount / 4; ++i) bits |= nonzero_bytes(bytes.word[i]) << 4 * i;
  return bits;
}

// Which of a lane's keys along a row masks show.
template <int kCount>
struct Shown {
  uint32_t word[(kCount + 7) / 8];

  ATTN_DEVICE Shown() {
#pragma unroll
    for (uint32_t& w : word) w = ~0u;
  }
  // Eight keys to a word, two of each eight bits: as the bits of all of a row's keys, shifted, have them.
  ATTN_DEVICE static constexpr uint32_t bit(int i) { return 1u << (8 * (i >> 1 & 3) + (i & 1)); }
  ATTN_DEVICE bool operator()(int i) const { return (word[i >> 3] & bit(i)) != 0; }
  ATTN_DEVICE void hide(int i) { word[i >> 3] &= ~bit(i); }

  // Leaves what a mask shows too, of whose row the lanes of a quad read a quarter each: the bytes from `quarter` on, if
  // they exist.
  ATTN_DEVICE void leave(const uint8_t* quarter, bool exists, int t) {
    static_assert(kCount == 4 || kCount == 8 || kCount == 16, "a load of as many bytes");
    const uint32_t own = exists ? nonzero_bytes_from<kCount>(quarter) : 0;
    if constexpr (kCount == 16) {
      uint32_t half = own << 16 * (t & 1);
      half |= from_lane(half, 1);
      const uint32_t other = from_lane(half, 2);
      word[0] &= (t < 2 ? half : other) >> 2 * t;
      word[1] &= (t < 2 ? other : half) >> 2 * t;
    } else {
      uint32_t all = own << kCount * t;
      all |= from_lane(all, 1);
      all |= from_lane(all, 2);
      word[0] &= all >> 2 * t;
    }
  }

 private:
  ATTN_DEVICE static uint32_t from_lane(uint32_t x, int mask) { return bits_of(shuffle_xor(float_of(x), mask)); }
};

// relative_bias of one query row, by the distance of a key from where the row stands.
struct TableRow {
  const float* middle;  // of distance 0
  int reach, first;  // first: the distance of the key that others are counted from

  ATTN_DEVICE TableRow(const Head& h, int head, int position, int first_key) {
    const AttentionParams& p = h.p;
    reach = static_cast<int>(p.relative_reach);
    middle = static_cast<const float*>(p.relative_bias) + head * (2 * p.relative_reach + 1) + reach;
    // In 32 bits, once it is cut off so far beyond the ends that all keys of a tile are beyond them too.
    constexpr int kMostKeys = 4096;
    const int64_t distance = first_key - h.own_at(position), most = int64_t{reach} + kMostKeys;
    first = static_cast<int>(distance < -most ? -most : distance > most ? most : distance);
  }
  // Of the key `further` keys after that.
  ATTN_DEVICE float operator[](int further) const { return middle[clamp(first + further, -reach, reach)]; }
};

// What happens to the products of a row before `bias`. Returns what they are still to be multiplied with.
template <int kCount, class Key>
ATTN_DEVICE float before_bias(float (&x)[kCount], const Head& h, int head, int position, Key key) {
  const AttentionParams& p = h.p;
  float scale = h.factors.scale;
  if (h.factors.cap != 0.0f) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = capped_score(x[i], h.factors);
    scale = 1.0f;
  }
  if (p.slopes != nullptr) {
    const float slope = static_cast<const float*>(p.slopes)[recomputed(h.batch) * p.slopes_stride + head];
    const float distance = static_cast<float>(key(0) - h.own_at(position));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = score(x[i], scale, product(slope, distance + static_cast<float>(key(i) - key(0))));
    }
    scale = 1.0f;
  }
  if (p.relative_bias != nullptr) {
    const TableRow table(h, head, position, key(0));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float term = table[key(i) - key(0)];
      x[i] = is_minus_infinity(term) ? term : score(x[i], scale, term);
    }
    scale = 1.0f;
  }
  return scale;
}

// Two neighbours of the bias, from an even place on, if they exist.
template <class M>
ATTN_DEVICE void load_bias_pair(float (&pair)[2], const StridedView& view, int64_t place, bool is_float, bool exists) {
  using Element = typename M::Element;
  if (!exists) return;
  if (is_float) {
    struct alignas(8) Two {
      float x[2];
    };
    const Two two = *reinterpret_cast<const Two*>(static_cast<const float*>(view.data) + place);
    pair[0] = two.x[0], pair[1] = two.x[1];
  } else if constexpr (sizeof(Element) == 2) {
    const uint32_t two = *reinterpret_cast<const uint32_t*>(static_cast<const Element*>(view.data) + place);
    pair[0] = M::low(two), pair[1] = M::high(two);
  }
}

// Hides what masks, ids of segments and blocks do not show, of the keys along a row.
template <int kCount>
ATTN_DEVICE void hide_along_row(float (&x)[kCount], const Head& h, int head, int position, Interval seen,
                                KeysAlongRow key) {
  const AttentionParams& p = h.p;
  const auto is_seen = [=](int i) { return key(i) >= seen.begin && key(i) < seen.end; };
  if (p.num_masks > 0) {
    Shown<kCount> shown;
#pragma unroll 1
    for (int m = 0; m < p.num_masks; ++m) {
      const uint8_t* mask = static_cast<const uint8_t*>(p.masks[m].data) + line(p.masks[m], h.batch, head, position);
      if constexpr (kCount >= 4) {
        if (h.factors.whole_masks[m]) {
          const int quarter = key.first + kCount * key.t;
          shown.leave(mask + quarter, seen.begin < seen.end && quarter < p.seqlen_k, key.t);
          continue;
        }
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (is_seen(i) && mask[key(i) * p.masks[m].stride[3]] == 0) shown.hide(i);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!shown(i)) x[i] = minus_infinity();
    }
  }
  const auto hide_unless = [&](auto may_be_seen) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (is_seen(i) && !may_be_seen(key(i))) x[i] = minus_infinity();
    }
  };
  if (seen.begin >= seen.end) return;  // and a row that does not exist has no id, and is in no block
  if (p.query_ids.data != nullptr) {
    const int batch = recomputed(h.batch);
    const int32_t id = p.query_ids.data[batch * p.query_ids.stride + position];
    const int32_t* key_ids = p.key_ids.data + batch * p.key_ids.stride;
    hide_unless([=](int j) { return key_ids[j] == id; });
  }
  if (p.blocks.data != nullptr) {
    const uint8_t* blocks =
        static_cast<const uint8_t*>(p.blocks.data) + line(p.blocks, h.batch, head, divide(position, h.factors.block_q));
    hide_unless([=, &p, &h](int j) { return blocks[divide(j, h.factors.block_k) * p.blocks.stride[3]] != 0; });
  }
}

// What a row sees of kCount keys from `first_key` on, a multiple of that, as a bit for each. kUnroll at a time, where what
// is told of them is read one by one.
template <int kCount, int kUnroll>
ATTN_DEVICE uint32_t shown_keys(const Head& h, int head, int position, Interval seen, int first_key) {
  const AttentionParams& p = h.p;
  const auto below = [=](int j) { return (1u << clamp(j - first_key, 0, kCount)) - 1; };
  uint32_t shown = below(seen.end) & ~below(seen.begin);
  if (shown == 0) return 0;  // and a row that does not exist has no line, no id, and is in no block
  const int batch = recomputed(h.batch);
  const auto hide_unless = [&](auto may_be_seen) {
    const uint32_t before = shown;  // so that no load waits for another
#pragma unroll kUnroll
    for (int i = 0; i < kCount; ++i) {
      if ((before >> i & 1) != 0 && !may_be_seen(first_key + i)) shown &= ~(1u << i);
    }
  };
#pragma unroll 1
  for (int m = 0; m < p.num_masks; ++m) {
    const uint8_t* mask = static_cast<const uint8_t*>(p.masks[m].data) + line(p.masks[m], batch, head, position);
    if (h.factors.whole_masks[m]) {
      shown &= nonzero_bytes_from<kCount>(mask + first_key);
    } else {
      hide_unless([=, &p](int j) { return mask[j * p.masks[m].stride[3]] != 0; });
    }
  }
  if (p.query_ids.data != nullptr) {
    const int32_t id = p.query_ids.data[batch * p.query_ids.stride + position];
    const int32_t* key_ids = p.key_ids.data + batch * p.key_ids.stride;
    hide_unless([=](int j) { return key_ids[j] == id; });
  }
  if (p.blocks.data != nullptr) {
    const uint8_t* blocks =
        static_cast<const uint8_t*>(p.blocks.data) + line(p.blocks, batch, head, divide(position, h.factors.block_q));
    hide_unless([=, &p, &h](int j) { return blocks[divide(j, h.factors.block_k) * p.blocks.stride[3]] != 0; });
  }
  return shown;
}

//   x[i] = scale x[i]    x[i] = cap tanh(x[i] / cap)    x[i] += slope (key(i) - own) + table(key(i) - own) + bias
//
// or -inf where key(i) is not seen, for `count` keys of one query row. Nothing outside the row's interval is read.
template <class M, int kCount, class Key>
ATTN_DEVICE void finish_scores(float (&x)[kCount], const Head& h, int head, int position, Interval seen, Key key) {
  using Element = typename M::Element;
  const AttentionParams& p = h.p;
  const auto is_seen = [=](int i) {
    if constexpr (Key::kAlongRow) {
      return key(i) >= seen.begin && key(i) < seen.end;
    } else {
      return (key.shown >> 8 * i & 1) != 0;
    }
  };
  const int64_t bias_line = line(p.bias, h.batch, head, position);
  const float scale = before_bias(x, h, head, position, key);
  const bool has_bias = p.bias.data != nullptr, is_float = sizeof(Element) == 4 || p.bias.dtype == DType::kFloat32;
  const bool has_pairs = Key::kAlongRow && h.factors.bias_pairs;
  float pair[2] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    float bias = is_seen(i) ? 0.0f : minus_infinity();
    if (has_pairs) {
      if constexpr (Key::kAlongRow) {
        // Both of a pair exist if one does, but one may not be seen.
        if ((i & 1) == 0) load_bias_pair<M>(pair, p.bias, bias_line + key(i), is_float, is_seen(i) || is_seen(i + 1));
        if (is_seen(i)) bias = pair[i & 1];
      }
    } else if (has_bias && is_seen(i)) {
      const int64_t place = bias_line + key(i) * p.bias.stride[3];
      bias = is_float ? static_cast<const float*>(p.bias.data)[place]
                      : M::to_float(static_cast<const Element*>(p.bias.data)[place]);
    }
    // -inf hides, even a score of +inf or NaN; and so has that of a table, even from a bias.
    const bool hidden = is_minus_infinity(bias) || (p.relative_bias != nullptr && is_minus_infinity(x[i]));
    x[i] = hidden ? minus_infinity() : score(x[i], scale, bias);
  }
  if constexpr (Key::kAlongRow) hide_along_row(x, h, head, position, seen, key);
}

// The same for kernels that may know of no bias and no boolean mask.
template <class M, bool kPlain, int kCount, class Key>
ATTN_DEVICE void hide_or_scale(float (&x)[kCount], const Head& h, int head, int position, Interval seen, Key key) {
  if constexpr (kPlain) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = key(i) >= seen.begin && key(i) < seen.end ? product(x[i], h.factors.scale) : minus_infinity();
    }
  } else {
    finish_scores<M>(x, h, head, position, seen, key);
  }
}

}  // namespace attn_ops::cuda
