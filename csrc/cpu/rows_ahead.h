// Asking the memory early. Rows of a head are rarely neighbours in memory, so the hardware does not see them coming.
#pragma once

#include "../attention.h"
#include "blocking.h"
#include "simd.h"

namespace attn_ops::cpu {
namespace {

// A walk over `count` rows of `heads` heads from the first head's first row on, in the order they lie in memory: in runs of
// what has no gaps, a row at least and all rows at most. ask(bytes) prefetches so many more, to the L1 cache or, where all
// that is asked for in one go would not fit, to L2; there is no harm in rows that do not exist.
class RowsAhead {
 public:
  RowsAhead() = default;
  RowsAhead(const StridedView& v, const char* first, int64_t count, int64_t heads, int64_t dim, bool fits_l1)
      : row_bytes_(dim * v.step()), run_(first), fits_l1_(fits_l1) {
    const int64_t size = size_of(v.dtype);
    if (!fits_l1 && heads > 1) ahead_by_ = v.stride[2] * size;
    int64_t inner = heads, outer = count, step = v.stride[2] * size, outer_step = v.stride[1] * size;
    if (v.stride[2] >= v.stride[1]) {
      inner = count, outer = heads;
      step = v.stride[1] * size, outer_step = v.stride[2] * size;
    }
    if (count <= 0 || row_bytes_ <= 0) return;  // nothing, or elements in another order
    rows_ = heads * count;
    run_bytes_ = row_bytes_;
    inner_ = inner, step_ = step, carry_ = outer_step - (inner - 1) * step;
    if (step == row_bytes_) {
      run_bytes_ *= inner;
      inner_ = 1, carry_ = outer_step;
      if (outer_step == run_bytes_) run_bytes_ *= outer;
    }
    left_ = bytes() / run_bytes_;
    inner_left_ = inner_;
    start_run();
  }
  // Not a walk: rows are asked for with those that lie `step` bytes before them.
  RowsAhead(const StridedView& v, int64_t dim, int64_t step)
      : row_bytes_(dim * v.step()), ahead_by_(step), fits_l1_(false), walks_(false) {}

  ATTN_INLINE void ask(int64_t bytes) {
    if (left_ == 0) return;
    wanted_ += bytes;
    prefetch_to(wanted_ < end_ ? wanted_ : end_);
    while (wanted_ >= end_ && next_run()) prefetch_to(wanted_ < end_ ? wanted_ : end_);
  }

  // What lies where `at` lies, in the next head, which a walk has asked for long ago, nearer; else in the next block, to L2.
  ATTN_INLINE void ask_with(const char* at, int64_t bytes) const {
    if (ahead_by_ == 0) return;
    at += ahead_by_;
    if (walks_) {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
    } else {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    }
  }

  int64_t bytes() const { return rows_ * row_bytes_; }
  int64_t row_bytes() const { return row_bytes_; }

 private:
  void start_run() {
    const int64_t in_line = reinterpret_cast<uintptr_t>(run_) % 64;
    at_ = -in_line;
    end_ = run_bytes_;
  }
  bool next_run() {
    if (--left_ == 0) return false;
    run_ += --inner_left_ ? step_ : carry_;
    if (inner_left_ == 0) inner_left_ = inner_;
    wanted_ -= end_;
    start_run();
    return true;
  }
  ATTN_INLINE void prefetch_to(int64_t end) {
    if (fits_l1_) prefetch<3>(end);
    else prefetch<2>(end);
  }
  // Four lines at a time: loops of one take five instructions a line, as many as decode has for its products.
  template <int locality>
  ATTN_INLINE void prefetch(int64_t end) {
    int64_t at = at_;
    for (; at + 192 < end; at += 256) {
      __builtin_prefetch(run_ + at, 0, locality);
      __builtin_prefetch(run_ + at + 64, 0, locality);
      __builtin_prefetch(run_ + at + 128, 0, locality);
      __builtin_prefetch(run_ + at + 192, 0, locality);
    }
    for (; at < end; at += 64) __builtin_prefetch(run_ + at, 0, locality);
    at_ = at;
  }

  int64_t row_bytes_ = 0, rows_ = 0;
  int64_t ahead_by_ = 0;  // of ask_with(); 0: there is no other head or block, or it is near
  const char* run_ = nullptr;
  int64_t run_bytes_ = 0, at_ = 0, end_ = 0, wanted_ = 0;  // bytes of a run; from its start on: done, in all, asked for
  int64_t left_ = 0, inner_ = 0, inner_left_ = 0, step_ = 0, carry_ = 0;
  bool fits_l1_ = true, walks_ = true;
};

// Asks for `bytes` of the rows that row_of(lane) gives, of as many lanes: some rows each time, while the products of the block
// that they are of are made. (Asked for with the block before, they have left L2 by then: rows of scores are a multiple of a
// page apart.)
template <class RowOf>
class LaneRowsAhead {
 public:
  LaneRowsAhead(int lanes, int64_t bytes, const RowOf& row_of) : lanes_(lanes), bytes_(bytes), row_of_(row_of) {}

  ATTN_INLINE void ask() {
    for (int i = 0; i < kLaneRowsAhead && next_ < lanes_; ++i, ++next_) {
      const char* const row = row_of_(next_);
      for (int64_t b = 0; b < bytes_; b += 64) __builtin_prefetch(row + b);
    }
  }

 private:
  const int lanes_;
  const int64_t bytes_;
  const RowOf row_of_;
  int next_ = 0;
};

// What a thread's next task will read or write, asked for a little with each tile of registers of the current one's products:
// much at once would fill the buffers that wait for memory, and the products would wait as well. Short sequences spend a fifth of
// their time waiting for memory otherwise. Only for tasks that are a head each.
class NextTask {
 public:
  // `head` is batch * num_kv_heads + kv_head, or negative for none. There will be so many calls of step(), and about so many of
  // ask() in each.
  NextTask(const AttentionParams& p, int64_t head, int64_t steps, int64_t asks)
      : p_(p), head_(head), steps_(steps), asks_(asks < 1 ? 1 : asks) {}
  ~NextTask() { step(); }
  NextTask(const NextTask&) = delete;
  NextTask& operator=(const NextTask&) = delete;

  void reads_keys(const StridedView& v, int64_t dim) {
    if (!p_.block_table) add(v, p_.seqlen_k, 1, dim);
  }
  void reads_rows(const StridedView& v, int64_t dim) { add(v, p_.seqlen_q, group_size(p_), dim); }
  void reads_inputs() {
    reads_keys(p_.k, p_.head_dim);
    reads_keys(p_.v, p_.value_dim);
    reads_rows(p_.q, p_.head_dim);
  }

  // Asks for what the last step has left.
  __attribute__((noinline)) void step() {
    while (left_ > 0) ask();
    left_ = count_ > 0 ? asks_ : 0;
  }
  // Each time of another array.
  __attribute__((noinline)) void ask() {
    if (left_ == 0) return;
    --left_;
    rows_[turn_].ask(count_ * each_[turn_]);
    turn_ = turn_ + 1 < count_ ? turn_ + 1 : 0;
  }

 private:
  __attribute__((noinline)) void add(const StridedView& v, int64_t count, int64_t heads_each, int64_t dim) {
    if (head_ < 0 || steps_ == 0) return;
    const int64_t head = head_ % p_.num_kv_heads * heads_each, batch = head_ / p_.num_kv_heads;
    const char* const first =
        static_cast<const char*>(v.data) + (batch * v.stride[0] + head * v.stride[2]) * size_of(v.dtype);
    const RowsAhead rows(v, first, count, heads_each, dim, true);
    room_ -= rows.bytes();
    if (room_ < 0) return;
    rows_[count_] = rows;
    each_[count_++] = (rows.bytes() / steps_ + rows.row_bytes()) / asks_ + 1;
  }

  const AttentionParams& p_;
  const int64_t head_, steps_, asks_;
  int64_t room_ = next_task_bytes(), left_ = 0;
  int count_ = 0, turn_ = 0;
  RowsAhead rows_[8];
  int64_t each_[8];  // bytes of an ask, were all arrays asked for in each
};

}  // namespace
}  // namespace attn_ops::cpu
