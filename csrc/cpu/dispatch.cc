// Chooses the instruction set, cuts a call into tasks and runs them on the caller's threads.
//
// What is cut by shape alone (key splits, row chunks) may change the last bit of a result; what depends on the
// number of threads (tiles per task, heads per wave) only groups work. So any thread count gives the same bits.
#include <cstdlib>
#include <cstring>

#include <algorithm>
#include <atomic>

#include "blocking.h"
#include "cpu_features.h"
#include "kernels.h"

namespace attn_ops {
namespace cpu {
namespace {

// ---------------------------------------------------------------------------------------------- instruction sets

const Kernels* const kBuilt[] = {  // best first
#ifdef ATTN_OPS_HAVE_AVX512
    &kernels_avx512,
#endif
#ifdef ATTN_OPS_HAVE_AVX2
    &kernels_avx2,
#endif
#ifdef ATTN_OPS_HAVE_NEON
    &kernels_neon,
#endif
    &kernels_generic,
};

bool runs_here(const Kernels* k) {
#if defined(__x86_64__)
  const CpuFeatures cpu;
  if (!strcmp(k->name, "avx512")) return cpu.avx512f && cpu.avx512bw && cpu.avx512vl && cpu.avx512dq && cpu.fma;
  if (!strcmp(k->name, "avx2")) return cpu.avx2 && cpu.fma && cpu.f16c;
#elif defined(__aarch64__)
  if (!strcmp(k->name, "neon")) return true;  // part of the architecture
#endif
  return !strcmp(k->name, "generic");
}

const Kernels* find(const char* isa) {
  for (const Kernels* k : kBuilt)
    if ((!isa || !strcmp(k->name, isa)) && runs_here(k)) return k;
  return nullptr;
}

const Kernels* choose(const char* isa) { return find(isa ? isa : default_isa()); }

const TypedKernels& typed(const Kernels& k, DType t) { return t == DType::kFloat64 ? k.float64 : k.float32; }

// ---------------------------------------------------------------------------------------------- running tasks

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// Sums of bytes. What overflows, or comes near it, is a size that no memory has.
constexpr int64_t kNoMemory = int64_t{1} << 62;
int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? kNoMemory : min(product, kNoMemory);
}
int64_t plus(int64_t a, int64_t b) { return min(a + b, kNoMemory); }  // a, b up to kNoMemory

// Within the limits of attention.h, for which the sums of one thread's scratch cannot overflow.
bool within_limits(const AttentionParams& p) {
  return p.seqlen_q <= kMaxExtent && p.seqlen_k <= kMaxExtent && p.num_heads <= kMaxExtent && p.head_dim <= kMaxDim &&
         p.value_dim <= kMaxDim;
}

// As many threads as find enough to do, of those lent. `passes` is the number of products of queries and keys.
Threads worth_waking(Threads threads, const AttentionParams& p, double passes) {
  double keys = static_cast<double>(p.seqlen_k);
  if (p.mask.window_left >= 0 && p.mask.window_right >= 0)
    keys = std::min(keys, static_cast<double>(p.mask.window_left) + static_cast<double>(p.mask.window_right) + 1);
  const double dims = static_cast<double>(p.head_dim + p.value_dim), rows = 1.0 * p.batch * p.num_heads * p.seqlen_q;
  const double flops = passes * rows * keys * dims;  // 2 for each of dims, of which a product has half
  const double bytes = 1.0 * p.batch * p.num_kv_heads * keys * dims * size_of(p.dtype);
  const double most = 1 + std::max(flops / kHelperFlops, bytes / kHelperBytes);
  if (most < threads.count) threads.count = static_cast<int>(most);
  return threads;
}

// task(i, slot) for i = 0 .. count - 1, handed out one by one: rows near the end of a causal matrix cost more.
template <class Task>
void run_tasks(const Threads& threads, int64_t count, const Task& task) {
  struct Shared {
    const Task& task;
    const int64_t count;
    std::atomic<int64_t> next{0};
  } shared{task, count};
  const auto body = [](void* arg, int slot) {
    Shared& s = *static_cast<Shared*>(arg);
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) s.task(i, slot);
  };
  const int slots = static_cast<int>(min(threads.run ? threads.count : 1, count));
  if (slots > 1) threads.run(threads.self, slots, body, &shared);
  else if (count > 0) body(&shared, 0);
}

// ---------------------------------------------------------------------------------------------- forward

struct ForwardPlan {
  bool few_rows;
  int64_t heads;           // batch * num_kv_heads
  int64_t tiles;           // row tiles of each
  int64_t blocks, splits, split_keys;  // tasks of each head: row blocks times key splits
  int64_t head_groups;     // of each batch, for few rows
  int64_t scratch_bytes, partial_bytes;  // of one thread; of one split of one head

  ForwardPlan(const AttentionParams& p, const TypedKernels& k, int threads) {
    const int64_t rows = p.seqlen_q * group_size(p);
    few_rows = k.few_rows(p);
    heads = p.batch * p.num_kv_heads;
    tiles = k.tiles(rows);
    head_groups = ceil_div(p.num_kv_heads, kFewRowsHeads);

    // Few rows and many keys (decode): split the keys until there is enough to do.
    const int64_t whole_tasks = few_rows ? p.batch * head_groups : heads * ceil_div(tiles, kForwardTiles);
    splits = 1;
    if (whole_tasks > 0 && whole_tasks < kSplitTasks)
      splits = max(1, min(ceil_div(kSplitTasks, whole_tasks), p.seqlen_k / (few_rows ? kFewRowsSplitKeys : kSplitKeys)));
    split_keys = ceil_div(ceil_div(p.seqlen_k, splits), kBlockKeys) * kBlockKeys;
    partial_bytes = splits > 1 ? aligned(rows * (p.value_dim + 2) * size_of(accumulator_of(p.dtype))) : 0;

    // Long tasks copy keys less often; four for each thread are enough to keep all busy to the end.
    const int64_t wanted = ceil_div(4 * threads, max(1, heads * splits));
    blocks = min(tiles, wanted);
    scratch_bytes = aligned(few_rows ? k.few_rows_scratch(p, min(kFewRowsHeads, p.num_kv_heads)) : k.forward_scratch(p));
  }

  int64_t first_tile(int64_t block) const { return block * tiles / blocks; }
  int64_t bytes(int threads) const {
    return plus(times(threads, scratch_bytes), splits > 1 ? times(heads * splits, partial_bytes) : 0);
  }
};

void few_rows(const AttentionParams& p, const TypedKernels& k, const ForwardPlan& plan, const Threads& threads,
              char* scratch, char* partials) {
  run_tasks(threads, p.batch * plan.head_groups * plan.splits, [&](int64_t i, int slot) {
    const int64_t split = i % plan.splits, group = i / plan.splits % plan.head_groups;
    FewRowsTask task{};
    task.batch = i / plan.splits / plan.head_groups;
    task.head_begin = group * p.num_kv_heads / plan.head_groups;
    task.head_end = (group + 1) * p.num_kv_heads / plan.head_groups;
    task.key_begin = split * plan.split_keys;
    task.key_end = min(task.key_begin + plan.split_keys, p.seqlen_k);
    task.head_bytes = plan.splits * plan.partial_bytes;
    if (plan.splits > 1)
      task.partials = partials + (task.batch * p.num_kv_heads + task.head_begin) * task.head_bytes +
                      split * plan.partial_bytes;
    k.forward_few_rows(p, task, scratch + slot * plan.scratch_bytes);
  });
}

void row_tiles(const AttentionParams& p, const TypedKernels& k, const ForwardPlan& plan, const Threads& threads,
               char* scratch, char* partials) {
  run_tasks(threads, plan.heads * plan.blocks * plan.splits, [&](int64_t i, int slot) {
    const int64_t split = i % plan.splits, head = i / plan.splits / plan.blocks;
    // Last rows first: under a causal mask they take longest, and the short ones fill the gaps at the end.
    const int64_t block = plan.blocks - 1 - i / plan.splits % plan.blocks;
    ForwardTask task{};
    task.batch = head / p.num_kv_heads;
    task.kv_head = head % p.num_kv_heads;
    task.tile_begin = plan.first_tile(block);
    task.tile_end = plan.first_tile(block + 1);
    task.key_begin = split * plan.split_keys;
    task.key_end = min(task.key_begin + plan.split_keys, p.seqlen_k);
    const int64_t next = head + threads.count;
    task.next_head = plan.splits * plan.blocks == 1 && next < plan.heads ? next : -1;
    if (plan.splits > 1) task.partial = partials + (head * plan.splits + split) * plan.partial_bytes;
    k.forward(p, task, scratch + slot * plan.scratch_bytes);
  });
}

// ---------------------------------------------------------------------------------------------- backward

struct BackwardPlan {
  int64_t heads, tiles, chunks, wave;  // wave: heads in flight
  int64_t dk_bytes, chunk_bytes;       // of one chunk: dk alone, dk and dv
  int64_t scratch_bytes;

  BackwardPlan(const BackwardParams& params, const TypedKernels& k, int threads) {
    const AttentionParams& p = params.forward;
    const int64_t rows = p.seqlen_q * group_size(p), size = size_of(accumulator_of(p.dtype));
    heads = p.batch * p.num_kv_heads;
    tiles = k.tiles(rows);
    chunks = heads > 0 ? max(1, min(min(ceil_div(kChunkTasks, heads), rows / kChunkRows), tiles)) : 1;
    dk_bytes = aligned(p.seqlen_k * k.padded(p.head_dim) * size);
    chunk_bytes = dk_bytes + aligned(p.seqlen_k * k.padded(p.value_dim) * size);
    // At least one head, and two tasks per thread, even where that needs more than kWaveBytes.
    wave = max(ceil_div(2 * threads, chunks), kWaveBytes / max(1, times(chunks, chunk_bytes)));
    wave = max(1, min(wave, heads));
    scratch_bytes = k.backward_scratch(params);
    scratch_bytes = max(scratch_bytes, size * max(k.padded(p.head_dim), k.padded(p.value_dim)));  // reduce
    if (params.d_bias) scratch_bytes = max(scratch_bytes, k.bias_gradient_scratch(params));
    scratch_bytes = aligned(scratch_bytes);
  }

  int64_t first_tile(int64_t chunk) const { return chunk * tiles / chunks; }
  // A head in one chunk is reduced by the task that made it.
  int64_t bytes(int threads) const {
    return plus(times(threads, scratch_bytes), times(chunks == 1 ? threads : wave * chunks, chunk_bytes));
  }
};

void bias_gradient(const BackwardParams& params, const TypedKernels& k, const Threads& threads, char* scratch,
                   int64_t scratch_bytes) {
  const int64_t* const shape = params.d_bias_shape;
  const int64_t tiles = k.tiles(params.forward.seqlen_q);  // of one query head
  const int64_t per_head = shape[2] == 1 ? min(1, tiles) : tiles;
  if (shape[0] * shape[1] * shape[2] * shape[3] == 0) return;
  if (tiles == 0 || params.forward.batch == 0 || params.forward.num_heads == 0) {  // no row ever used the bias
    memset(params.d_bias, 0, shape[0] * shape[1] * shape[2] * shape[3] * size_of(params.forward.bias.dtype));
    return;
  }
  run_tasks(threads, shape[0] * shape[1] * per_head, [&](int64_t i, int slot) {
    const int64_t head = i / per_head, tile = i % per_head;
    const BiasGradientTask task{head / shape[1], head % shape[1], tile, shape[2] == 1 ? tiles : tile + 1};
    k.bias_gradient(params, task, scratch + slot * scratch_bytes);
  });
}

// Zeros in a [batch, seqlen, heads, dim] array, which may be empty.
void fill_zeros(const StridedView& view, int64_t batch, int64_t seqlen, int64_t heads, int64_t dim) {
  const int64_t size = size_of(view.dtype);
  if (batch == 0 || seqlen == 0 || heads == 0 || dim == 0) return;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t s = 0; s < seqlen; ++s)
      for (int64_t h = 0; h < heads; ++h) {
        char* const row = static_cast<char*>(view.data) +
                          (b * view.stride[0] + s * view.stride[1] + h * view.stride[2]) * size;
        if (view.stride[3] == 1) memset(row, 0, dim * size);
        else for (int64_t d = 0; d < dim; ++d) memset(row + d * view.stride[3] * size, 0, size);
      }
}

// The gradients where there is no row: none of queries, and no key or bias was used.
void gradients_of_nothing(const BackwardParams& params, const TypedKernels& k) {
  const AttentionParams& p = params.forward;
  fill_zeros(params.dk, p.batch, p.seqlen_k, p.num_kv_heads, p.head_dim);
  fill_zeros(params.dv, p.batch, p.seqlen_k, p.num_kv_heads, p.value_dim);
  if (params.d_bias) bias_gradient(params, k, Threads{}, nullptr, 0);
}

}  // namespace

int isas(const char** names, int capacity) {
  int n = 0;
  for (const Kernels* k : kBuilt)
    if (runs_here(k) && n < capacity) names[n++] = k->name;
  return n;
}

bool isa_usable(const char* isa) { return find(isa) != nullptr; }

const char* default_isa() {
  static char chosen[16];
  static const bool once = [] {
    const char* const wanted = getenv("ATTN_OPS_ISA");
    strncpy(chosen, wanted && *wanted ? wanted : find(nullptr)->name, sizeof chosen - 1);
    return true;
  }();
  (void)once;
  return chosen;
}

double probe(const ProbeSlice& slice, double* sink, const char* isa) {
  const Kernels* const k = choose(isa);
  return k ? k->probe(slice, sink) : 0.0;
}

size_t forward_workspace_bytes(const AttentionParams& p, int num_threads, const char* isa) {
  const Kernels* const k = choose(isa);
  if (!k || !has_rows(p)) return 0;
  return within_limits(p) ? ForwardPlan(p, typed(*k, p.dtype), num_threads).bytes(num_threads) : kNoMemory;
}

bool forward(const AttentionParams& p, Threads threads, Workspace workspace, const char* isa) {
  const Kernels* const chosen = choose(isa);
  if (!chosen) return false;
  if (!has_rows(p)) return true;
  if (!within_limits(p)) return false;
  const TypedKernels& k = typed(*chosen, p.dtype);
  threads = worth_waking(threads, p, 2);
  const ForwardPlan plan(p, k, threads.count);
  if (workspace.bytes < static_cast<size_t>(plan.bytes(threads.count))) return false;
  char* const scratch = static_cast<char*>(workspace.data);
  char* const partials = scratch + threads.count * plan.scratch_bytes;

  (plan.few_rows ? few_rows : row_tiles)(p, k, plan, threads, scratch, partials);
  if (plan.splits > 1)
    run_tasks(threads, plan.heads, [&](int64_t head, int) {
      k.combine(p, CombineTask{head / p.num_kv_heads, head % p.num_kv_heads, plan.splits, plan.partial_bytes,
                               partials + head * plan.splits * plan.partial_bytes});
    });
  return true;
}

size_t backward_workspace_bytes(const BackwardParams& params, int num_threads, const char* isa) {
  const Kernels* const k = choose(isa);
  if (!k || !has_rows(params.forward)) return 0;
  if (!within_limits(params.forward)) return kNoMemory;
  return BackwardPlan(params, typed(*k, params.forward.dtype), num_threads).bytes(num_threads);
}

bool backward(const BackwardParams& params, Threads threads, Workspace workspace, const char* isa) {
  const AttentionParams& p = params.forward;
  const Kernels* const chosen = choose(isa);
  if (!chosen) return false;
  const TypedKernels& k = typed(*chosen, p.dtype);
  if (!has_rows(p)) {
    gradients_of_nothing(params, k);
    return true;
  }
  if (!within_limits(p)) return false;
  threads = worth_waking(threads, p, 5);
  const BackwardPlan plan(params, k, threads.count);
  if (workspace.bytes < static_cast<size_t>(plan.bytes(threads.count))) return false;
  char* const scratch = static_cast<char*>(workspace.data);
  char* const partials = scratch + threads.count * plan.scratch_bytes;

  int64_t chunk_tiles[kChunkTasks + 1];
  for (int64_t c = 0; c <= plan.chunks; ++c) chunk_tiles[c] = plan.first_tile(c);
  const auto chunk_gradients = [&](int64_t head, int64_t chunk, int64_t next_head, char* dk, int slot) {
    k.backward(params, BackwardTask{head / p.num_kv_heads, head % p.num_kv_heads, chunk_tiles[chunk],
                                    chunk_tiles[chunk + 1], next_head, dk, dk + plan.dk_bytes},
               scratch + slot * plan.scratch_bytes);
  };
  const auto reduce_keys = [&](int64_t head, int64_t begin, int64_t end, const char* dk, int slot) {
    k.reduce(params, ReduceTask{head / p.num_kv_heads, head % p.num_kv_heads, begin, end, plan.chunks, chunk_tiles, dk,
                                dk + plan.dk_bytes, plan.chunk_bytes},
             scratch + slot * plan.scratch_bytes);
  };

  if (plan.chunks == 1) {
    run_tasks(threads, plan.heads, [&](int64_t head, int slot) {
      char* const dk = partials + slot * plan.chunk_bytes;
      const int64_t next = head + threads.count;
      chunk_gradients(head, 0, next < plan.heads ? next : -1, dk, slot);
      reduce_keys(head, 0, p.seqlen_k, dk, slot);
    });
  } else {
    const int64_t block = 4 * kBlockKeys, blocks = ceil_div(p.seqlen_k, block);
    for (int64_t first = 0; first < plan.heads; first += plan.wave) {
      const int64_t heads = min(plan.wave, plan.heads - first);
      run_tasks(threads, heads * plan.chunks, [&](int64_t i, int slot) {
        const int64_t head = i % heads, chunk = plan.chunks - 1 - i / heads;  // longest first, as in forward
        chunk_gradients(first + head, chunk, -1, partials + (head * plan.chunks + chunk) * plan.chunk_bytes, slot);
      });
      run_tasks(threads, heads * blocks, [&](int64_t i, int slot) {
        const int64_t head = i / blocks, begin = i % blocks * block;
        reduce_keys(first + head, begin, min(begin + block, p.seqlen_k),
                    partials + head * plan.chunks * plan.chunk_bytes, slot);
      });
    }
  }
  if (params.d_bias) bias_gradient(params, k, threads, scratch, plan.scratch_bytes);
  return true;
}

}  // namespace cpu
}  // namespace attn_ops
