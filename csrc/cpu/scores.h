// All that happens to a raw score before the softmax, in one order for every kernel:
//
//   s = scale q k^T    s = cap tanh(s / cap)    s += slope (j - own_i)    s += relative_bias(j - own_i)    s += bias
//   hidden: -inf       (a sink joins at the end of a row: join_sink)
//
// score_block does it for tiles, with a query row in each lane: forward and backward alike, so backward's weights are
// forward's, bit for bit. finish_row_scores does it for one row with the keys in the lanes (head_lanes.h).
//
// What only depends on the distance j - own_i is never a matrix: along a diagonal it is one number.
#pragma once

#include "key_rows.h"
#include "rows_ahead.h"
#include "staircase.h"
#include "visibility.h"

namespace attn_ops::cpu {
namespace {

// s + bias. A bias of -inf hides, whatever the score is. A sum of finite numbers stays finite: past the end of the
// range -inf would hide a key that is not hidden, and inf would make the row NaN. Almost all sums are finite as they are.
template <class T>
ATTN_INLINE Vec<T> biased(Vec<T> s, Vec<T> bias) {
  using S = Simd<T>;
  const Vec<T> sum = s + bias;
  if (__builtin_expect(S::finite(sum), 1)) return sum;
  const Vec<T> largest = S::set1(kLargest<T>), hidden = S::set1(-kInfinity<T>);
  const Vec<T> finite = S::fma(s, S::zero(), bias * S::zero());  // 0, or NaN
  const Vec<T> inside = S::max(-largest, S::min(largest, sum));
  return S::select(bias == hidden, hidden, S::select(finite == S::zero(), inside, sum));
}

// The same of scores that something added before may have hidden: those stay so, whatever the bias is.
template <class T>
ATTN_INLINE Vec<T> biased_unless_hidden(Vec<T> s, Vec<T> bias) {
  return Simd<T>::select(s == Simd<T>::set1(-kInfinity<T>), s, biased<T>(s, bias));
}

// Either of a block: scores at[j * ld] + bias[j]. Where all sums are finite they are all there is to it; else it is add(at, bias).
template <class T, class Add>
ATTN_INLINE void add_block(T* at, int64_t ld, const Vec<T>* bias, int64_t n, const Add& add) {
  using S = Simd<T>;
  Vec<T> zeros[4] = {};  // or NaN
#pragma GCC unroll 16
  for (int64_t j = 0; j < n; ++j) zeros[j % 4] = S::fma(S::load(at + j * ld) + bias[j], S::zero(), zeros[j % 4]);
  if (__builtin_expect(S::finite((zeros[0] + zeros[1]) + (zeros[2] + zeros[3])), 1)) {
#pragma GCC unroll 16
    for (int64_t j = 0; j < n; ++j) S::store(at + j * ld, S::load(at + j * ld) + bias[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) add(at + j * ld, bias[j]);
  }
}

// The scores whose bit is set, and -inf in the other lanes.
template <class T>
ATTN_INLINE Vec<T> seen_or_hidden(uint64_t bits, Vec<T> s) {
  using S = Simd<T>;
  using I = typename S::I;
  using Bits = decltype(I{}[0] + 0);
  I lane_bit;
  for (int i = 0; i < S::width; ++i) lane_bit[i] = Bits{1} << i;
  const I all = I{} + static_cast<Bits>(bits & ((uint64_t{1} << S::width) - 1));
  return S::select((all & lane_bit) != 0, s, S::set1(-kInfinity<T>));
}

// Whether scores can be hidden otherwise than by a mask, and whether they are what the product gives.
ATTN_INLINE bool added_may_hide(const AttentionParams& p) { return p.bias.data || p.relative_bias; }
ATTN_INLINE bool plain_scores(const AttentionParams& p) { return !added_may_hide(p) && p.soft_cap == 0 && !p.slopes; }

// What the scores of a row are compared with. A row that has seen nothing yet has the maximum -inf; -inf - (-inf) would
// be NaN, so it is compared with 0 instead.
template <class T>
ATTN_INLINE Vec<T> softmax_base(Vec<T> m) {
  return Simd<T>::select(m == Simd<T>::set1(-kInfinity<T>), Simd<T>::zero(), m);
}

// cap tanh(s / cap), between products and all else. `slopes`, where not null, gets the derivative 1 - tanh^2.
template <class T>
ATTN_INLINE Vec<T> capped(double cap, Vec<T> s, T* slopes) {
  using S = Simd<T>;
  const double inverse = 1 / cap, most = static_cast<double>(kLargest<T>);
  const Vec<T> t = tanh(s * S::set1(static_cast<T>(inverse < most ? inverse : most)));
  if (slopes) S::store(slopes, S::set1(1) - t * t);
  return t * S::set1(static_cast<T>(cap < most ? cap : most));
}

// What is told scores, in one vector of each row of keys after the other: the highest of each lane, or nothing. Loops work on a
// copy, which stays in registers.
template <class T, int NV>
struct Highest {
  Vec<T> of[NV];
  ATTN_INLINE void operator()(int v, Vec<T> x) { of[v] = Simd<T>::max(of[v], x); }
};
struct Untold {
  template <class V>
  ATTN_INLINE void operator()(int, V) {}
};

// All scores [keys][lanes] of a block capped, and their derivatives, [keys][lanes], unless null. see(v, score) is told the
// result.
template <class T, int NV, class See>
__attribute__((noinline)) void cap_scores(double cap, int64_t keys, T* scores, int64_t ld, T* slopes, See& see) {
  using S = Simd<T>;
  constexpr int W = S::width;
  See told = see;
  const auto all = [=, &told](auto wants_slopes) {
    for (int64_t j = 0; j < keys; ++j)
      for (int v = 0; v < NV; ++v) {
        T* const at = scores + j * ld + v * W;
        const Vec<T> s = capped<T>(cap, S::load(at), decltype(wants_slopes)::value ? slopes + (j * NV + v) * W : nullptr);
        S::store(at, s);
        told(v, s);
      }
  };
  if (slopes) all(std::true_type{});
  else all(std::false_type{});
  see = told;
}

template <class T>
ATTN_INLINE T slope_of(const HeadRows& r, int64_t head) {
  return static_cast<const T*>(r.p.slopes)[r.batch * r.p.slopes_stride + head];
}

// scores[j * ld + lane] += slope (k0 + j - own)
template <class T, int NV>
__attribute__((noinline)) void add_slopes(const HeadRows& r, const RowTile<T>& tile, int64_t k0, int64_t keys,
                                          T* scores, int64_t ld) {
  using S = Simd<T>;
  constexpr int W = S::width;
  T slope[NV * W], distance[NV * W];
  for (int i = 0; i < NV * W; ++i) {
    slope[i] = slope_of<T>(r, tile.head[i]);
    distance[i] = static_cast<T>(k0 - r.own(tile.position[i]));
  }
  Vec<T> by[NV], at_k0[NV];
  for (int v = 0; v < NV; ++v) by[v] = S::load(slope + v * W), at_k0[v] = S::load(distance + v * W);
  for (int64_t j = 0; j < keys; ++j)
    for (int v = 0; v < NV; ++v) {
      T* const at = scores + j * ld + v * W;
      S::store(at, S::fma(by[v], at_k0[v] + S::set1(static_cast<T>(j)), S::load(at)));
    }
}

// The row of relative_bias for a head.
template <class T>
ATTN_INLINE const T* relative_row(const AttentionParams& p, int64_t head) {
  return static_cast<const T*>(p.relative_bias) + head * (2 * p.relative_reach + 1);
}

// Where a distance is in it.
ATTN_INLINE int64_t relative_index(const AttentionParams& p, int64_t distance) {
  const int64_t reach = p.relative_reach;
  return (distance < -reach ? -reach : distance > reach ? reach : distance) + reach;
}

// to[i] = relative_bias of the distance `first` + i.
template <class T>
ATTN_INLINE void relative_values(const AttentionParams& p, int64_t head, int64_t first, int64_t count, T* to) {
  const T* const row = relative_row<T>(p, head);
  for (int64_t i = 0; i < count; ++i) to[i] = row[relative_index(p, first + i)];
}

// The distances between the rows of a tile of one head and keys k0 .. k0 + keys, each once, from the largest down: those
// of key j and the lanes from v on are `lanes` neighbours.
template <class T>
struct Diagonals {
  static constexpr int64_t kMost = kBlockKeys + RowTile<T>::max_lanes;
  int64_t last, count;  // last: distance of the last key and lane 0

  Diagonals(const HeadRows& r, const RowTile<T>& tile, int64_t k0, int64_t keys)
      : last(k0 + keys - 1 - r.own(tile.position[0])), count(keys - 1 + tile.lanes) {}
  int64_t distance(int64_t i) const { return last - i; }
};

// scores[j * ld + lane] += relative_bias of the distance, as `biased` does. `scratch`: [kBlockKeys][max_lanes].
template <class T, int NV>
__attribute__((noinline)) void add_relative_bias(const HeadRows& r, const RowTile<T>& tile, int64_t k0, int64_t keys,
                                                 T* scores, int64_t ld, T* scratch) {
  using S = Simd<T>;
  constexpr int W = S::width;
  if (r.group == 1) {
    const Diagonals<T> diagonals(r, tile, k0, keys);
    T value[Diagonals<T>::kMost];
    const T* const row = relative_row<T>(r.p, tile.head[0]);
    for (int64_t i = 0; i < diagonals.count; ++i) value[i] = row[relative_index(r.p, diagonals.distance(i))];
    for (int64_t j = 0; j < keys; ++j)
      for (int v = 0; v < NV; ++v) {
        T* const at = scores + j * ld + v * W;
        S::store(at, biased<T>(S::load(at), S::load(value + keys - 1 - j + v * W)));
      }
    return;
  }
  const char* row[RowTile<T>::max_lanes];
  for (int i = 0; i < tile.rows; ++i) {
    T* const values = scratch + i * kBlockKeys;
    relative_values(r.p, tile.head[i], k0 - r.own(tile.position[i]), keys, values);
    row[i] = reinterpret_cast<const char*>(values);
  }
  load_transposed<T>(kDTypeOf<T>, row, tile.rows, tile.lanes, sizeof(T), keys,
                     scores, ld, each_vector_of_block<T>([](T* at, Vec<T> x) { S::store(at, biased<T>(S::load(at), x)); }));
}

// add(&scores[j * ld + lane], bias)
template <class T, class Add>
__attribute__((noinline)) void each_bias(const HeadRows& r, const RowTile<T>& tile, int64_t k0, int64_t keys, T* scores,
                                         int64_t ld, const Add& add) {
  using S = Simd<T>;
  const StridedView& bias = r.p.bias;
  const int64_t stride = bias.step();
  const auto row_of = [&](int lane) { return r.score_row(bias, tile.position[lane], tile.head[lane]) + k0 * stride; };
  if (same_for_all_rows(r, tile, bias)) {
    T column[kBlockKeys];
    load_row<T>(bias.dtype, row_of(0), stride, keys, false, column);
    for (int64_t j = 0; j < keys; ++j)
      for (int i = 0; i < tile.lanes; i += S::width) add(scores + j * ld + i, S::set1(column[j]));
    return;
  }
  const char* row[RowTile<T>::max_lanes];
  for (int i = 0; i < tile.rows; ++i) row[i] = row_of(i);
  load_transposed<T>(bias.dtype, row, tile.rows, tile.lanes, stride, keys, scores, ld,
                     [=](T* at, int64_t step, const Vec<T>* block, int64_t n) { add_block<T>(at, step, block, n, add); });
}

// Whether biases, and their gradients, come from memory again and again.
inline bool bias_leaves_caches(const AttentionParams& p) {
  if (!p.bias.data) return false;
  double bytes = static_cast<double>(p.seqlen_q) * static_cast<double>(p.seqlen_k) * static_cast<double>(p.bias.step());
  if (p.bias.stride[0] != 0) bytes *= static_cast<double>(p.batch);
  if (p.bias.stride[1] != 0) bytes *= static_cast<double>(p.num_heads);
  return bytes > kBiasInCacheBytes;
}

// scores[j * ld + lane] += bias, as `biased` does.
template <class T>
ATTN_INLINE void add_bias(const HeadRows& r, const RowTile<T>& tile, int64_t k0, int64_t keys, T* scores, int64_t ld) {
  using S = Simd<T>;
  if (r.p.relative_bias) {
    each_bias<T>(r, tile, k0, keys, scores, ld,
                 [](T* at, Vec<T> x) { S::store(at, biased_unless_hidden<T>(S::load(at), x)); });
  } else {
    each_bias<T>(r, tile, k0, keys, scores, ld, [](T* at, Vec<T> x) { S::store(at, biased<T>(S::load(at), x)); });
  }
}

// scores[j * ld + lane] = -inf where the lane does not see key j; `visible` null: all do. see(v, score) is told the
// result where vectors meet keys.
template <class T, int NV, class See>
ATTN_INLINE void hide_scores(const RowTile<T>& tile, const uint64_t* visible, int64_t keys, const Staircase<T>& steps,
                             T* scores, int64_t ld, See& see) {
  using S = Simd<T>;
  constexpr int W = S::width;
  const auto met = [&](auto first_vector, auto count, int64_t begin, int64_t end) {
    constexpr int first = decltype(first_vector)::value, last = first + decltype(count)::value;
    const uint64_t used = bits_between(first * W, last * W < tile.rows ? last * W : tile.rows);
    See told = see;
    for (int64_t j = begin; j < end; ++j) {
      T* const at = scores + j * ld;
      if (!visible || (visible[j] & used) == used) {
        for (int v = first; v < last; ++v) told(v, S::load(at + v * W));
        continue;
      }
      for (int v = first; v < last; ++v) {
        const Vec<T> s = seen_or_hidden<T>(visible[j] >> (v * W), S::load(at + v * W));
        S::store(at + v * W, s);
        told(v, s);
      }
    }
    see = told;
  };
  by_vectors<NV>(steps, keys, met, [=](int v, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) S::store(scores + j * ld + v * W, S::set1(-kInfinity<T>));
  });
}

// What score_block works with.
template <class T>
struct ScoreScratch {
  uint64_t* visible;  // [kBlockKeys]
  T* relative;        // [max_lanes][kBlockKeys], where there is a relative bias

  static int64_t relative_count(const AttentionParams& p) {
    return p.relative_bias ? RowTile<T>::max_lanes * kBlockKeys : 0;
  }
  static int64_t bytes(const AttentionParams& p) {
    return Arena::bytes<uint64_t>(kBlockKeys) + Arena::bytes<T>(relative_count(p));
  }
  ScoreScratch() = default;
  ScoreScratch(const AttentionParams& p, Arena* arena)
      : visible(arena->take<uint64_t>(kBlockKeys)), relative(arena->take<T>(relative_count(p))) {}
};

// The scale in two factors. Pairs of queries take the power of two, which rounds nothing, and scores the rest, 1 to 2, so
// that no score is out of range before it is scaled.
template <class E>
struct Scale {
  Accumulator<E> of_q, of_scores;
  explicit Scale(double scale) : of_q(static_cast<Accumulator<E>>(scale)), of_scores(1) {
    if (!kOfPairs<E> || scale == 0) return;
    int exponent = 0;
    if (std::isfinite(scale)) std::frexp(scale, &exponent);
    exponent = exponent < -125 ? -125 : exponent > 125 ? 125 : exponent;
    of_q = std::ldexp(Accumulator<E>{1}, exponent - 1);
    of_scores = static_cast<Accumulator<E>>(scale / static_cast<double>(of_q));
  }
};

// scores[j * ld + lane] of a tile, whose queries, times of_q, are q [head_dim][ldq], against keys k0 .. k0 + n. see(v,
// scores) is told every vector. Nothing is written where the tile sees nothing; kSome also where there is a bias, which
// can hide: only after kAll may a loop do without looking for -inf. `cap_slopes`: see cap_scores. Products are made where
// the `steps` are; beside them all is hidden. Between products `next` is asked for.
template <class E, int NV, class T, class See>
ATTN_INLINE Visibility score_block(const HeadRows& r, const RowTile<T>& tile, const E* q, int64_t ldq,
                                   const KeyRows<E>& keys, int64_t k0, int64_t n, const Staircase<T>& steps,
                                   const ScoreScratch<T>& scratch,
                                   T* scores, int64_t ld, T* cap_slopes, See& see, NextTask& next) {
  using S = Simd<T>;
  constexpr int W = S::width;
  const AttentionParams& p = r.p;
  const int64_t depth = padded_elements<E>(p.head_dim);
  const Vec<T> factor = S::set1(Scale<E>(p.scale).of_scores);
  const auto scaled = [=](Vec<T> x) ATTN_INLINED { return kOfPairs<E> ? x * factor : x; };
  uint64_t* const visible = scratch.visible;
  const Visibility seen = visible_keys<T>(r, tile, k0, n, visible);
  if (seen == Visibility::kNothing) return seen;
  if (seen == Visibility::kAll && plain_scores(p)) {
    See told = see;
    gemm<E, NV, Major::kRow>(n, keys.at(k0), keys.ld(), q, ldq, depth, [=, &told](int64_t j, int v, Vec<T> x) ATTN_INLINED {
      x = scaled(x);
      S::store(scores + j * ld + v * W, x);
      told(v, x);
    }, [&] { next.ask(); });
    see = told;
    return seen;
  }
  const bool asks = bias_leaves_caches(p) && !same_for_all_rows(r, tile, p.bias);
  LaneRowsAhead bias(asks ? tile.rows : 0, n * p.bias.step(), [&](int lane) {
    return r.score_row(p.bias, tile.position[lane], tile.head[lane]) + k0 * p.bias.step();
  });
  gemm_of_steps<E, NV>(keys.at(k0), keys.ld(), q, ldq, depth, steps, scores, ld, scaled, [&] {
    bias.ask();
    next.ask();
  });
  if (p.soft_cap != 0) {
    if (seen == Visibility::kAll && !p.slopes && !added_may_hide(p)) {  // nothing happens to them after that
      cap_scores<T, NV>(p.soft_cap, n, scores, ld, cap_slopes, see);
      return seen;
    }
    Untold nobody;
    cap_scores<T, NV>(p.soft_cap, n, scores, ld, cap_slopes, nobody);
  }
  if (p.slopes) add_slopes<T, NV>(r, tile, k0, n, scores, ld);
  if (p.relative_bias) add_relative_bias<T, NV>(r, tile, k0, n, scores, ld, scratch.relative);
  if (p.bias.data) add_bias<T>(r, tile, k0, n, scores, ld);
  hide_scores<T, NV>(tile, seen == Visibility::kSome ? visible : nullptr, n, steps, scores, ld, see);
  return added_may_hide(p) ? Visibility::kSome : seen;
}

// scores[0 .. n) of one query row against keys k0 .. k0 + n, whose bits tell which it sees: the same, with -inf to the
// end of the last vector.
template <class T>
__attribute__((noinline)) void finish_row_scores(const HeadRows& r, int64_t position, int64_t head, int64_t k0,
                                                 int64_t n, uint64_t bits, T* scores) {
  using S = Simd<T>;
  const AttentionParams& p = r.p;
  const StridedView& bias = p.bias;
  const int64_t distance = k0 - r.own(position);
  T added[kHeadLanesKeys], relative[kHeadLanesKeys], distances[kHeadLanesKeys];
  if (bias.data) {
    const int64_t stride = bias.step();
    load_row<T>(bias.dtype, r.score_row(bias, position, head) + k0 * stride, stride, n, true, added);
  }
  const int64_t lanes = round_to_width<T>(n);
  if (p.relative_bias) relative_values(p, head, distance, lanes, relative);
  for (int64_t j = 0; p.slopes && j < lanes; ++j) distances[j] = static_cast<T>(distance + j);
  for (int64_t j = 0; j < n; j += S::width) {
    Vec<T> s = S::load(scores + j);
    if (p.soft_cap != 0) s = capped<T>(p.soft_cap, s, nullptr);
    if (p.slopes) s = S::fma(S::set1(slope_of<T>(r, head)), S::load(distances + j), s);
    if (p.relative_bias) s = biased<T>(s, S::load(relative + j));
    if (bias.data) {
      const Vec<T> x = S::load(added + j);
      s = p.relative_bias ? biased_unless_hidden<T>(s, x) : biased<T>(s, x);
    }
    S::store(scores + j, seen_or_hidden<T>(bits >> j, s));
  }
}

}  // namespace
}  // namespace attn_ops::cpu
