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

  // As many threads as find enough to do with these kernels, of those lent.
  int worth_waking(int lent, const TypedKernels& k) const {
    const double lanes = static_cast<double>(k.padded(1));
    const double most = 1 + std::max(flops / (kHelperFlopsOfLane * lanes), bytes / kHelperBytes);
    return most < lent ? static_cast<int>(most) : lent;
  }
};

struct ForwardPlan {
  int threads;
  bool few_rows;                       // head lanes, else row lanes
  int64_t batch, kv_heads, seqlen_k;
  int64_t heads;                       // batch * num_kv_heads
  int64_t tiles;                       // row tiles of each
  int64_t whole_heads;                 // that are one task each; of the others:
  int64_t blocks, splits, split_keys;  // tasks of each head: row blocks times key splits
  int64_t head_groups;                 // of each batch, for few rows
  int64_t scratch_bytes, partial_bytes;  // of one thread; of one split of one head

  ForwardPlan(const AttentionParams& p, const TypedKernels& k, int lent_threads)
      : threads(Cost(p, 2).worth_waking(lent_threads, k)), few_rows(k.few_rows(p)), batch(p.batch),
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

    // Long tasks copy keys less often, four for each thread keep all busy. Where heads are that many, the last ones are
    // still cut, so that no thread waits for another's last head.
    blocks = std::min(tiles, ceil_div(4 * threads, std::max<int64_t>(1, heads * splits)));
    whole_heads = 0;
    if (blocks == 1 && splits == 1 && threads > 1) {
      whole_heads = std::max<int64_t>(0, heads - threads);
      blocks = std::min(tiles, kLastHeadTasks);
    }
    scratch_bytes =
        aligned(few_rows ? k.head_lanes_scratch(p, std::min(kHeadLanesHeads, kv_heads)) : k.row_lanes_scratch(p));
  }

  int64_t tasks() const {
    if (few_rows) return batch * head_groups * splits;
    return whole_heads + (heads - whole_heads) * blocks * splits;
  }
  int64_t bytes() const {
    return plus(times(threads, scratch_bytes), splits > 1 ? times(heads * splits, partial_bytes) : 0);
  }

  // Task i of tasks(). `partials`: [head][split], where there are splits.
  HeadLanesTask head_lanes_task(int64_t i, char* partials) const {
    HeadLanesTask task{};
    static_cast<HeadLanesPart&>(task) = head_lanes_part(i);
    if (i + threads < tasks()) task.next = head_lanes_part(i + threads);
    task.head_bytes = splits * partial_bytes;
    if (splits > 1) task.partials = partial(partials, task.batch * kv_heads + task.head_begin, i % splits);
    return task;
  }

  RowLanesTask row_lanes_task(int64_t i, char* partials) const {
    const bool whole = i < whole_heads;
    const int64_t parts = whole ? 1 : blocks, first_head = whole ? 0 : whole_heads, part = i - first_head;
    const int64_t split = part % splits, head = first_head + part / splits / parts;
    // Last rows first: under a causal mask they take longest, and the short ones fill the gaps at the end.
    const int64_t block = parts - 1 - part / splits % parts;
    RowLanesTask task{};
    task.batch = head / kv_heads;
    task.kv_head = head % kv_heads;
    task.tile_begin = block * tiles / parts;
    task.tile_end = (block + 1) * tiles / parts;
    task.key_begin = split * split_keys;
    task.key_end = std::min(task.key_begin + split_keys, seqlen_k);
    task.next_head = splits * parts == 1 && head + threads < heads ? head + threads : -1;
    if (splits > 1) task.partial = partial(partials, head, split);
    return task;
  }

  // The splits of a head put together.
  CombineTask combine_task(int64_t head, char* partials) const {
    return {head / kv_heads, head % kv_heads, splits, partial_bytes, partial(partials, head, 0)};
  }

 private:
  HeadLanesPart head_lanes_part(int64_t i) const {
    const int64_t group = i / splits % head_groups, key_begin = i % splits * split_keys;
    return {i / splits / head_groups, group * kv_heads / head_groups, (group + 1) * kv_heads / head_groups, key_begin,
            std::min(key_begin + split_keys, seqlen_k)};
  }
  char* partial(char* partials, int64_t head, int64_t split) const {
    return partials + (head * splits + split) * partial_bytes;
  }
};

// Some of the (batch, kv head) of backward: a rectangle, counted batch by batch, and in it the units. A unit is those
// that add to the same sums of a bias gradient, one after the other. Without such sums each is a unit of its own.
struct HeadUnits {
  int64_t first_batch, first_kv_head, batches, kv_heads;
  bool own_batch, own_head;  // whether every batch, every kv head has a bias of its own
  int64_t copies;            // units that share a bias: `unit` counts bias by bias

  int64_t heads() const { return batches * kv_heads; }
  int64_t batch(int64_t head) const { return first_batch + head / kv_heads; }
  int64_t kv_head(int64_t head) const { return first_kv_head + head % kv_heads; }
  int64_t biases() const { return (own_batch ? batches : 1) * (own_head ? kv_heads : 1); }
  int64_t units() const { return biases() * copies; }

  int64_t bias_batch(int64_t bias) const { return own_batch ? first_batch + (own_head ? bias / kv_heads : bias) : 0; }
  int64_t bias_kv_head(int64_t bias) const { return own_head ? first_kv_head + bias % kv_heads : 0; }

  // The heads of a unit: first, first + stride .. below end.
  struct Heads {
    int64_t first, stride, end;
    int64_t count() const { return ceil_div(end - first, stride); }
    int64_t from(int64_t at) const { return at <= first ? first : first + ceil_div(at - first, stride) * stride; }
  };
  Heads heads_of(int64_t unit) const {
    const int64_t bias = unit / copies, copy = unit % copies;
    if (own_batch && own_head) return {bias, 1, bias + 1};
    if (own_batch) return {bias * kv_heads + copy, copies, (bias + 1) * kv_heads};
    if (own_head) return {copy * kv_heads + bias, copies * kv_heads, heads()};
    return {copy, copies, heads()};
  }
};

struct BackwardPlan {
  int threads;
  BiasGradient bias;
  int64_t batch, kv_heads, seqlen_k;
  int64_t heads, tiles, chunks, wave;  // tiles: of a list of rows; wave: heads in flight
  int64_t dk_bytes, chunk_bytes;       // of one chunk: dk alone, dk and dv
  int64_t relative, terms;             // doubles of one chunk: d_relative_bias alone, and with d_sinks
  int64_t scratch_bytes;
  int64_t chunk_tiles[kChunkTasks + 1];  // where chunks begin and end
  // Sums of the bias gradient, [bias][list][copy][sums]: of a list of rows, and of one chunk where chunks share keys.
  int64_t bias_elements, lists, sums, chunk_sums;  // bias_elements: of a head
  int64_t sum_bytes, totals, total_every;  // of one sum; as many totals, which the sums join after so many heads
  char* in_place;                          // d_bias, where that is the sums, or null
  HeadUnits part;  // the first, and largest

  BackwardPlan(const BackwardParams& params, const TypedKernels& k, int lent_threads)
      : threads(Cost(params.forward, 5).worth_waking(lent_threads, k)), bias(bias_gradient_of(params)) {
    const AttentionParams& p = params.forward;
    const int64_t size = size_of(accumulator_of(p.dtype));
    const int64_t rows = separate_heads(bias) ? p.seqlen_q : p.seqlen_q * group_size(p);
    batch = p.batch;
    kv_heads = p.num_kv_heads;
    seqlen_k = p.seqlen_k;
    heads = batch * kv_heads;
    tiles = k.tiles(rows);
    chunks = std::min(ceil_div(kChunkTasks, std::max<int64_t>(1, heads)), rows / kChunkRows);
    if (bias == BiasGradient::kElements) {  // heads of a bias follow one another, so rows make the tasks
      const int64_t biases = params.d_bias_shape[0] * std::min(kv_heads, params.d_bias_shape[1]);
      chunks = std::min({std::max(rows / kChunkRows, ceil_div(kSumTasks, biases)), rows / kSumChunkRows, kChunkTasks});
    }
    chunks = std::max<int64_t>(1, std::min(chunks, tiles));
    for (int64_t c = 0; c <= chunks; ++c) chunk_tiles[c] = c * tiles / chunks;
    dk_bytes = aligned(seqlen_k * k.padded(p.head_dim) * size);
    chunk_bytes = dk_bytes + aligned(seqlen_k * k.padded(p.value_dim) * size);
    relative = params.d_relative_bias ? group_size(p) * (2 * p.relative_reach + 1) : 0;
    terms = relative + (params.d_sinks ? group_size(p) : 0);
    plan_sums(params, k);
    // At least one head, and two tasks per thread, even where that needs more than kWaveBytes.
    wave = std::max(ceil_div(2 * threads, chunks), kWaveBytes / std::max<int64_t>(1, times(chunks, chunk_bytes)));
    wave = std::max<int64_t>(1, std::min(wave, part.heads()));
    scratch_bytes = aligned(std::max(k.backward_scratch(params),
                                     size * std::max(k.padded(p.head_dim), k.padded(p.value_dim))));  // of reduce
  }

  // Those of all chunks are kept to the end.
  int64_t terms_bytes() const { return aligned(times(times(heads * chunks, terms), sizeof(double))); }
  int64_t sums_bytes() const { return in_place ? 0 : aligned(times(times(part.units() * lists, sums), sum_bytes)); }
  int64_t totals_bytes() const { return aligned(times(times(part.units() * lists, totals), sizeof(double))); }

  // A head in one chunk is reduced by the task that made it.
  int64_t bytes() const {
    return plus(plus(terms_bytes(), plus(sums_bytes(), totals_bytes())),
                plus(times(threads, scratch_bytes), times(chunks == 1 ? threads : wave * chunks, chunk_bytes)));
  }

  // All heads in parts, of whose sums there is room for one.
  int64_t parts() const { return ceil_div(batch, part.batches) * ceil_div(kv_heads, part.kv_heads); }
  HeadUnits part_at(int64_t i) const {
    const int64_t across = ceil_div(kv_heads, part.kv_heads);
    HeadUnits at = part;
    at.first_batch = i / across * part.batches;
    at.first_kv_head = i % across * part.kv_heads;
    at.batches = std::min(part.batches, batch - at.first_batch);
    at.kv_heads = std::min(part.kv_heads, kv_heads - at.first_kv_head);
    return at;
  }

  // The rows of one chunk of a head of a unit. `dk`: the chunk's partial gradients; `all_terms`: [head][chunk][terms].
  BackwardTask chunk_task(const HeadUnits& of, int64_t unit, int64_t head, int64_t chunk, char* dk, double* all_terms,
                          char* all_sums) const {
    BackwardTask task{};
    task.batch = of.batch(head);
    task.kv_head = of.kv_head(head);
    task.tile_begin = chunk_tiles[chunk];
    task.tile_end = chunk_tiles[chunk + 1];
    task.next_head = chunks == 1 ? next_head(of, unit, head) : -1;
    task.dk = dk;
    task.dv = dk + dk_bytes;
    double* const own = all_terms + ((task.batch * kv_heads + task.kv_head) * chunks + chunk) * terms;
    if (relative > 0) task.d_relative_bias = own;
    if (terms > relative) task.d_sinks = own + relative;
    if (sums > 0) {
      const HeadUnits::Heads unit_heads = of.heads_of(unit);
      const int64_t nth = (head - unit_heads.first) / unit_heads.stride, of_bias = unit / of.copies;
      const int64_t at = (of_bias * lists * of.copies + unit % of.copies) * sums + chunk * chunk_sums;
      const int64_t list = (of.bias_batch(of_bias) * (of.own_head ? kv_heads : 1) + of.bias_kv_head(of_bias)) * lists;
      task.d_bias.sums = in_place ? in_place + list * sums * sum_bytes : all_sums + at * sum_bytes;
      task.d_bias.stride = of.own_head ? of.copies * sums : 0;
      task.d_bias.starts = nth % total_every == 0;
      if (totals > 0) {
        task.d_bias.totals = reinterpret_cast<double*>(all_sums + sums_bytes()) + at;
        task.d_bias.adds = nth % total_every == total_every - 1 || nth == unit_heads.count() - 1;
        task.d_bias.begins = nth < total_every;
      }
    }
    return task;
  }

  // The chunks of a head, from `dk` on, added up for some of the keys.
  ReduceTask reduce_task(const HeadUnits& of, int64_t head, int64_t key_begin, int64_t key_end, const char* dk) const {
    return {of.batch(head), of.kv_head(head), key_begin,     key_end,    chunks,
            chunk_tiles,    dk,               dk + dk_bytes, chunk_bytes};
  }

  // d_bias of a part from its sums, some of the elements of a list at a time.
  int64_t bias_slices() const { return ceil_div(bias_elements, kSumSlice); }
  int64_t bias_tasks(const HeadUnits& of) const {
    return sums > 0 && !in_place ? of.biases() * lists * bias_slices() : 0;
  }
  BiasGradientTask bias_task(const HeadUnits& of, int64_t i, const char* all_sums) const {
    const int64_t list = i / bias_slices(), of_bias = list / lists, at = list * of.copies * sums;
    BiasGradientTask task{};
    task.batch = of.bias_batch(of_bias);
    task.head = of.bias_kv_head(of_bias) * lists + list % lists;
    task.begin = i % bias_slices() * kSumSlice;
    task.end = std::min(task.begin + kSumSlice, bias_elements);
    task.sums = all_sums + at * sum_bytes;
    if (totals > 0) task.totals = reinterpret_cast<const double*>(all_sums + sums_bytes()) + at;
    task.copies = of.copies * (chunk_sums > 0 ? chunks : 1);
    task.stride = chunk_sums > 0 ? chunk_sums : sums;
    return task;
  }

 private:
  void plan_sums(const BackwardParams& params, const TypedKernels& k) {
    const AttentionParams& p = params.forward;
    part = {0, 0, batch, kv_heads, true, true, 1};
    bias_elements = times(params.d_bias_shape[2], params.d_bias_shape[3]);
    in_place = nullptr;
    lists = 1, sums = 0, chunk_sums = 0, totals = 0, total_every = std::max<int64_t>(1, heads);
    sum_bytes = bias == BiasGradient::kElements ? size_of(accumulator_of(p.dtype)) : sizeof(double);
    if (!separate_heads(bias)) return;
    part.own_batch = params.d_bias_shape[0] == batch;
    part.own_head = params.d_bias_shape[1] == p.num_heads;
    if (part.own_head) lists = group_size(p);
    if (bias == BiasGradient::kElements) sums = bias_elements;
    if (bias == BiasGradient::kRows) sums = k.padded(p.seqlen_q);
    if (bias == BiasGradient::kColumns) chunk_sums = params.d_bias_shape[3];
    if (bias == BiasGradient::kAll) chunk_sums = 1;
    if (chunk_sums > 0) sums = times(chunks, chunk_sums);
    const int64_t biases = part.biases(), shared = heads / std::max<int64_t>(1, biases), room = kWaveBytes / sum_bytes;
    const int64_t most = std::min(ceil_div(kSumTasks, times(biases, chunks)), room / times(lists, sums));
    const bool rows_will_do = bias == BiasGradient::kElements && chunks > 1;
    part.copies = rows_will_do ? 1 : std::max<int64_t>(1, std::min(most, shared));
    if (bias == BiasGradient::kElements) {
      const int64_t terms_of_head = group_size(p) / lists;
      total_every = std::max<int64_t>(1, kSumTerms / terms_of_head);
      if (ceil_div(shared, part.copies) > total_every) totals = sums;
      else if (part.copies == 1 && p.bias.dtype == accumulator_of(p.dtype))
        in_place = static_cast<char*>(params.d_bias);
    }
    // As many biases at a time as there is room for, but two tasks per thread.
    const int64_t at_a_time = std::max(ceil_div(2 * threads, part.copies * chunks),
                                       room / times(times(lists, part.copies), sums));
    if (part.own_head) part.kv_heads = std::max<int64_t>(1, std::min(kv_heads, at_a_time));
    if (part.own_batch)
      part.batches = std::max<int64_t>(1, std::min(batch, at_a_time / (part.own_head ? kv_heads : 1)));
  }

  // What a thread will probably do next, as batch * num_kv_heads + kv_head, or -1.
  int64_t next_head(const HeadUnits& of, int64_t unit, int64_t head) const {
    const HeadUnits::Heads own = of.heads_of(unit);
    int64_t next = head + own.stride;
    if (next >= own.end) {
      if (unit + threads >= of.units()) return -1;
      next = of.heads_of(unit + threads).first;
    }
    return of.batch(next) * kv_heads + of.kv_head(next);
  }
};

}  // namespace
}  // namespace attn_ops::cpu
