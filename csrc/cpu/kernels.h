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
struct HeadLanesTask {
  int64_t batch, head_begin, head_end, key_begin, key_end;
  void* partials;  // as RowLanesTask::partial, for head_begin; those of the next head follow after head_bytes
  int64_t head_bytes;
};

// The splits of one (batch, kv head) into out and statistics. The partials are overwritten.
struct CombineTask {
  int64_t batch, kv_head, splits, split_bytes;
  void* partials;  // [split][row][value_dim + 2]
};

// Row tiles [tile_begin, tile_end) of one (batch, kv head): writes their dq, and their share of dk, dv.
struct BackwardTask {
  int64_t batch, kv_head, tile_begin, tile_end, next_head;
  void *dk, *dv;  // [seqlen_k][head_dim or value_dim, padded to whole vectors], written where a row sees a key
  double* d_relative_bias;  // [group][2 reach + 1], the rows' share, or null where it is not wanted
  double* d_sinks;          // [group], the same
};

// dk, dv of one (batch, kv head), keys [key_begin, key_end): the sum over `chunks` backward tasks, in order.
struct ReduceTask {
  int64_t batch, kv_head, key_begin, key_end, chunks;
  const int64_t* chunk_tiles;  // [chunks + 1] tile boundaries
  const void *dk, *dv;         // chunk c starts at c * chunk_bytes
  int64_t chunk_bytes;
};

// Rows [row_begin, row_end) of the bias gradient [b][h][row][key] (indices of the unbroadcast bias).
struct BiasGradientTask {
  int64_t bias_batch, bias_head, tile_begin, tile_end;
};

// Whether every score has an element of the bias of its own, so that the main pass of backward can write d_bias.
static inline bool own_bias_gradient(const BackwardParams& params) {
  const AttentionParams& p = params.forward;
  const int64_t* const shape = params.d_bias_shape;
  return params.d_bias && shape[0] == p.batch && shape[1] == p.num_heads && shape[2] == p.seqlen_q &&
         shape[3] == p.seqlen_k;
}

// The kernels of one ISA for one accumulator type.
struct TypedKernels {
  int64_t (*tiles)(int64_t rows);                // row tiles of a (batch, kv head)
  int64_t (*padded)(int64_t dim);                // dim rounded up to whole vectors
  bool (*few_rows)(const AttentionParams&);  // whether head_lanes is forward's kernel for this call, else row_lanes
  int64_t (*row_lanes_scratch)(const AttentionParams&);
  void (*row_lanes)(const AttentionParams&, const RowLanesTask&, void* scratch);
  int64_t (*head_lanes_scratch)(const AttentionParams&, int64_t heads);
  void (*head_lanes)(const AttentionParams&, const HeadLanesTask&, void* scratch);
  void (*combine)(const AttentionParams&, const CombineTask&);
  int64_t (*backward_scratch)(const BackwardParams&);
  void (*backward)(const BackwardParams&, const BackwardTask&, void* scratch);
  void (*reduce)(const BackwardParams&, const ReduceTask&, void* scratch);
  int64_t (*bias_gradient_scratch)(const BackwardParams&);
  void (*bias_gradient)(const BackwardParams&, const BiasGradientTask&, void* scratch);
};

struct Kernels {
  const char* name;
  TypedKernels float32, float64;
  // Rows of float32, float16 or bfloat16 for an int8 cache: quantize.h.
  void (*quantize)(DType, const void* rows, int64_t count, int64_t dim, int8_t* out, float* scales);
  double (*probe)(const ProbeSlice&, double* sink);  // see cpu::probe in attention.h
};

#define ISA(name, ...) extern const Kernels kernels_##name;
#include "isas.inc"
#undef ISA

}  // namespace attn_ops::cpu
