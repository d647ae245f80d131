// Asking the memory early. Rows of a head are rarely neighbours in memory, so the hardware does not see them coming.
#pragma once

#include "../attention.h"
#include "blocking.h"
#include "simd.h"

namespace attn_ops::cpu {
namespace {

// A walk over `count` rows of `heads` heads from the first head's first row on, in the order they lie in memory. Each
// ask() prefetches one row, to the L1 cache or, where all that is asked for in one go would not fit, to L2; there is no
// harm in rows that do not exist.
class RowsAhead {
 public:
  RowsAhead() = default;
  RowsAhead(const StridedView& v, const char* first, int64_t count, int64_t heads, int64_t dim, bool fits_l1)
      : at_(first), fits_l1_(fits_l1) {
    const int64_t size = size_of(v.dtype), by_row = v.stride[1] * size, by_head = v.stride[2] * size;
    const bool heads_inside = v.stride[2] < v.stride[1];
    left_ = count > 0 ? heads * count : 0;
    bytes_ = dim * v.step();
    inside_ = inside_left_ = heads_inside ? heads : count;
    step_ = heads_inside ? by_head : by_row;
    carry_ = (heads_inside ? by_row : by_head) - (inside_ - 1) * step_;
  }

  ATTN_INLINE void ask() {
    if (left_ == 0) return;
    --left_;
    if (fits_l1_)
      for (int64_t i = 0; i < bytes_; i += 64) __builtin_prefetch(at_ + i);
    else
      for (int64_t i = 0; i < bytes_; i += 64) __builtin_prefetch(at_ + i, 0, 2);
    at_ += --inside_left_ ? step_ : carry_;
    if (inside_left_ == 0) inside_left_ = inside_;
  }

  int64_t left() const { return left_; }
  int64_t bytes() const { return left_ * bytes_; }

 private:
  const char* at_ = nullptr;
  int64_t left_ = 0, bytes_ = 0, inside_ = 0, inside_left_ = 0, step_ = 0, carry_ = 0;
  bool fits_l1_ = true;
};

// What a thread's next task will read or write, asked for a little at each of the `steps` of the current one. Short
// sequences spend a fifth of their time waiting for memory otherwise. Only for tasks that are a head each.
class NextTask {
 public:
  // `head` is batch * num_kv_heads + kv_head, or negative for none.
  NextTask(const AttentionParams& p, int64_t head, int64_t steps) : p_(p), head_(head), steps_(steps) {}

  void reads_keys(const StridedView& v, int64_t dim) {
    if (!p_.block_table) add(v, p_.seqlen_k, 1, dim);
  }
  void reads_rows(const StridedView& v, int64_t dim) { add(v, p_.seqlen_q, group_size(p_), dim); }

  ATTN_INLINE void ask() {
    for (int i = 0; i < count_; ++i)
      for (int64_t n = 0; n < per_step_[i]; ++n) rows_[i].ask();
  }

 private:
  void add(const StridedView& v, int64_t count, int64_t heads_each, int64_t dim) {
    if (head_ < 0 || steps_ == 0) return;
    const int64_t head = head_ % p_.num_kv_heads * heads_each, batch = head_ / p_.num_kv_heads;
    const char* const first =
        static_cast<const char*>(v.data) + (batch * v.stride[0] + head * v.stride[2]) * size_of(v.dtype);
    const RowsAhead rows(v, first, count, heads_each, dim, true);
    room_ -= rows.bytes();
    if (room_ < 0) return;
    rows_[count_] = rows;
    per_step_[count_++] = rows.left() / steps_ + 1;
  }

  const AttentionParams& p_;
  const int64_t head_, steps_;
  int64_t room_ = kNextTaskBytes;
  int count_ = 0;
  RowsAhead rows_[8];
  int64_t per_step_[8];
};

}  // namespace
}  // namespace attn_ops::cpu
