// Prints the plans of csrc/cpu/schedule.h for the shapes on standard input, with kernels that are none:
// test_schedule.py.
#include <cstdio>

#include "cpu/schedule.h"

using namespace attn_ops;
using namespace attn_ops::cpu;

int main() {
  TypedKernels k{};
  k.tiles = [](int64_t rows) { return ceil_div(rows, 24); };
  k.padded = [](int64_t dim) { return ceil_div(dim, 8) * 8; };
  k.few_rows = [](const AttentionParams& p) { return p.seqlen_q * group_size(p) <= 8; };
  k.row_lanes_scratch = [](const AttentionParams& p) { return p.head_dim * 1000; };
  k.head_lanes_scratch = [](const AttentionParams& p, int64_t heads) { return p.head_dim * heads * 100; };
  k.backward_scratch = [](const BackwardParams& p) { return p.forward.head_dim * 3000; };
  k.bias_gradient_scratch = k.backward_scratch;

  BackwardParams params;
  AttentionParams& p = params.forward;
  int threads;
  while (std::scanf("%ld %ld %ld %ld %ld %ld %ld %ld %d", &p.batch, &p.seqlen_q, &p.seqlen_k, &p.num_heads,
                    &p.num_kv_heads, &p.head_dim, &p.value_dim, &p.mask.window_left, &threads) == 9) {
    p.mask.window_right = p.mask.window_left;
    // As far as 64 bits: of pointers only the distance to the first counts.
    char* const memory = nullptr;
    const ForwardPlan forward(p, k, threads);
    std::printf("forward %d %ld %ld %ld %ld %d\n", forward.threads, forward.splits, forward.split_keys, forward.bytes(),
                forward.scratch_bytes, forward.few_rows);
    if (forward.tasks() > 20000) {
      std::printf("many tasks\n");
    } else {
      for (int64_t i = 0; i < forward.tasks(); ++i) {
        if (forward.few_rows) {
          const HeadLanesTask t = forward.head_lanes_task(i, memory);
          for (int64_t head = t.head_begin; head < t.head_end; ++head)
            std::printf("head_lanes %ld %ld %ld %ld %ld\n", t.batch, head, t.key_begin, t.key_end,
                        static_cast<char*>(t.partials) - memory + (head - t.head_begin) * t.head_bytes);
        } else {
          const RowLanesTask t = forward.row_lanes_task(i, memory);
          std::printf("row_lanes %ld %ld %ld %ld %ld %ld %ld\n", t.batch, t.kv_head, t.tile_begin, t.tile_end,
                      t.key_begin, t.key_end, static_cast<char*>(t.partial) - memory);
        }
      }
    }
    const BackwardPlan backward(params, k, threads);
    std::printf("backward %d %ld %ld %ld %ld %ld\n", backward.threads, backward.chunks, backward.wave,
                backward.chunk_bytes, backward.bytes(), backward.scratch_bytes);
    for (int64_t c = 0; c <= backward.chunks; ++c) std::printf("chunk %ld\n", backward.chunk_tiles[c]);
    for (const int64_t rows : {int64_t{1}, p.seqlen_q}) {
      params.d_bias_shape[0] = 1, params.d_bias_shape[1] = p.num_heads, params.d_bias_shape[2] = rows;
      const BiasGradientPlan bias(params, k);
      for (int64_t i = 0; i < bias.tasks && bias.tasks <= 20000; ++i) {
        const BiasGradientTask t = bias.task(i);
        std::printf("bias %d %ld %ld %ld %ld\n", rows > 1, t.bias_batch, t.bias_head, t.tile_begin, t.tile_end);
      }
    }
    std::printf("end\n");
  }
}
