// One call of the operator as a binding received it: arrays with the shapes they came with, options unchecked.
// validate.h says what is wrong with a call; a valid one becomes the kernels' parameters here.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <string>

#include "../attention.h"

namespace attn_ops {

constexpr int64_t kUnknown = -1;  // an extent not known yet (shape functions)

using Shape4 = std::array<int64_t, 4>;

struct Array {
  const char* name = "";
  bool present = false;  // optional arrays may be absent; an empty one is present with no data
  void* data = nullptr;
  DType dtype = DType::kFloat32;  // of the float and bool arrays; integer arrays have the one type their use needs
  int rank = 0;
  Shape4 shape{};   // the first four extents
  Shape4 stride{};  // in elements
};

// Where the sequence and the heads are in the shape of q, k, v, out and their gradients.
enum class Layout { kBSHD, kBHSD };
inline Layout layout_named(const std::string& name) { return name == "BHSD" ? Layout::kBHSD : Layout::kBSHD; }

// Where a call runs, and its arrays are. On a GPU the values of integer arrays cannot be read without waiting for it.
enum class Place { kCpu, kGpu };

struct Call {
  Place place = Place::kCpu;
  Layout layout = Layout::kBSHD;
  Array q, k, v, bias, masks[kMaxMasks], query_lengths, key_lengths;
  int num_masks = 0;
  Array key_begin, key_end, query_offset, query_ids, key_ids, blocks;
  int64_t block_q = 0, block_k = 0;
  Array slopes, relative_bias, sinks;
  Array block_table;         // present: k and v are pages [pages, page_size, heads, dim] instead of a batch
  Array k_scales, v_scales;  // of keys and values in int8
  bool has_soft_cap = false;
  double soft_cap = 0.0;
  Mask mask;
  bool has_scale = false;  // false: 1 / sqrt(head_dim)
  double scale = 1.0;
  double dropout_rate = 0.0;
  bool has_seed = false;
  uint64_t dropout_seed = 0, dropout_offset = 0;
  bool has_origin = false;  // false: the call is no part of a larger one
  DropoutOrigin dropout_origin{};
  const uint64_t* dropout_words = nullptr;  // both, on a GPU
  bool allow_tf32 = false;

  bool wants_lse = false;  // of forward
  bool backward = false;   // what is below counts only then
  bool wants_d_bias = false;
  Array out, statistics, d_out, d_lse;
};

inline constexpr const char* kMaskNames[kMaxMasks] = {"masks[0]", "masks[1]", "masks[2]", "masks[3]"};

struct Sizes {
  int64_t batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim, value_dim;

  int64_t scores(int axis) const {
    const int64_t extent[4] = {batch, num_heads, seqlen_q, seqlen_k};
    return extent[axis];
  }
  Shape4 statistics() const { return {batch, num_heads, seqlen_q, 2}; }
  std::array<int64_t, 3> lse() const { return {batch, num_heads, seqlen_q}; }
  Shape4 output(Layout layout) const {
    return layout == Layout::kBSHD ? Shape4{batch, seqlen_q, num_heads, value_dim}
                                   : Shape4{batch, num_heads, seqlen_q, value_dim};
  }
};

inline int sequence_axis(Layout layout) { return layout == Layout::kBSHD ? 1 : 2; }
inline int heads_axis(Layout layout) { return layout == Layout::kBSHD ? 2 : 1; }

inline int64_t page_size(const Call& c) { return c.k.shape[sequence_axis(c.layout)]; }  // where k and v are pages

inline Sizes sizes_of(const Call& c) {
  const int seq = sequence_axis(c.layout), heads = heads_axis(c.layout);
  const int64_t seqlen_k = c.block_table.present ? c.block_table.shape[1] * page_size(c) : c.k.shape[seq];
  return {c.q.shape[0], c.q.shape[seq], seqlen_k, c.q.shape[heads], c.k.shape[heads], c.q.shape[3], c.v.shape[3]};
}

inline Shape4 contiguous_strides(const Shape4& shape) {
  return {shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1};
}

// What a framework has as a contiguous array; extent(i) is its i-th.
template <class Extent>
Array contiguous_array(const char* name, void* data, DType dtype, int rank, const Extent& extent) {
  Array a;
  a.name = name, a.present = true, a.data = data, a.dtype = dtype, a.rank = rank;
  for (int i = 0; i < rank && i < 4; ++i) a.shape[i] = extent(i);
  if (rank == 4) a.stride = contiguous_strides(a.shape);
  return a;
}

// [batch, seqlen, heads, dim], whatever the layout. The stride of an axis of one element is free to choose: 1 tells
// the kernels that rows are contiguous.
inline StridedView tensor_view(const Array& a, Layout layout) {
  const int64_t inner = a.shape[3] <= 1 ? 1 : a.stride[3];
  return {a.data, a.dtype, {a.stride[0], a.stride[sequence_axis(layout)], a.stride[heads_axis(layout)], inner}};
}

// That of contiguous scales, [batch, seqlen, heads] in the layout, with a last axis of one element.
inline StridedView scales_view(const Array& a, Layout layout) {
  Array with_axis = a;
  with_axis.shape[3] = 1;
  with_axis.stride = contiguous_strides(with_axis.shape);
  return tensor_view(with_axis, layout);
}

// The view of a new contiguous array.
inline StridedView output_view(void* data, DType dtype, const Shape4& shape, Layout layout) {
  return tensor_view(contiguous_array("", data, dtype, 4, [&](int i) { return shape[i]; }), layout);
}

// [batch, num_heads, seqlen_q, seqlen_k]; an axis of one element is repeated.
inline StridedView score_view(const Array& a) {
  StridedView view{a.data, a.dtype, {}};
  for (int i = 0; i < 4; ++i) view.stride[i] = a.shape[i] == 1 ? 0 : a.stride[i];
  return view;
}

// Integers [batch or 1, seqlen].
inline const int32_t* integers(const Array& a) { return static_cast<const int32_t*>(a.data); }
inline Ids ids_view(const Array& a) { return {integers(a), a.shape[0] == 1 ? 0 : a.shape[1]}; }

// What of a valid call says who sees whom.
inline void to_visibility(const Call& c, AttentionParams* p) {
  p->mask = c.mask;
  if (c.query_offset.present) {
    p->mask.query_offset = integers(c.query_offset);
    p->mask.offset_stride = c.query_offset.shape[0] == 1 ? 0 : 1;
  }
  if (c.key_begin.present) {
    p->mask.key_begin = integers(c.key_begin);
    p->mask.key_end = integers(c.key_end);
    p->mask.interval_stride = c.key_begin.shape[0] == 1 ? 0 : c.key_begin.shape[1];
  }
  if (c.query_lengths.present) p->query_lengths = integers(c.query_lengths);
  if (c.key_lengths.present) p->key_lengths = integers(c.key_lengths);
  p->num_masks = c.num_masks;
  for (int i = 0; i < c.num_masks; ++i) p->masks[i] = score_view(c.masks[i]);
  if (c.query_ids.present) {
    p->query_ids = ids_view(c.query_ids);
    p->key_ids = ids_view(c.key_ids);
  }
  if (c.blocks.present) {
    p->blocks = score_view(c.blocks);
    p->block_q = c.block_q, p->block_k = c.block_k;
  }
}

// What of it happens to scores.
inline void to_scores(const Call& c, AttentionParams* p) {
  if (c.bias.present) p->bias = score_view(c.bias);
  if (c.has_soft_cap) p->soft_cap = c.soft_cap;
  if (c.slopes.present) {
    p->slopes = c.slopes.data;
    p->slopes_stride = c.slopes.shape[0] == 1 ? 0 : c.slopes.shape[1];
  }
  if (c.relative_bias.present) {
    p->relative_bias = c.relative_bias.data;
    p->relative_reach = c.relative_bias.shape[1] / 2;
  }
  if (c.sinks.present) p->sinks = c.sinks.data;
}

// The parameters of a valid forward call. The results are left for the binding, which allocates them.
inline AttentionParams to_params(const Call& c) {
  const Sizes n = sizes_of(c);
  AttentionParams p;
  p.dtype = c.q.dtype;
  p.batch = n.batch, p.seqlen_q = n.seqlen_q, p.seqlen_k = n.seqlen_k;
  p.num_heads = n.num_heads, p.num_kv_heads = n.num_kv_heads;
  p.head_dim = n.head_dim, p.value_dim = n.value_dim;
  p.scale = c.has_scale ? c.scale : 1.0 / std::sqrt(static_cast<double>(n.head_dim));
  p.q = tensor_view(c.q, c.layout);
  p.k = tensor_view(c.k, c.layout);
  p.v = tensor_view(c.v, c.layout);
  if (c.k_scales.present) {
    p.k_scales = scales_view(c.k_scales, c.layout);
    p.v_scales = scales_view(c.v_scales, c.layout);
  }
  if (c.block_table.present) {
    p.block_table = integers(c.block_table);
    p.block_table_stride = c.block_table.shape[1];
    p.page_size = page_size(c);
    if (c.k.shape[0] == 0) p.seqlen_k = 0;  // no page, no key, whatever the table says where nobody can look at it
  }
  to_visibility(c, &p);
  to_scores(c, &p);
  p.dropout_rate = c.dropout_rate;
  p.dropout_seed = c.dropout_seed, p.dropout_offset = c.dropout_offset;
  p.dropout_origin = c.dropout_origin;
  if (!c.has_origin) p.dropout_origin.heads_of_entry = static_cast<uint32_t>(p.num_heads);
  p.dropout_words = c.dropout_words;
  p.allow_tf32 = c.allow_tf32;
  return p;
}

// The parameters of a valid backward call. The gradients are left for the binding.
inline BackwardParams to_backward_params(const Call& c) {
  BackwardParams p;
  p.forward = to_params(c);
  p.forward.out = tensor_view(c.out, c.layout);
  p.forward.statistics = c.statistics.data;
  p.d_out = tensor_view(c.d_out, c.layout);
  if (c.d_lse.present) p.d_lse = c.d_lse.data;
  if (c.bias.present) {
    for (int i = 0; i < 4; ++i) p.d_bias_shape[i] = c.bias.shape[i];
  }
  return p;
}

}  // namespace attn_ops
