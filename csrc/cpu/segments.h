// Where the keys of a row's own segment are: from ids, the interval from the first to the last key with the row's id.
//
// Kernels skip by intervals whose ends never move back. Those of segments that follow one another (packed documents) are
// exactly that; of any others the smallest such intervals around them are taken, and what is inside and yet of another
// id is found by comparing ids (structure_bits). Nothing of size seqlen_q * seqlen_k is made. A call that has intervals
// already keeps those: whoever made them has looked at the ids (masks/structure.py does).
#pragma once

#include <algorithm>

#include "schedule.h"

namespace attn_ops::cpu {
namespace {

class SegmentRanges {
 public:
  explicit SegmentRanges(const AttentionParams& p)
      : p_(p), wanted_(p.query_ids.data && !p.mask.key_begin),
        batches_(p.query_ids.stride == 0 && p.key_ids.stride == 0 ? 1 : p.batch) {}

  int64_t bytes() const {
    return wanted_ ? ranges_bytes() + aligned(p_.seqlen_k * static_cast<int64_t>(sizeof(Key))) : 0;
  }

  // The call with those intervals.
  AttentionParams in(char* memory) const {
    AttentionParams p = p_;
    if (!wanted_) return p;
    int32_t* const begin = reinterpret_cast<int32_t*>(memory);
    int32_t* const end = begin + batches_ * p.seqlen_q;
    Key* const keys = reinterpret_cast<Key*>(memory + ranges_bytes());
    for (int64_t b = 0; b < batches_; ++b) find(b, keys, begin + b * p.seqlen_q, end + b * p.seqlen_q);
    p.mask.key_begin = begin;
    p.mask.key_end = end;
    p.mask.interval_stride = batches_ == 1 ? 0 : p.seqlen_q;
    return p;
  }

 private:
  struct Key {
    int32_t id, at;
    bool operator<(const Key& other) const { return id != other.id ? id < other.id : at < other.at; }
  };
  int64_t ranges_bytes() const { return aligned(batches_ * p_.seqlen_q * 2 * static_cast<int64_t>(sizeof(int32_t))); }

  void find(int64_t batch, Key* keys, int32_t* begin, int32_t* end) const {
    const int64_t seqlen_q = p_.seqlen_q, seqlen_k = p_.seqlen_k;
    const int32_t *const query_ids = p_.query_ids.of(batch), *const key_ids = p_.key_ids.of(batch);
    for (int64_t j = 0; j < seqlen_k; ++j) keys[j] = {key_ids[j], static_cast<int32_t>(j)};
    if (!std::is_sorted(keys, keys + seqlen_k)) std::sort(keys, keys + seqlen_k);
    for (int64_t i = 0; i < seqlen_q; ++i) {
      if (i > 0 && query_ids[i] == query_ids[i - 1]) {
        begin[i] = begin[i - 1], end[i] = end[i - 1];
        continue;
      }
      const Key first{query_ids[i], 0}, last{query_ids[i], INT32_MAX};
      const Key* const from = std::lower_bound(keys, keys + seqlen_k, first);
      const Key* const to = std::upper_bound(from, static_cast<const Key*>(keys + seqlen_k), last);
      // A row whose id no key has holds nobody back.
      begin[i] = from < to ? from->at : static_cast<int32_t>(seqlen_k);
      end[i] = from < to ? to[-1].at + 1 : 0;
    }
    for (int64_t i = 1; i < seqlen_q; ++i) end[i] = std::max(end[i], end[i - 1]);
    for (int64_t i = seqlen_q - 1; i > 0; --i) begin[i - 1] = std::min(begin[i - 1], begin[i]);
  }

  const AttentionParams& p_;
  const bool wanted_;
  const int64_t batches_;
};

}  // namespace
}  // namespace attn_ops::cpu
