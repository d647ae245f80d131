#include "dispatch.h"

#include "../plan.h"
#include "args.h"
#include "config.h"

namespace attn_ops::cuda::hopper {
namespace {

constexpr int kPanelAlignment = 16;  // of rows that the copy engine, or load_rows, brings

int padded_dim(const AttentionParams& p) {
  const int64_t largest = std::max(p.head_dim, p.value_dim);
  for (int dim : kDims)
    if (largest <= dim) return dim;
  return 0;
}

// Whether the copy engine can be told of it: aligned rows (plan.h), and no axis that is broadcast.
bool can_map(const AttentionParams& p, const StridedView& view, int64_t seqlen, int64_t heads, int64_t dim) {
  const int64_t extent[] = {p.batch, seqlen, heads};
  constexpr int64_t kMostBytes = int64_t{1} << 40;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t bytes = view.stride[axis] * size_of(p.dtype);
    if (extent[axis] < 1 || (extent[axis] > 1 && (bytes <= 0 || bytes >= kMostBytes))) return false;
  }
  return alignment_of(p, view, seqlen, heads, dim) == kPanelAlignment;
}

// Boxes of `rows` rows of `box_heads` heads.
int map_of(TensorMap* map, const AttentionParams& p, const StridedView& view, int64_t seqlen, int64_t heads,
           int64_t dim, int rows, int box_heads = 1) {
  const uint64_t extent[] = {static_cast<uint64_t>(dim), static_cast<uint64_t>(heads), static_cast<uint64_t>(seqlen),
                             static_cast<uint64_t>(p.batch)};
  const int64_t stride[] = {view.stride[2], view.stride[1], view.stride[0]};
  uint64_t bytes[3];
  for (int axis = 0; axis < 3; ++axis) {  // of an axis with one index, whatever is allowed
    bytes[axis] = extent[axis + 1] == 1 ? 16 : static_cast<uint64_t>(stride[axis] * size_of(p.dtype));
  }
  const uint32_t box[] = {kPanelColumns, static_cast<uint32_t>(box_heads), static_cast<uint32_t>(rows), 1};
  return encode_tensor_map(map, view.data, extent, bytes, box);
}

}  // namespace

bool takes(const AttentionParams& p, const Device& device) {
  return device.hopper_image >= 0 && size_of(p.dtype) == 2 && is_plain(p) && padded_dim(p) != 0 && p.value_dim > 0 &&
         p.sinks == nullptr &&  // which these kernels do not have
         alignment_of(p, p.q, p.seqlen_q, p.num_heads, p.head_dim) == kPanelAlignment &&
         can_map(p, p.k, p.seqlen_k, p.num_kv_heads, p.head_dim) &&
         can_map(p, p.v, p.seqlen_k, p.num_kv_heads, p.value_dim);
}

bool takes(const BackwardParams& b, const Device& device) {
  const AttentionParams& p = b.forward;
  // A tile of rows is one box: whole positions, of all heads of the group.
  return takes(p, device) && padded_dim(p) <= kLargestBackwardDim && b.d_bias == nullptr &&
         backward_shape(padded_dim(p), true).block_n % group_size(p) == 0 &&
         alignment_of(p, p.out, p.seqlen_q, p.num_heads, p.value_dim) == kPanelAlignment &&
         can_map(p, p.q, p.seqlen_q, p.num_heads, p.head_dim) &&
         can_map(p, b.d_out, p.seqlen_q, p.num_heads, p.value_dim);
}

int launch_forward(const AttentionParams& p, const Device& device, void* stream) {
  const int dim = padded_dim(p);
  const Shape shape = forward_shape(dim);
  const int64_t tiles = ceil_div(num_rows(p), shape.block_m());
  ForwardArgs args;
  args.call.p = p;
  args.call.factors = factors_of(p);
  args.call.rows = rows_of(p, tiles);
  args.call.aligned = aligned_of(p);
  int code = map_of(&args.k, p, p.k, p.seqlen_k, p.num_kv_heads, p.head_dim, shape.block_n);
  if (code == 0) code = map_of(&args.v, p, p.v, p.seqlen_k, p.num_kv_heads, p.value_dim, shape.block_n);
  if (code != 0) return code;
  const KernelName name{Role::kForward, math_of(p, false), dim, true, true};
  return launch(device, name, p.batch * p.num_kv_heads * tiles, shape.threads(), forward_shared_bytes(dim), stream,
                &args);
}

int launch_backward(const BackwardParams& b, const Device& device, void* stream, float* delta) {
  const AttentionParams& p = b.forward;
  const Math math = math_of(p, false);
  const int dim = padded_dim(p), group = static_cast<int>(group_size(p)), shared = backward_shared_bytes(dim);
  const Shape shape = backward_shape(dim, true);
  const int64_t heads = p.batch * p.num_kv_heads;
  const int64_t row_tiles = ceil_div(num_rows(p), shape.block_m());
  const int64_t key_tiles = ceil_div(p.seqlen_k, shape.block_m());
  BackwardArgs args;
  args.call.b = b;
  args.call.factors = factors_of(p);
  args.call.aligned = aligned_of(b);
  args.call.delta = delta;
  int code = map_of(&args.q, p, p.q, p.seqlen_q, p.num_heads, p.head_dim, shape.block_n / group, group);
  if (code == 0)
    code = map_of(&args.d_out, p, b.d_out, p.seqlen_q, p.num_heads, p.value_dim, shape.block_n / group, group);
  // Keys and values pass where dq is made, and stay, a warpgroup's at a time, where dk and dv are.
  const auto map_keys = [&](int rows) {
    const int code = map_of(&args.k, p, p.k, p.seqlen_k, p.num_kv_heads, p.head_dim, rows);
    return code != 0 ? code : map_of(&args.v, p, p.v, p.seqlen_k, p.num_kv_heads, p.value_dim, rows);
  };
  if (code == 0) code = map_keys(shape.block_n);
  if (code != 0) return code;
  args.call.rows = rows_of(p, row_tiles);
  code = launch(device, {Role::kQueryGradient, math, dim, true, true}, heads * row_tiles, shape.threads(), shared,
                stream, &args);
  if (code == 0) code = map_keys(kWarpgroupRows);
  if (code != 0) return code;
  args.call.rows = rows_of(p, key_tiles);
  return launch(device, {Role::kKeyGradients, math, dim, true, true}, heads * key_tiles, shape.threads(), shared,
                stream, &args);
}

}  // namespace attn_ops::cuda::hopper
