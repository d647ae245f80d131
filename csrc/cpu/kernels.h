// What one instruction set provides. dispatch.cc cuts the work into these tasks; kernels.cc, compiled once per ISA,
// fills the table. Tasks of one call may run on any thread in any order and give the same bits.
#pragma once

#include "../attention.h"

namespace attn_ops::cpu {

// Row tiles [tile_begin, tile_end) of one (batch, kv head) against keys [key_begin, key_end).
struct RowLanesTask {
  int64_t batch, kv_head, tile_begin, tile_end, key_begin, key_end;
  int64_t next_head;  // batch * num_kv_heads + kv_head of what this thread will probably do next, or -1
  void* partial;  // null: write out and statistics. Else this split's [row][value_dim + 2] of the accumulator type
};

// The few rows of the kv heads [head_begin, head_end) of one batch against keys [key_begin, key_end).
struct HeadLanesPart {
  int64_t batch, head_begin, head_end, key_begin, key_end;
};
struct HeadLanesTask : HeadLanesPart {
  HeadLanesPart next;  // what the thread will probably do next; without heads if that is nothing
  void* partials;  // as RowLanesTask::partial, for head_begin; those of the next head follow after head_bytes
  int64_t head_bytes;
};

// The splits of one (batch, kv head) into out and statistics. The partials are overwritten.
struct CombineTask {
  int64_t batch, kv_head, splits, split_bytes;
  void* partials;  // [split][row][value_dim + 2]
};

// Where a task adds the gradient of a bias that several scores share: bias_gradient.h.
struct BiasSums {
  void* sums;      // of the accumulator type for kElements, else of doubles; null where nothing is shared
  double* totals;  // kElements: where the sums are added from time to time, or null
  int64_t stride;  // from one query head to the next; 0: they have the same bias
  bool starts;     // nothing is in `sums` yet
  bool adds;       // `sums` are added to `totals` when the task is done
  bool begins;     // in which nothing is yet
};

// Row tiles [tile_begin, tile_end) of one (batch, kv head), or of each of its query heads (separate_heads): writes
// their dq, and their share of dk, dv.
struct BackwardTask {
  int64_t batch, kv_head, tile_begin, tile_end, next_head;
  void *dk, *dv;  // [seqlen_k][head_dim or value_dim, padded to whole vectors], written where a row sees a key
  double* d_relative_bias;  // [group][2 reach + 1], the rows' share, or null where it is not wanted
  double* d_sinks;          // [group], the same
  BiasSums d_bias;          // the rows' share of the bias gradient
};

// dk, dv of one (batch, kv head), keys [key_begin, key_end): the sum over `chunks` backward tasks, in order.
struct ReduceTask {
  int64_t batch, kv_head, key_begin, key_end, chunks;
  const int64_t* chunk_tiles;  // [chunks + 1] tile boundaries
  const void *dk, *dv;         // chunk c starts at c * chunk_bytes
  int64_t chunk_bytes;
};

// How many scores share an element of the bias, and with it what is summed for its gradient (bias_gradient.h).
enum class BiasGradient {
  kNone,      // not wanted, or empty
  kOwn,       // no two scores do: backward writes ds where it belongs
  kElements,  // those of several heads or batches: [row][key]
  kColumns,   // those of all rows: [key]
  kRows,      // those of all keys: [row]
  kAll,       // those of all rows and keys: one number
};

static inline BiasGradient bias_gradient_of(const BackwardParams& params) {
  const AttentionParams& p = params.forward;
  const int64_t* const shape = params.d_bias_shape;
  if (!params.d_bias || shape[0] * shape[1] * shape[2] * shape[3] == 0) return BiasGradient::kNone;
  if (shape[0] == p.batch && shape[1] == p.num_heads && shape[2] == p.seqlen_q && shape[3] == p.seqlen_k)
    return BiasGradient::kOwn;
  if (shape[3] == 1) return shape[2] == 1 ? BiasGradient::kAll : BiasGradient::kRows;
  return shape[2] == 1 ? BiasGradient::kColumns : BiasGradient::kElements;
}

// Whether backward takes the query heads of a kv head one after the other, instead of all as one list of rows: sums
// over heads are then sums of whole tiles.
static inline bool separate_heads(BiasGradient kind) { return kind > BiasGradient::kOwn; }

// Elements begin .. end of d_bias [batch][head] (indices of the bias as it is before broadcasting) from what the tasks
// left: of `copies` tasks, `stride` apart, added in that order.
struct BiasGradientTask {
  int64_t batch, head, begin, end;
  const void* sums;
  const double* totals;  // instead of `sums`, or null
  int64_t copies, stride;
};

// The kernels of one ISA for one accumulator type.
struct TypedKernels {
  int64_t (*tiles)(int64_t rows);                // row tiles of a (batch, kv head)
  int64_t (*padded)(int64_t dim);                // dim rounded up to whole vectors
  bool (*few_rows)(const AttentionParams&);  // whether head_lanes is forward's kernel for this call, else row_lanes
  int64_t (*row_lanes_scratch)(const AttentionParams&);
  void (*row_lanes)(const AttentionParams&, const RowLanesTask&, void* scratch);
  int64_t (*head_lanes_scratch)(const AttentionParams&, int64_t heads);  // null, and the next one: not of this instruction set
  void (*head_lanes)(const AttentionParams&, const HeadLanesTask&, void* scratch);
  void (*combine)(const AttentionParams&, const CombineTask&);
  int64_t (*backward_scratch)(const BackwardParams&);
  void (*backward)(const BackwardParams&, const BackwardTask&, void* scratch);
  void (*reduce)(const BackwardParams&, const ReduceTask&, void* scratch);
  void (*bias_gradient)(const BackwardParams&, const BiasGradientTask&, void* scratch);
};

struct Kernels {
  const char* name;
  // Where these kernels are for pairs of bfloat16 alone (kernels_of_pairs): those for all other calls, else null.
  const Kernels* others;
  TypedKernels of_pairs;
  TypedKernels float32, float64;
  // Rows of float32, float16 or bfloat16 for an int8 cache: quantize.h.
  void (*quantize)(DType, const void* rows, int64_t count, int64_t dim, int8_t* out, float* scales);
  double (*probe)(const ProbeSlice&, double* sink);  // see cpu::probe in attention.h
};

#define ISA(name, ...) extern const Kernels kernels_##name;
#include "isas.inc"
#undef ISA

}  // namespace attn_ops::cpu
