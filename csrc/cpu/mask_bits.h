// Boolean masks as bits: 64 keys of a row to a word, or 64 rows of a key.
#pragma once

#include <cstdint>
#include <cstring>

#include "../attention.h"

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

// 64 bits of two words that are neighbours, from bit `shift` of the first on.
inline uint64_t across(uint64_t word, uint64_t next, int shift) {
  return shift == 0 ? word : word >> shift | next << (64 - shift);
}

// Bit j: key k0 + j of a packed row.
inline uint64_t packed_bits(const char* row, int64_t k0) {
  uint64_t word, next;
  memcpy(&word, row + k0 / 64 * 8, 8);
  memcpy(&next, row + k0 / 64 * 8 + 8, 8);
  return across(word, next, static_cast<int>(k0 % 64));
}

// Of the squares of 2 half x 2 half bits, those of 64 words, the upper right and the lower left quarter change places.
template <int half>
inline void exchange_quarters(uint64_t* a) {
  constexpr uint64_t low = ~uint64_t{0} / ((uint64_t{1} << half) + 1);  // `half` bits set, as many clear, and so on
  for (int base = 0; base < 64; base += 2 * half)
    for (int i = base; i < base + half; ++i) {
      const uint64_t t = ((a[i] >> half) ^ a[i + half]) & low;
      a[i] ^= t << half;
      a[i + half] ^= t;
    }
}

// Bit j of a[i] <-> bit i of a[j]. `half` is a constant: so the compiler makes vectors of the words.
inline void transpose_bits(uint64_t* a) {
  exchange_quarters<32>(a);
  exchange_quarters<16>(a);
  exchange_quarters<8>(a);
  exchange_quarters<4>(a);
  exchange_quarters<2>(a);
  exchange_quarters<1>(a);
}

// Whether the words of packed masks are of 64 rows each, [row / 64][key], and not of 64 keys.
inline bool by_key(const StridedView& mask_bits) { return mask_bits.stride[3] != 0; }

// bits[j] &= bit i: row first + i of such masks, for keys k0 .. k0 + keys and up to 64 rows. `rows`: their first word.
inline void hide_by_key(const StridedView& mask_bits, const char* rows, int64_t first, int64_t count, int64_t k0,
                        int64_t keys, uint64_t* bits) {
  const char* const words = rows + first / 64 * mask_bits.stride[2] + k0 * 8;
  const int shift = static_cast<int>(first % 64);
  const bool crosses = shift + count > 64;
  for (int64_t j = 0; j < keys; ++j) {
    uint64_t word, next = 0;
    memcpy(&word, words + j * 8, 8);
    if (crosses) memcpy(&next, words + mask_bits.stride[2] + j * 8, 8);
    bits[j] &= across(word, next, shift);
  }
}

}  // namespace
}  // namespace attn_ops::cpu
