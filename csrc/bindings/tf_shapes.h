// The shape functions: as much of validate.h as the C API lets a shape function see. It reads shapes, not the
// attributes, so neither the layout nor how many masks came is known here; the kernels check everything.
#pragma once

#include "tf_capi.h"
#include "validate.h"

namespace attn_ops::tf {

class ShapeFunction {
 public:
  explicit ShapeFunction(TF_ShapeInferenceContext* context) : inference_(context) {}

  void forward() {
    inference_.set_all_outputs_unknown();
    qkv();
    same_batch();
    rest(3, false);
    set_out(0);
    set_rows();
  }

  // Where keys and values are pages, they have a number of pages for the batch; scales have rank 3.
  void decode() {
    inference_.set_all_outputs_unknown();
    qkv();
    rest(3, true);
    set_out(0);
    set_rows();
  }

  void backward() {
    inference_.set_all_outputs_unknown();
    qkv();
    same_batch();
    const Array out = read(3, "out", 4, kTensor), d_out = read(5, "d_out", 4, kTensor);
    const Array statistics = read(4, "statistics", 4, "[batch, num_heads, seqlen_q, 2]");
    for (int axis = 0; axis < 4; ++axis) {
      require(equal_reason("shape", out, axis, d_out, axis));
    }
    require(equal_reason("batch", q_, 0, out, 0));
    require(equal_reason("batch", q_, 0, statistics, 0));
    rest(6, true);
    for (int i = 0; i < 3; ++i) inference_.set_output(i, inference_.input(i));
    // The gradient of the bias has its shape, or is empty when not wanted: an attribute, so unknown here.
  }

 private:
  static constexpr const char* kTensor = "[batch, seqlen, heads, dim] or [batch, heads, seqlen, dim]";

  static void require(const std::string& reason) {
    if (!reason.empty()) throw Error(TF_INVALID_ARGUMENT, reason);
  }

  // The shape of an input, with unknown extents where it is not known.
  Array read(int index, const char* name, int wanted_rank, const char* meaning) const {
    Array a;
    a.name = name;
    a.shape.fill(kUnknown);
    a.rank = wanted_rank;
    const ShapeHandle shape = inference_.input(index);
    const int64_t rank = inference_.rank(shape);
    if (rank == -1) return a;
    require(rank_reason(name, rank, wanted_rank, meaning));
    for (int axis = 0; axis < wanted_rank; ++axis) a.shape[axis] = inference_.extent(shape, axis);
    return a;
  }

  void qkv() {
    q_ = read(0, "q", 4, kTensor);
    k_ = read(1, "k", 4, kTensor);
    v_ = read(2, "v", 4, kTensor);
    require(tensors_reason(q_, k_, v_, "second extent", "third extent"));
  }
  void same_batch() { require(batch_reason(q_, k_, v_)); }

  // Bias, masks and blocks have rank 4, lengths, the seed, offsets and sinks rank 1, the gradient of lse and scales rank
  // 3, and intervals, ids, slopes, the relative bias and tables of pages rank 2.
  void rest(int first, bool with_rank_3) const {
    for (int i = first; i < inference_.num_inputs(); ++i) {
      const int64_t rank = inference_.rank(inference_.input(i));
      if (rank == -1 || rank == 1 || rank == 2 || rank == 4 || (rank == 3 && with_rank_3)) continue;
      throw Error(TF_INVALID_ARGUMENT, "input " + text(int64_t{i}) +
                                           " must have rank 4 [batch, num_heads, seqlen_q, seqlen_k] (bias, masks), "
                                           "rank 2 (intervals, ids, slopes, relative bias) or rank 1 (lengths, seed, "
                                           "offsets, sinks), got rank " +
                                           text(rank));
    }
  }

  // The shape of q with the last extent of v, in either layout.
  void set_out(int output) const {
    const ShapeHandle q = inference_.input(0), v = inference_.input(2);
    if (inference_.rank(q) == -1) return;
    const ShapeHandle value_dim = inference_.rank(v) == -1 ? inference_.axis(kUnknown) : inference_.slice(v, 3, 4);
    inference_.set_output(output, inference_.concatenate(inference_.slice(q, 0, 3), value_dim));
  }

  // statistics [batch, num_heads, seqlen_q, 2], and lse without the last where it is asked for: which axes of q the
  // middle two are is up to the layout.
  void set_rows() const {
    const ShapeHandle q = inference_.input(0);
    const ShapeHandle unknown = inference_.axis(kUnknown);
    const ShapeHandle batch = inference_.rank(q) == -1 ? inference_.axis(kUnknown) : inference_.slice(q, 0, 1);
    const ShapeHandle rows = inference_.concatenate(inference_.concatenate(batch, unknown), unknown);
    inference_.set_output(1, inference_.concatenate(rows, inference_.axis(2)));
    inference_.set_output_if_there(2, rows);
  }

  Inference inference_;
  Array q_, k_, v_;
};

}  // namespace attn_ops::tf
