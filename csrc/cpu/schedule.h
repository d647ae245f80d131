// How a call is cut into tasks, what that costs, and how many of the lent threads are worth waking for it: arithmetic
// on the shape of the call and on what kernels tell of themselves, so that it can be asked without running any.
//
// What is cut by shape alone (key splits, row chunks) may change the last bit of a result; what depends on the number
// of threads (tiles per task, heads per wave) only groups work. So any thread count gives the same bits.
#pragma once

#include <algorithm>

#include "blocking.h"
#include "kernels.h"

namespace attn_ops::cpu {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// Sums of bytes. What overflows, or comes near it, is a size that no memory has.
constexpr int64_t kNoMemory = int64_t{1} << 62;
inline int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? kNoMemory : std::min(product, kNoMemory);
}
inline int64_t plus(int64_t a, int64_t b) { return std::min(a + b, kNoMemory); }  // a, b up to kNoMemory

// Within the limits of attention.h, for which the sums of one thread's scratch cannot overflow.
inline bool within_limits(const AttentionParams& p) {
  return p.seqlen_q <= kMaxExtent && p.seqlen_k <= kMaxExtent && p.num_heads <= kMaxExtent && p.head_dim <= kMaxDim &&
         p.value_dim <= kMaxDim;
}

// What a call costs at most: lengths and one-sided masks are not looked at.
struct Cost {
  double flops, bytes;  // of all products; of the keys and values

  // `products` of queries and keys, or of weights and values.
  Cost(const AttentionParams& p, int products) {
    double keys = static_cast<double>(p.seqlen_k);
    if (p.mask.window_left >= 0 && p.mask.window_right >= 0)
      keys = std::min(keys, static_cast<double>(p.mask.window_left) + static_cast<double>(p.mask.window_right) + 1);
    const double dims = static_cast<double>(p.head_dim + p.value_dim), rows = 1.0 * p.batch * p.num_heads * p.seqlen_q;
    flops = products * rows * keys * dims;  // 2 for each of dims, of which a product has half
    bytes = 1.0 * p.batch * p.num_kv_heads * keys * dims * size_of(p.k.dtype);
  }

  // As many threads as find enough to do, of those lent.
  int worth_waking(int lent) const {
    const double most = 1 + std::max(flops / kHelperFlops, bytes / kHelperBytes);
    return most < lent ? static_cast<int>(most) : lent;
  }
};

struct ForwardPlan {
  int threads;
  bool few_rows;                       // head lanes, else row lanes
  int64_t batch, kv_heads, seqlen_k;
  int64_t heads;                       // batch * num_kv_heads
  int64_t tiles;                       // row tiles of each
  int64_t blocks, splits, split_keys;  // tasks of each head: row blocks times key splits
  int64_t head_groups;                 // of each batch, for few rows
  int64_t scratch_bytes, partial_bytes;  // of one thread; of one split of one head

  ForwardPlan(const AttentionParams& p, const TypedKernels& k, int lent_threads)
      : threads(Cost(p, 2).worth_waking(lent_threads)), few_rows(k.few_rows(p)), batch(p.batch),
        kv_heads(p.num_kv_heads), seqlen_k(p.seqlen_k), heads(p.batch * p.num_kv_heads) {
    const int64_t rows = p.seqlen_q * group_size(p);
    tiles = k.tiles(rows);
    head_groups = ceil_div(kv_heads, kHeadLanesHeads);

    // Few rows and many keys (decode): split the keys until there is enough to do.
    const int64_t whole_tasks = few_rows ? batch * head_groups : heads * ceil_div(tiles, kForwardTiles);
    const int64_t least_keys = few_rows ? kHeadLanesSplitKeys : kSplitKeys;
    splits = 1;
    if (whole_tasks > 0 && whole_tasks < kSplitTasks)
      splits = std::max<int64_t>(1, std::min(ceil_div(kSplitTasks, whole_tasks), seqlen_k / least_keys));
    split_keys = ceil_div(ceil_div(seqlen_k, splits), kBlockKeys) * kBlockKeys;
    partial_bytes = splits > 1 ? aligned(rows * (p.value_dim + 2) * size_of(accumulator_of(p.dtype))) : 0;

    // Long tasks copy keys less often; four for each thread are enough to keep all busy to the end.
    blocks = std::min(tiles, ceil_div(4 * threads, std::max<int64_t>(1, heads * splits)));
    scratch_bytes =
        aligned(few_rows ? k.head_lanes_scratch(p, std::min(kHeadLanesHeads, kv_heads)) : k.row_lanes_scratch(p));
  }

  int64_t tasks() const { return (few_rows ? batch * head_groups : heads * blocks) * splits; }
  int64_t bytes() const {
    return plus(times(threads, scratch_bytes), splits > 1 ? times(heads * splits, partial_bytes) : 0);
  }

  // Task i of tasks(). `partials`: [head][split], where there are splits.
  HeadLanesTask head_lanes_task(int64_t i, char* partials) const {
    const int64_t split = i % splits, group = i / splits % head_groups;
    HeadLanesTask task{};
    task.batch = i / splits / head_groups;
    task.head_begin = group * kv_heads / head_groups;
    task.head_end = (group + 1) * kv_heads / head_groups;
    task.key_begin = split * split_keys;
    task.key_end = std::min(task.key_begin + split_keys, seqlen_k);
    task.head_bytes = splits * partial_bytes;
    if (splits > 1) task.partials = partial(partials, task.batch * kv_heads + task.head_begin, split);
    return task;
  }

  RowLanesTask row_lanes_task(int64_t i, char* partials) const {
    const int64_t split = i % splits, head = i / splits / blocks;
    // Last rows first: under a causal mask they take longest, and the short ones fill the gaps at the end.
    const int64_t block = blocks - 1 - i / splits % blocks;
    RowLanesTask task{};
    task.batch = head / kv_heads;
    task.kv_head = head % kv_heads;
    task.tile_begin = block * tiles / blocks;
    task.tile_end = (block + 1) * tiles / blocks;
    task.key_begin = split * split_keys;
    task.key_end = std::min(task.key_begin + split_keys, seqlen_k);
    task.next_head = splits * blocks == 1 && head + threads < heads ? head + threads : -1;
    if (splits > 1) task.partial = partial(partials, head, split);
    return task;
  }

  // The splits of a head put together.
  CombineTask combine_task(int64_t head, char* partials) const {
    return {head / kv_heads, head % kv_heads, splits, partial_bytes, partial(partials, head, 0)};
  }

 private:
  char* partial(char* partials, int64_t head, int64_t split) const {
    return partials + (head * splits + split) * partial_bytes;
  }
};

struct BackwardPlan {
  int threads;
  int64_t kv_heads, seqlen_k;
  int64_t heads, tiles, chunks, wave;  // wave: heads in flight
  int64_t dk_bytes, chunk_bytes;       // of one chunk: dk alone, dk and dv
  int64_t relative, terms;             // doubles of one chunk: d_relative_bias alone, and with d_sinks
  int64_t scratch_bytes;
  int64_t chunk_tiles[kChunkTasks + 1];  // where chunks begin and end

  BackwardPlan(const BackwardParams& params, const TypedKernels& k, int lent_threads)
      : threads(Cost(params.forward, 5).worth_waking(lent_threads)) {
    const AttentionParams& p = params.forward;
    const int64_t rows = p.seqlen_q * group_size(p), size = size_of(accumulator_of(p.dtype));
    kv_heads = p.num_kv_heads;
    seqlen_k = p.seqlen_k;
    heads = p.batch * kv_heads;
    tiles = k.tiles(rows);
    chunks = std::max<int64_t>(
        1, std::min({ceil_div(kChunkTasks, std::max<int64_t>(1, heads)), rows / kChunkRows, tiles}));
    for (int64_t c = 0; c <= chunks; ++c) chunk_tiles[c] = c * tiles / chunks;
    dk_bytes = aligned(seqlen_k * k.padded(p.head_dim) * size);
    chunk_bytes = dk_bytes + aligned(seqlen_k * k.padded(p.value_dim) * size);
    relative = params.d_relative_bias ? group_size(p) * (2 * p.relative_reach + 1) : 0;
    terms = relative + (params.d_sinks ? group_size(p) : 0);
    // At least one head, and two tasks per thread, even where that needs more than kWaveBytes.
    wave = std::max(ceil_div(2 * threads, chunks), kWaveBytes / std::max<int64_t>(1, times(chunks, chunk_bytes)));
    wave = std::max<int64_t>(1, std::min(wave, heads));
    scratch_bytes = std::max(k.backward_scratch(params),
                             size * std::max(k.padded(p.head_dim), k.padded(p.value_dim)));  // of reduce
    if (params.d_bias && !own_bias_gradient(params))
      scratch_bytes = std::max(scratch_bytes, k.bias_gradient_scratch(params));
    scratch_bytes = aligned(scratch_bytes);
  }

  // Those of all chunks are kept to the end.
  int64_t terms_bytes() const { return aligned(times(heads * chunks, terms * static_cast<int64_t>(sizeof(double)))); }

  // A head in one chunk is reduced by the task that made it.
  int64_t bytes() const {
    return plus(terms_bytes(),
                plus(times(threads, scratch_bytes), times(chunks == 1 ? threads : wave * chunks, chunk_bytes)));
  }

  // The rows of one chunk of a head. `dk`: the chunk's partial gradients; `all_terms`: [head][chunk][terms].
  BackwardTask chunk_task(int64_t head, int64_t chunk, char* dk, double* all_terms) const {
    const int64_t next = chunks == 1 && head + threads < heads ? head + threads : -1;
    double* const own = all_terms + (head * chunks + chunk) * terms;
    return {head / kv_heads, head % kv_heads, chunk_tiles[chunk], chunk_tiles[chunk + 1],    next,
            dk,              dk + dk_bytes,   relative ? own : nullptr, terms > relative ? own + relative : nullptr};
  }

  // The chunks of a head, from `dk` on, added up for some of the keys.
  ReduceTask reduce_task(int64_t head, int64_t key_begin, int64_t key_end, const char* dk) const {
    return {head / kv_heads, head % kv_heads, key_begin,     key_end,    chunks,
            chunk_tiles,     dk,              dk + dk_bytes, chunk_bytes};
  }
};

// A pass of its own, after backward's: rows of the bias as it is before broadcasting.
struct BiasGradientPlan {
  int64_t num_heads, tiles, per_head;  // of the bias; of one query head; tasks of each head of the bias
  int64_t tasks;

  BiasGradientPlan(const BackwardParams& params, const TypedKernels& k) {
    const int64_t* const shape = params.d_bias_shape;
    num_heads = shape[1];
    tiles = k.tiles(params.forward.seqlen_q);
    per_head = shape[2] == 1 ? 1 : tiles;  // all rows of a head are added to one row of the bias
    tasks = shape[3] > 0 ? shape[0] * shape[1] * per_head : 0;
  }

  BiasGradientTask task(int64_t i) const {
    const int64_t head = i / per_head, tile = i % per_head;
    return {head / num_heads, head % num_heads, tile, per_head == 1 ? tiles : tile + 1};
  }
};

}  // namespace
}  // namespace attn_ops::cpu
