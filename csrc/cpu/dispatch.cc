// Chooses the instruction set, and runs the tasks that schedule.h cuts a call into on the caller's threads.
#include <cstdlib>
#include <cstring>

#include <algorithm>
#include <atomic>

#include "cpu_features.h"
#include "float_mode.h"
#include "kernels.h"
#include "packed_masks.h"
#include "schedule.h"
#include "segments.h"

namespace attn_ops::cpu {
namespace {

// ---------------------------------------------------------------------------------------------- instruction sets

// Those compiled in that this machine runs, best first; `best` is the first that is not slow here. Asked once: under a hypervisor
// the question is dear.
struct Usable {
  const Kernels* kernels[16];
  const Kernels* best = nullptr;
  int count = 0;

  Usable() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#define NEEDS(feature) && ATTN_OPS_CPU_HAS(feature)
#define ASKS NEEDS
#define SLOW_ON(maker) && ((slow = ATTN_OPS_CPU_IS(maker)), true)
#define ISA(name, processor, needs, ...) ATTN_OPS_ON_##processor(slow = false; if (true needs) add(&kernels_##name, slow);)
    bool slow;
#include "isas.inc"
#undef ISA
#undef SLOW_ON
#undef ASKS
#undef NEEDS
  }

 private:
  void add(const Kernels* k, bool slow) {
    kernels[count++] = k;
    if (!best && !slow) best = k;
  }
};

const Usable& usable() {
  static const Usable once;
  return once;
}

// `isa` null: the default one. Null if it is not usable.
const Kernels* choose(const char* isa) {
  if (!isa) isa = default_isa();
  const Usable& all = usable();
  for (int i = 0; i < all.count; ++i)
    if (!strcmp(all.kernels[i]->name, isa)) return all.kernels[i];
  return nullptr;
}

// Whether floats and halves may be rounded to bfloat16 for products.
bool rounds_to_bfloat16() {
  static const bool once = [] {
    const char* const wanted = getenv("ATTN_OPS_ALLOW_BFLOAT16");
    return wanted && *wanted && strcmp(wanted, "0") != 0;
  }();
  return once;
}

// Whether queries, keys and values are rows of pairs of bfloat16, or may be rounded to them.
bool of_pairs(const AttentionParams& p, bool may_round) {
  const auto fits = [=](const StridedView& v) {
    return v.stride[3] == 1 && (v.dtype == DType::kBFloat16 ||
                                (may_round && (v.dtype == DType::kFloat32 || v.dtype == DType::kFloat16)));
  };
  return p.head_dim % 2 == 0 && p.value_dim % 2 == 0 && fits(p.q) && fits(p.k) && fits(p.v);
}

const TypedKernels& typed(const Kernels& k, const AttentionParams& p, bool pairs) {
  if (k.others) return pairs ? k.of_pairs : typed(*k.others, p, false);
  return p.dtype == DType::kFloat64 ? k.float64 : k.float32;
}
// Few rows are what they are in memory, and a matrix unit has nothing for them.
const TypedKernels& forward_kernels(const Kernels& k, const AttentionParams& p) {
  const bool few = k.others && k.of_pairs.few_rows(p);
  return typed(k, p, of_pairs(p, rounds_to_bfloat16() && !few) && !(few && !k.of_pairs.head_lanes));
}
const TypedKernels& backward_kernels(const Kernels& k, const BackwardParams& params) {
  return typed(k, params.forward, of_pairs(params.forward, rounds_to_bfloat16()) && params.d_out.stride[3] == 1);
}

const Kernels& without_pairs(const Kernels& k) { return k.others ? *k.others : k; }

// ---------------------------------------------------------------------------------------------- running tasks

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
    const FloatMode mode;
    for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.count;) s.task(i, slot);
  };
  const int slots = static_cast<int>(std::min<int64_t>(threads.run ? threads.count : 1, count));
  if (slots > 1) threads.run(threads.self, slots, body, &shared);
  else if (count > 0) body(&shared, 0);
}

// What is found of a call before its tasks run: intervals of segments, packed masks.
class Prepared {
 public:
  // group: of the lists of rows that tiles are cut from (HeadRows), or 0 where there are no tiles.
  Prepared(const AttentionParams& given, int64_t group) : segments_(given), masks_(given, group) {}

  int64_t bytes() const { return plus(segments_.bytes(), masks_.bytes()); }

  AttentionParams in(char* memory, const Threads& threads) const {
    const AttentionParams p = segments_.in(memory);
    char* const bits = memory + segments_.bytes();
    const int64_t at_once = masks_.at_once();
    run_tasks(threads, ceil_div(masks_.count(), at_once), [&](int64_t i, int) {
      masks_.pack(i * at_once, std::min((i + 1) * at_once, masks_.count()), bits);
    });
    return masks_.in(p, bits);
  }

 private:
  const SegmentRanges segments_;
  const PackedMasks masks_;
};

Prepared prepared_forward(const AttentionParams& p, const TypedKernels& k) {
  return Prepared(p, k.few_rows(p) ? 0 : group_size(p));
}
Prepared prepared_backward(const BackwardParams& params) {
  return Prepared(params.forward, separate_heads(bias_gradient_of(params)) ? 1 : group_size(params.forward));
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
void gradients_of_nothing(const BackwardParams& params) {
  const AttentionParams& p = params.forward;
  fill_zeros(params.dk, p.batch, p.seqlen_k, p.num_kv_heads, p.head_dim);
  fill_zeros(params.dv, p.batch, p.seqlen_k, p.num_kv_heads, p.value_dim);
  const int64_t* const shape = params.d_bias_shape;
  const int64_t bias_bytes = shape[0] * shape[1] * shape[2] * shape[3] * size_of(p.bias.dtype);
  if (params.d_bias && bias_bytes > 0) memset(params.d_bias, 0, bias_bytes);
  const int64_t size = size_of(accumulator_of(p.dtype));
  if (params.d_relative_bias) memset(params.d_relative_bias, 0, p.num_heads * (2 * p.relative_reach + 1) * size);
  if (params.d_sinks) memset(params.d_sinks, 0, p.num_heads * size);
}

// d_relative_bias and d_sinks: what the tasks left, [batch * kv head][chunk][terms], summed in that order.
void sum_terms(const BackwardParams& params, const BackwardPlan& plan, const double* terms) {
  const AttentionParams& p = params.forward;
  const auto sum = [&](void* to, int64_t first, int64_t count) {  // `count` of each kv head, from `first` on
    for (int64_t kv_head = 0; kv_head < plan.kv_heads; ++kv_head)
      for (int64_t i = 0; i < count; ++i) {
        double total = 0;
        for (int64_t head = kv_head; head < plan.heads; head += plan.kv_heads)
          for (int64_t c = 0; c < plan.chunks; ++c) total += terms[(head * plan.chunks + c) * plan.terms + first + i];
        const int64_t at = kv_head * count + i;
        if (p.dtype == DType::kFloat64) static_cast<double*>(to)[at] = total;
        else static_cast<float*>(to)[at] = static_cast<float>(total);
      }
  };
  if (params.d_relative_bias) sum(params.d_relative_bias, 0, plan.relative);
  if (params.d_sinks) sum(params.d_sinks, plan.relative, plan.terms - plan.relative);
}

}  // namespace

int isas(const char** names, int capacity) {
  const int count = std::min(usable().count, capacity);
  for (int i = 0; i < count; ++i) names[i] = usable().kernels[i]->name;
  return count;
}

bool isa_usable(const char* isa) { return choose(isa) != nullptr; }

const char* default_isa() {
  static char chosen[16];
  static const bool once = [] {
    const char* const wanted = getenv("ATTN_OPS_ISA");
    strncpy(chosen, wanted && *wanted ? wanted : usable().best->name, sizeof chosen - 1);
    return true;
  }();
  (void)once;
  return chosen;
}

double probe(const ProbeSlice& slice, double* sink, const char* isa) {
  const Kernels* const k = choose(isa);
  return k ? without_pairs(*k).probe(slice, sink) : 0.0;
}

bool quantize(DType dtype, const void* rows, int64_t count, int64_t dim, int8_t* out, float* scales, const char* isa) {
  const Kernels* const k = choose(isa);
  const FloatMode mode;
  if (k) without_pairs(*k).quantize(dtype, rows, count, dim, out, scales);
  return k != nullptr;
}

size_t forward_workspace_bytes(const AttentionParams& p, int num_threads, const char* isa) {
  const Kernels* const k = choose(isa);
  if (!k || !has_rows(p)) return 0;
  if (!within_limits(p)) return kNoMemory;
  const TypedKernels& kernels = forward_kernels(*k, p);
  return plus(prepared_forward(p, kernels).bytes(), ForwardPlan(p, kernels, num_threads).bytes());
}

bool forward(const AttentionParams& given, Threads threads, Workspace workspace, const char* isa) {
  const Kernels* const chosen = choose(isa);
  if (!chosen) return false;
  if (!has_rows(given)) return true;
  if (!within_limits(given)) return false;
  const TypedKernels& k = forward_kernels(*chosen, given);
  const Prepared prepared = prepared_forward(given, k);
  const ForwardPlan plan(given, k, threads.count);
  if (workspace.bytes < static_cast<size_t>(plus(prepared.bytes(), plan.bytes()))) return false;
  threads.count = plan.threads;
  const AttentionParams p = prepared.in(static_cast<char*>(workspace.data), threads);
  char* const scratch = static_cast<char*>(workspace.data) + prepared.bytes();
  char* const partials = scratch + plan.threads * plan.scratch_bytes;

  run_tasks(threads, plan.tasks(), [&](int64_t i, int slot) {
    char* const memory = scratch + slot * plan.scratch_bytes;
    if (plan.few_rows) k.head_lanes(p, plan.head_lanes_task(i, partials), memory);
    else k.row_lanes(p, plan.row_lanes_task(i, partials), memory);
  });
  if (plan.splits > 1)
    run_tasks(threads, plan.heads, [&](int64_t head, int) { k.combine(p, plan.combine_task(head, partials)); });
  return true;
}

size_t backward_workspace_bytes(const BackwardParams& params, int num_threads, const char* isa) {
  const Kernels* const k = choose(isa);
  if (!k || !has_rows(params.forward)) return 0;
  if (!within_limits(params.forward)) return kNoMemory;
  return plus(prepared_backward(params).bytes(),
              BackwardPlan(params, backward_kernels(*k, params), num_threads).bytes());
}

bool backward(const BackwardParams& given, Threads threads, Workspace workspace, const char* isa) {
  const Kernels* const chosen = choose(isa);
  if (!chosen) return false;
  if (!has_rows(given.forward)) {
    gradients_of_nothing(given);
    return true;
  }
  if (!within_limits(given.forward)) return false;
  const TypedKernels& k = backward_kernels(*chosen, given);
  const Prepared prepared = prepared_backward(given);
  const BackwardPlan plan(given, k, threads.count);
  if (workspace.bytes < static_cast<size_t>(plus(prepared.bytes(), plan.bytes()))) return false;
  threads.count = plan.threads;
  BackwardParams params = given;
  params.forward = prepared.in(static_cast<char*>(workspace.data), threads);
  const AttentionParams& p = params.forward;
  char* const memory = static_cast<char*>(workspace.data) + prepared.bytes();
  double* const terms = reinterpret_cast<double*>(memory);
  char* const sums = memory + plan.terms_bytes();
  char* const scratch = sums + plan.sums_bytes() + plan.totals_bytes();
  char* const partials = scratch + plan.threads * plan.scratch_bytes;
  const auto scratch_of = [&](int slot) { return scratch + slot * plan.scratch_bytes; };
  // A chunk of those heads of a unit that lie between first and end, one after the other.
  const auto run_unit = [&](const HeadUnits& part, int64_t unit, int64_t chunk, int64_t first, int64_t end, int slot,
                            const auto& dk_of, const auto& done) {
    const HeadUnits::Heads heads = part.heads_of(unit);
    for (int64_t head = heads.from(first); head < std::min(end, heads.end); head += heads.stride) {
      k.backward(params, plan.chunk_task(part, unit, head, chunk, dk_of(head), terms, sums), scratch_of(slot));
      done(head);
    }
  };

  for (int64_t i = 0; i < plan.parts(); ++i) {
    const HeadUnits part = plan.part_at(i);
    if (plan.chunks == 1) {
      run_tasks(threads, part.units(), [&](int64_t unit, int slot) {
        char* const dk = partials + slot * plan.chunk_bytes;
        run_unit(part, unit, 0, 0, part.heads(), slot, [=](int64_t) { return dk; }, [&](int64_t head) {
          k.reduce(params, plan.reduce_task(part, head, 0, p.seqlen_k, dk), scratch_of(slot));
        });
      });
    } else {
      const int64_t block = 4 * kBlockKeys, blocks = ceil_div(p.seqlen_k, block);
      for (int64_t first = 0; first < part.heads(); first += plan.wave) {
        const int64_t heads = std::min(plan.wave, part.heads() - first);
        const auto partials_of = [&](int64_t head) {
          return partials + (head - first) * plan.chunks * plan.chunk_bytes;
        };
        run_tasks(threads, part.units() * plan.chunks, [&](int64_t i, int slot) {
          const int64_t chunk = plan.chunks - 1 - i / part.units();  // longest first, as in forward
          run_unit(part, i % part.units(), chunk, first, first + heads, slot,
                   [&](int64_t head) { return partials_of(head) + chunk * plan.chunk_bytes; }, [](int64_t) {});
        });
        run_tasks(threads, heads * blocks, [&](int64_t i, int slot) {
          const int64_t head = first + i / blocks, begin = i % blocks * block;
          const int64_t end = std::min(begin + block, p.seqlen_k);
          k.reduce(params, plan.reduce_task(part, head, begin, end, partials_of(head)), scratch_of(slot));
        });
      }
    }
    run_tasks(threads, plan.bias_tasks(part),
              [&](int64_t i, int slot) { k.bias_gradient(params, plan.bias_task(part, i, sums), scratch_of(slot)); });
  }
  const FloatMode mode;
  if (plan.terms > 0) sum_terms(params, plan, terms);
  return true;
}

}  // namespace attn_ops::cpu
