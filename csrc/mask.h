// Who sees whom. The only definition of causal, window, length and interval masks, for host and device.
#pragma once

#include "attention.h"

#if defined(__CUDACC__)
#define ATTN_OPS_HOST_DEVICE __host__ __device__
#else
#define ATTN_OPS_HOST_DEVICE
#endif

namespace attn_ops {

struct KeyRange {
  int64_t begin, end;  // keys begin <= j < end; empty when begin >= end
};

// Where row 0 stands among the keys: row i stands at own_i = i + shift.
ATTN_OPS_HOST_DEVICE static inline int64_t aligned_shift(const Mask& m, int64_t length_q, int64_t length_k) {
  return m.bottom_right ? length_k - length_q : 0;
}
ATTN_OPS_HOST_DEVICE static inline int64_t row_shift(const Mask& m, int64_t batch, int64_t length_q,
                                                     int64_t length_k) {
  return m.query_offset ? m.query_offset[batch * m.offset_stride] : aligned_shift(m, length_q, length_k);
}

// Row i sees the keys   own - window_left <= j <= own + window_right,   0 <= j < length_k   of its position own. Neither
// end ever moves back as i grows; rows at and past length_q see nothing, as one empty range past every other.
ATTN_OPS_HOST_DEVICE static inline KeyRange window_range(const Mask& m, int64_t i, int64_t own, int64_t length_q,
                                                         int64_t length_k) {
  if (i >= length_q) return {length_k, length_k};
  KeyRange r{0, length_k};
  // Windows can be as large as INT64_MAX: compare without adding to them.
  if (m.window_left >= 0 && own > m.window_left) r.begin = own - m.window_left;
  if (m.window_right >= 0 && length_k - 1 - own > m.window_right) r.end = own + m.window_right + 1;
  if (r.begin > length_k) r.begin = length_k;
  if (r.end < 0) r.end = 0;
  return r;
}

// What the caller's own intervals leave of one; their ends never move back either.
template <class Int>
ATTN_OPS_HOST_DEVICE static inline void narrow(const Mask& m, int64_t batch, int64_t i, Int length_k, Int* begin,
                                               Int* end) {
  const int64_t at = batch * m.interval_stride + i;
  const Int own_begin = m.key_begin[at], own_end = m.key_end[at];
  if (own_begin > *begin) *begin = own_begin < length_k ? own_begin : length_k;
  if (own_end < *end) *end = own_end > 0 ? own_end : 0;
}

// The keys that row i of a batch entry sees, at its position own.
static inline KeyRange key_range(const Mask& m, int64_t batch, int64_t i, int64_t own, int64_t length_q,
                                 int64_t length_k) {
  KeyRange r = window_range(m, i, own, length_q, length_k);
  if (i < length_q && m.key_begin) narrow(m, batch, i, length_k, &r.begin, &r.end);
  return r;
}

}  // namespace attn_ops
