// The gradient of a bias of shape [1 | batch, 1 | num_heads, 1 | seqlen_q, 1 | seqlen_k]: ds, summed over the axes
// along which the bias was broadcast. A pass of its own: a block owns a tile of the bias and visits everything the tile
// was broadcast to, in order, so that the sum is the same every time.
#pragma once

#include "score_gradient.cuh"

namespace attn_ops::cuda {

// The indices begin, begin + 1, ... below end of an axis of `extent` (in tiles or single) that belong to one block: one
// of them, or all where the bias was broadcast. Takes its digit off `index`.
struct OwnedAxis {
  int begin, end;

  ATTN_DEVICE OwnedAxis(int* index, int64_t extent, bool broadcast) : begin(0), end(static_cast<int>(extent)) {
    if (broadcast) return;
    const int count = end;
    begin = *index % count;
    end = begin + 1;
    *index /= count;
  }
};

template <class M, int kDim>
ATTN_DEVICE void bias_gradient(const BackwardArgs& args) {
  using Element = typename M::Element;
  using Ds = ScoreGradientTile<M, kDim>;
  constexpr int kBlockM = Ds::kBlockM, kBlockN = Ds::kBlockN, kThreads = Ds::kThreads;
  constexpr int kMmaM = Ds::kMmaM, kMmaN = Ds::kMmaN;

  const BackwardParams& b = args.b;
  const AttentionParams& p = b.forward;
  const int64_t* shape = b.d_bias_shape;
  int index = block_index();
  const OwnedAxis key_tiles(&index, (p.seqlen_k + kBlockN - 1) / kBlockN, shape[3] == 1);
  const OwnedAxis row_tiles(&index, (p.seqlen_q + kBlockM - 1) / kBlockM, shape[2] == 1);
  const OwnedAxis heads(&index, p.num_heads, shape[1] == 1);
  const OwnedAxis batches(&index, p.batch, shape[0] == 1);
  const Rows rows = Ds::rows_of_head(p);

  Acc<kMmaM, kMmaN> sum;
  clear<kMmaM, kMmaN>(sum);
  const auto add = [&](const Head& head, int row, int key) {
    const RowBlock block(head, row, kBlockM);
    if (block.sees_none(head, key, kBlockN)) return;
    Acc<kMmaM, kMmaN> s;
    Ds::make(s, args, head, row, key);
#pragma unroll
    for (int m = 0; m < kMmaM; ++m)
#pragma unroll
      for (int n = 0; n < kMmaN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[m][n][i] += s[m][n][i];
  };
#pragma unroll 1
  for (int batch = batches.begin; batch < batches.end; ++batch)
#pragma unroll 1
    for (int query_head = heads.begin; query_head < heads.end; ++query_head) {
      const Head head(p, args.factors, rows, batch, Ds::kv_head_of(p, query_head), query_head);
#pragma unroll 1
      for (int row_tile = row_tiles.begin; row_tile < row_tiles.end; ++row_tile)
#pragma unroll 1
        for (int key_tile = key_tiles.begin; key_tile < key_tiles.end; ++key_tile) {
          add(head, row_tile * kBlockM, key_tile * kBlockN);
        }
    }

  // From the table each element of the bias gathers what is its own.
  Ds::write_table(sum);
  const float* table = Ds::table();
  const bool sums_rows = shape[2] == 1, sums_keys = shape[3] == 1;
  const int row_count = sums_rows ? 1 : kBlockM, key_count = sums_keys ? 1 : kBlockN;
#pragma unroll 1
  for (int i = thread_index(); i < row_count * key_count; i += kThreads) {
    const int row = i / key_count, key = i % key_count;
    float total = 0.0f;
#pragma unroll 1
    for (int r = row; r < (sums_rows ? kBlockM : row + 1); ++r)
#pragma unroll 1
      for (int j = key; j < (sums_keys ? kBlockN : key + 1); ++j) total += table[r * Ds::kPitch + j];
    const int64_t position = sums_rows ? 0 : row_tiles.begin * kBlockM + row;
    const int64_t key_index = sums_keys ? 0 : key_tiles.begin * kBlockN + key;
    if (position >= shape[2] || key_index >= shape[3]) continue;
    const int64_t batch = shape[0] == 1 ? 0 : batches.begin, head = shape[1] == 1 ? 0 : heads.begin;
    const int64_t target = ((batch * shape[1] + head) * shape[2] + position) * shape[3] + key_index;
    if (sizeof(Element) == 4 || p.bias.dtype == DType::kFloat32) {
      static_cast<float*>(b.d_bias)[target] = total;
    } else {
      static_cast<Element*>(b.d_bias)[target] = M::from_float(total);
    }
  }
}

}  // namespace attn_ops::cuda
