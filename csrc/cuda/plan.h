// What a call becomes: which kernel, how many blocks, how much workspace. Arithmetic only, so that it can be asked of
// any device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "args.h"
#include "config.h"
#include "driver.h"

namespace attn_ops::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// See Divisor. With 2^31 <= 2^(31 + s) / d < 2^32, s = ceil(log2 d), rounding up is exact for every x < 2^31 (Granlund
// and Montgomery, "Division by invariant integers using multiplication", PLDI 1994).
inline Divisor make_divisor(uint32_t d) {
  Divisor result;
  result.divisor = d;
  if (d <= 1) return result;
  int log = 0;
  while ((uint64_t{1} << log) < d) ++log;
  result.multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + log)) + d - 1) / d);
  result.shift = log - 1;
  return result;
}

// The bucket of the head dimensions, 0 if they are too large.
inline int dim_of(const AttentionParams& p) {
  const int64_t largest = std::max(p.head_dim, p.value_dim);
  for (int dim : kDims)
    if (largest <= dim) return dim;
  return 0;
}

inline Math math_of(const AttentionParams& p, bool decodes) {
  switch (p.dtype) {
    case DType::kFloat16: return Math::kFloat16;
    case DType::kBFloat16: return Math::kBFloat16;
    default: return p.allow_tf32 && !decodes && has_tf32(dim_of(p)) ? Math::kTf32 : Math::kFloat32;
  }
}

// Nothing to think of but an interval of keys per row: what the fast kernels are made for. They do not look whether
// scale makes an infinity of a finite product (which of two float16 is below 2^40).
inline bool is_plain(const AttentionParams& p) {
  const double largest_scale = p.dtype == DType::kFloat16 ? 1e20 : 1.0;
  return p.bias.data == nullptr && p.num_masks == 0 && p.query_ids.data == nullptr &&
         p.blocks.data == nullptr && p.dropout_rate == 0 && p.soft_cap == 0 && p.slopes == nullptr && p.relative_bias == nullptr &&
         p.scale > 0 && p.scale <= largest_scale;
}

// Whether `count` neighbours of a line of a score-shaped array can be read at a time, from any multiple of it.
inline bool reads_neighbours(const AttentionParams& p, const StridedView& view, int64_t count) {
  int64_t ends = p.seqlen_k;
  for (int axis = 0; axis < 3; ++axis) ends |= view.stride[axis];
  const auto address = reinterpret_cast<uintptr_t>(view.data);
  const bool aligned = ends % count == 0 && address % (count * size_of(view.dtype)) == 0;
  return view.data != nullptr && view.stride[3] == 1 && aligned;
}

inline Factors factors_of(const AttentionParams& p) {
  Factors f;
  for (int m = 0; m < p.num_masks; ++m) f.whole_masks[m] = reads_neighbours(p, p.masks[m], 16);
  f.bias_pairs = reads_neighbours(p, p.bias, 2);
  if (p.blocks.data != nullptr) {
    const auto divisor = [](int64_t x) { return make_divisor(static_cast<uint32_t>(std::min<int64_t>(x, INT32_MAX))); };
    f.block_q = divisor(p.block_q), f.block_k = divisor(p.block_k);
  }
  f.scale = static_cast<float>(p.scale);
  if (p.soft_cap != 0) {
    constexpr double kLargest = 3.4028234663852886e38;
    f.cap = static_cast<float>(std::min(p.soft_cap, kLargest));
    f.into_cap = static_cast<float>(std::clamp(p.scale / p.soft_cap, -kLargest, kLargest));
  }
  f.keep = static_cast<float>(1.0 / (1.0 - p.dropout_rate));
  f.drop_below = static_cast<uint32_t>(p.dropout_rate * 4294967296.0);
  return f;
}

// Keys and values of another dtype than the queries: of 16 bits beside float32.
inline bool has_narrow_keys(const AttentionParams& p) { return p.k.data != nullptr && p.k.dtype != p.dtype; }

// How many blocks of a kernel a device runs at a time, by its shared memory, of which 1 KiB of a block is the system's.
inline int64_t wave_of(const Device& device, const KernelName& kernel, int most_of_multiprocessor) {
  const int of_multiprocessor = device.shared_bytes / (block_shape(kernel).shared_bytes + 1024);
  return std::max<int64_t>(1, int64_t{device.multiprocessors} * std::clamp(of_multiprocessor, 1, most_of_multiprocessor));
}

// Whether dq, dk and dv are made by one launch, of so many blocks: where those run in fewer waves than in two launches.
// Of many waves, what one of them leaves empty is little.
inline bool joins_gradients(const KernelName& all, int64_t dq_blocks, int64_t key_blocks, const Device& device) {
  if (!makes_all_gradients(all.math, all.dim)) return false;
  constexpr int kBlocks = 2;  // of a multiprocessor: there are no registers for more
  constexpr int64_t kMostWaves = 4;
  const int64_t wave = wave_of(device, all, kBlocks);
  const int64_t waves = ceil_div(dq_blocks + key_blocks, wave);
  return waves <= kMostWaves && waves < ceil_div(dq_blocks, wave) + ceil_div(key_blocks, wave);
}

// Decode's kernel for the keys of a call.
inline KernelName decode_kernel(const AttentionParams& p) {
  const Role narrow = p.k.dtype == DType::kFloat16 ? Role::kDecodeF16Keys : Role::kDecodeBF16Keys;
  return {has_narrow_keys(p) ? narrow : Role::kDecode, math_of(p, true), dim_of(p)};
}

inline int64_t num_rows(const AttentionParams& p) { return p.seqlen_q * group_size(p); }

inline Rows rows_of(const AttentionParams& p, int64_t tiles) {
  Rows rows;
  rows.group = make_divisor(static_cast<uint32_t>(group_size(p)));
  rows.count = static_cast<int32_t>(num_rows(p));
  rows.tiles = static_cast<int32_t>(tiles);
  return rows;
}

// See Aligned, for rows of `dim` elements. Strides of axes with one index do not matter: frameworks leave anything in
// them.
inline uint8_t alignment_of(const AttentionParams& p, const StridedView& view, int64_t seqlen, int64_t heads,
                            int64_t dim) {
  const bool in_pages = p.block_table != nullptr && (view.data == p.k.data || view.data == p.v.data);
  const int64_t bytes = size_of(view.dtype), extent[] = {in_pages ? int64_t{2} : p.batch, seqlen, heads};
  if (dim == 0 || (dim > 1 && view.stride[3] != 1)) return 0;
  uint64_t ends = reinterpret_cast<uintptr_t>(view.data) | static_cast<uint64_t>(dim * bytes);
  for (int axis = 0; axis < 3; ++axis)
    if (extent[axis] > 1) ends |= static_cast<uint64_t>(view.stride[axis] * bytes);
  return ends % 16 == 0 ? 16 : ends % 8 == 0 ? 8 : ends % 4 == 0 ? 4 : 0;
}

inline Aligned aligned_of(const AttentionParams& p) {
  Aligned a;
  a.q = alignment_of(p, p.q, p.seqlen_q, p.num_heads, p.head_dim);
  a.k = alignment_of(p, p.k, p.seqlen_k, p.num_kv_heads, p.head_dim);
  a.v = alignment_of(p, p.v, p.seqlen_k, p.num_kv_heads, p.value_dim);
  a.out = alignment_of(p, p.out, p.seqlen_q, p.num_heads, p.value_dim);
  return a;
}

inline Aligned aligned_of(const BackwardParams& b) {
  const AttentionParams& p = b.forward;
  Aligned a = aligned_of(p);
  a.d_out = alignment_of(p, b.d_out, p.seqlen_q, p.num_heads, p.value_dim);
  a.dq = alignment_of(p, b.dq, p.seqlen_q, p.num_heads, p.head_dim);
  a.dk = alignment_of(p, b.dk, p.seqlen_k, p.num_kv_heads, p.head_dim);
  a.dv = alignment_of(p, b.dv, p.seqlen_k, p.num_kv_heads, p.value_dim);
  return a;
}

constexpr int64_t kMostReach = int64_t{1} << 29;  // of relative_bias: what is counted of it fits 32 bits

// The gradient of relative_bias: a block for each head, each part of its distances, and each part of its rows. By shapes
// alone, as the sums are.
struct TablePlan {
  int64_t blocks = 0, numbers = 0;  // numbers: of the table
  int parts = 1;

  TablePlan(const AttentionParams& p, const Tile& tile) {
    const int64_t owners = p.num_heads * distance_tiles(p.relative_reach, tile.threads());
    const int64_t row_tiles = p.batch * ceil_div(p.seqlen_q, tile.block_m);
    constexpr int64_t kEnoughBlocks = 512;
    const int64_t wanted = owners > 0 ? ceil_div(kEnoughBlocks, owners) : 1;
    parts = static_cast<int>(std::max<int64_t>(1, std::min({wanted, row_tiles, int64_t{kMostTableParts}})));
    blocks = owners * parts;
    numbers = p.num_heads * (2 * p.relative_reach + 1);
  }
  size_t workspace_bytes() const { return parts == 1 ? 0 : static_cast<size_t>(parts * numbers) * sizeof(float); }
};

// How a call with few query rows is cut: into tiles of rows, and each into parts of its keys, as many as the device can
// use. The workspace has room for as many as any device would be given, so that it follows from shapes alone: whoever
// lends it need not know where the call will run.
struct DecodePlan {
  int64_t tiles = 0;  // of all heads
  int tiles_per_head = 0, most_splits = 1;
  size_t partial_out_bytes = 0, partial_stats_bytes = 0, ticket_bytes = 0;

  size_t workspace_bytes() const { return partial_out_bytes + partial_stats_bytes + ticket_bytes; }

  explicit DecodePlan(const AttentionParams& p) {
    tiles_per_head = static_cast<int>(ceil_div(num_rows(p), kDecodeRows));
    tiles = p.batch * p.num_kv_heads * tiles_per_head;
    int64_t keys = p.seqlen_k;
    const int64_t left = p.mask.window_left, right = p.mask.window_right;
    if (left >= 0 && right >= 0 && left < keys && right < keys) {
      keys = std::min(keys, left + right + p.seqlen_q);
    }
    steps_ = ceil_div(keys, kDecodeWarps * decode_keys(math_of(p, true)));
    constexpr int64_t kMostBlocks = 2048;  // four times what the largest cards run at a time
    const int64_t of_tile = kMostBlocks / std::max<int64_t>(tiles, 1);
    most_splits = static_cast<int>(std::min({steps_ / 2, int64_t{kMostSplits}, of_tile}));
    if (most_splits <= 1) return;
    const size_t lines = static_cast<size_t>(tiles) * most_splits * kDecodeRows;
    partial_out_bytes = lines * decode_quads(p.value_dim) * 4 * sizeof(float);
    partial_stats_bytes = lines * 2 * sizeof(float);
    ticket_bytes = static_cast<size_t>(tiles) * sizeof(uint64_t);
  }

  int choose_splits(const AttentionParams& p, const Device& device) const {
    if (most_splits <= 1) return 1;
    const int64_t wave = wave_of(device, decode_kernel(p), INT32_MAX);
    constexpr int64_t kOwnSteps = 4;
    // A block takes its steps, and a few more for its beginning and its end; blocks run in waves. Putting the parts
    // together is left out: 4 rows of 32 parts are 64 KiB of cache, where a step is 32 KiB of memory (head dim 128, 16
    // bits). In 32 bits, as so many divisions take long for a decode step.
    const auto cost = [t = static_cast<uint32_t>(tiles), w = static_cast<uint32_t>(wave),
                       s = static_cast<uint32_t>(steps_)](uint32_t splits) {
      return uint64_t{(t * splits + w - 1) / w} * ((s + splits - 1) / splits + kOwnSteps);
    };
    uint32_t best = 1;
    uint64_t lowest = cost(1);
    for (uint32_t splits = 2; splits <= static_cast<uint32_t>(most_splits); ++splits) {
      const uint64_t own = cost(splits);
      if (own < lowest) lowest = own, best = splits;
    }
    return static_cast<int>(best);
  }

 private:
  int64_t steps_ = 0;  // of a block's warps, over all keys that a row may see
};

}  // namespace attn_ops::cuda
