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
    // Of a bias by which axes it is broadcast along: the heads that each unit of each part runs, and where their sums are.
    char sums[1];
    for (int form = 0; form < 16; ++form) {
      const int64_t full[4] = {p.batch, p.num_heads, p.seqlen_q, p.seqlen_k};
      for (int i = 0; i < 4; ++i) params.d_bias_shape[i] = form >> i & 1 ? 1 : full[i];
      params.d_bias = sums;
      const BackwardPlan plan(params, k, threads);
      params.d_bias = nullptr;
      if (plan.heads * plan.chunks > 20000) continue;
      std::printf("sums %d %ld %ld %ld %ld %ld %ld\n", form, plan.chunks, plan.part.copies, plan.in_place != nullptr,
                  plan.sums_bytes() + plan.totals_bytes(), plan.part.units(), plan.bytes());
      for (int64_t i = 0; i < plan.parts(); ++i) {
        const HeadUnits part = plan.part_at(i);
        for (int64_t unit = 0; unit < part.units(); ++unit) {
          const HeadUnits::Heads heads = part.heads_of(unit);
          for (int64_t head = heads.from(0); head < heads.end; head += heads.stride) {
            const BackwardTask t = plan.chunk_task(part, unit, head, 0, nullptr, nullptr, sums);
            std::printf("unit %d %ld %ld %ld %ld %ld %d\n", form, i, unit, t.batch, t.kv_head,
                        t.d_bias.sums ? static_cast<char*>(t.d_bias.sums) - sums : -1, t.d_bias.starts);
          }
        }
      }
    }
    std::printf("end\n");
  }
}
