// Boolean masks that differ by row and are the same for all heads, read once for all of them: packed to bits, ANDed, in
// the workspace, where they take an eighth of what they are. All other masks are read where they lie.
#pragma once

#include "../mask.h"
#include "mask_bits.h"
#include "schedule.h"

namespace attn_ops::cpu {
namespace {

class PackedMasks {
 public:
  explicit PackedMasks(const AttentionParams& p) : p_(p), batches_(1) {
    for (int m = 0; m < p.num_masks; ++m) {
      if (!packs(p.masks[m])) continue;
      any_ = true;
      if (p.masks[m].stride[0] != 0) batches_ = p.batch;
    }
  }

  int64_t bytes() const { return any_ ? aligned(times(times(batches_, p_.seqlen_q), row_bytes())) : 0; }

  // How many rows pack() takes in all.
  int64_t rows() const { return any_ ? batches_ * p_.seqlen_q : 0; }

  // Rows first .. last, of the keys that intervals leave to see; the others are hidden whatever the mask says.
  void pack(int64_t first, int64_t last, char* memory) const {
    for (int64_t at = first; at < last; ++at) {
      const int64_t batch = at / p_.seqlen_q, row = at % p_.seqlen_q;
      char* const to = memory + at * row_bytes();
      memset(to, 0, row_bytes());
      int64_t begin = 0, end = p_.seqlen_k;
      if (batches_ == p_.batch) {
        const int64_t length_q = p_.query_lengths ? p_.query_lengths[batch] : p_.seqlen_q;
        const int64_t length_k = p_.key_lengths ? p_.key_lengths[batch] : p_.seqlen_k;
        const int64_t own = row + row_shift(p_.mask, batch, length_q, length_k);
        const KeyRange seen = key_range(p_.mask, batch, row, own, length_q, length_k);
        begin = seen.begin / 64 * 64, end = seen.end;
      }
      for (int64_t k0 = begin; k0 < end; k0 += 64) {
        const int64_t n = end - k0 < 64 ? end - k0 : 64;
        uint64_t bits = bits_between(0, n);
        for (int m = 0; m < p_.num_masks; ++m) {
          const StridedView& mask = p_.masks[m];
          if (!packs(mask)) continue;
          bits &= bits_of(static_cast<const char*>(mask.data) + batch * mask.stride[0] + row * mask.stride[2] +
                              k0 * mask.stride[3],
                          mask.stride[3], n);
        }
        memcpy(to + k0 / 8, &bits, 8);
      }
    }
  }

  // The call with them instead of the masks they are of.
  AttentionParams in(const AttentionParams& given, char* memory) const {
    AttentionParams p = given;
    if (!any_) return p;
    p.num_masks = 0;
    for (int m = 0; m < given.num_masks; ++m)
      if (!packs(given.masks[m])) p.masks[p.num_masks++] = given.masks[m];
    p.mask_bits.data = memory;
    p.mask_bits.dtype = DType::kBool;  // strides are bytes
    p.mask_bits.stride[0] = batches_ > 1 ? p.seqlen_q * row_bytes() : 0;
    p.mask_bits.stride[2] = row_bytes();
    return p;
  }

 private:
  bool packs(const StridedView& mask) const {
    return p_.num_heads > 1 && mask.stride[1] == 0 && mask.stride[2] != 0 && mask.stride[3] != 0;
  }
  int64_t row_bytes() const { return packed_row_bytes(p_.seqlen_k); }

  const AttentionParams& p_;
  int64_t batches_;
  bool any_ = false;
};

}  // namespace
}  // namespace attn_ops::cpu
