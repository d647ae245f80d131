// Who sees whom. The only definition of causal, window and length masks, for host and device.
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

// Row i sees the keys   i + shift - window_left <= j <= i + shift + window_right,   0 <= j < length_k
// with shift = 0 (top left) or length_k - length_q (bottom right). Neither end ever moves back as i grows; rows
// at and past length_q see nothing, as one empty range past every other.
ATTN_OPS_HOST_DEVICE static inline KeyRange key_range(const Mask& m, int64_t i, int64_t length_q, int64_t length_k) {
  if (i >= length_q) return {length_k, length_k};
  const int64_t own = m.bottom_right ? i + length_k - length_q : i;
  KeyRange r{0, length_k};
  // Windows can be as large as INT64_MAX: compare without adding to them.
  if (m.window_left >= 0 && own > m.window_left) r.begin = own - m.window_left;
  if (m.window_right >= 0 && length_k - 1 - own > m.window_right) r.end = own + m.window_right + 1;
  if (r.begin > length_k) r.begin = length_k;
  if (r.end < 0) r.end = 0;
  return r;
}

}  // namespace attn_ops
