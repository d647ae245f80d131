// Into how many parts the keys of a decode step are cut, so that few heads fill many multiprocessors.
#pragma once

#include "config.h"

namespace attn_ops {
namespace cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kMostSplits = 128;     // more are not worth the time it takes to put them together
constexpr int kLeastStepsOfSplit = 4;  // tiles for each of a block's warps: fewer do not fill its pipeline
// Of the best use of the multiprocessors, how much is enough: more splits also read and write more.
constexpr double kGoodEnough = 0.85;

// `tiles` blocks times `steps` tiles of keys for each of its warps, with room for `slots` blocks at a time.
constexpr int decode_splits(int64_t tiles, int64_t steps, int64_t slots) {
  const int64_t fit = steps / kLeastStepsOfSplit;
  const int most = static_cast<int>(fit < 1 ? 1 : fit < kMostSplits ? fit : kMostSplits);
  // The share of the time that a slot is busy: the last wave may leave some empty, and the last split may be shorter.
  const auto busy = [=](int splits) {
    const int64_t waves = ceil_div(tiles * splits, slots), steps_each = ceil_div(steps, splits);
    return static_cast<double>(tiles) * static_cast<double>(steps) / static_cast<double>(waves * slots * steps_each);
  };
  if (tiles <= 0 || steps <= 0 || slots <= 0) return 1;
  double best = 0;
  for (int splits = 1; splits <= most; ++splits)
    if (busy(splits) > best) best = busy(splits);
  int splits = 1;
  while (busy(splits) < kGoodEnough * best) ++splits;
  return splits;
}

}  // namespace cuda
}  // namespace attn_ops
