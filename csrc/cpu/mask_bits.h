// Boolean masks as bits: 64 keys to a word.
#pragma once

#include <cstdint>
#include <cstring>

namespace attn_ops::cpu {
namespace {

// Bits begin <= i < end of a word.
inline uint64_t bits_between(int64_t begin, int64_t end) {
  const auto below = [](int64_t n) { return n <= 0 ? uint64_t{0} : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; };
  return below(end) & ~below(begin);
}

// Bit i = (i-th byte, `stride` bytes apart, != 0), for up to 64 bytes; the rest is 0.
inline uint64_t bits_of(const char* bytes, int64_t stride, int64_t n) {
  uint64_t bits = 0;
  int64_t i = 0;
  if (stride == 1)
    for (; i + 8 <= n; i += 8) {
      uint64_t x;
      memcpy(&x, bytes + i, 8);
      constexpr uint64_t low7 = 0x7f7f7f7f7f7f7f7f;
      x = (((x & low7) + low7) | x) >> 7 & 0x0101010101010101;  // each byte to 0 or 1
      bits |= (x * 0x0102040810204080 >> 56) << i;              // gathers the eight bits: no two products overlap
    }
  for (; i < n; ++i) bits |= uint64_t{bytes[i * stride] != 0} << i;
  return bits;
}

// A row of packed masks: words of 64 keys, and one more so that any 64 keys can be read.
inline int64_t packed_row_bytes(int64_t keys) { return ((keys + 63) / 64 + 1) * 8; }

// Bit j: key k0 + j of a packed row.
inline uint64_t packed_bits(const char* row, int64_t k0) {
  uint64_t word, next;
  memcpy(&word, row + k0 / 64 * 8, 8);
  memcpy(&next, row + k0 / 64 * 8 + 8, 8);
  const int shift = static_cast<int>(k0 % 64);
  return shift == 0 ? word : word >> shift | next << (64 - shift);
}

}  // namespace
}  // namespace attn_ops::cpu
