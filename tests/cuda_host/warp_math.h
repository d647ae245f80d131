// What the 32 lanes of a warp compute together, from and to the places where each lane's operands lie.
//
// The layouts are those of ptx.cuh: with g = lane / 4 and t = lane % 4, lane = 4 g + t.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_layer.h"

namespace attn_ops {
namespace cuda {
namespace host_layer {

struct Operands {
  void* in_out;
  const void* operand;
  const void* operand2;
};

typedef double Row8 __attribute__((vector_size(64)));

// Towards zero, as the tensor cores leave their sums.
inline float cut_off(double x) {
  const float rounded = static_cast<float>(x);
  if (!(std::fabs(static_cast<double>(rounded)) > std::fabs(x)) || std::isinf(rounded)) return rounded;
  return bit_cast<float>(bit_cast<uint32_t>(rounded) - 1);
}

// d += a b: the products are exact and summed exactly, nearly, and what that comes to is cut off to float32.
template <int k_extent>
inline void multiply(const Operands (&lanes)[32], const float (&a)[16][k_extent], const float (&b)[k_extent][8]) {
  for (int half = 0; half < 2; ++half) {
    Row8 d[8];
    const auto own = [&](int lane) { return static_cast<float*>(lanes[lane].in_out) + 2 * half; };
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i) d[lane / 4][2 * (lane % 4) + i] = own(lane)[i];
    for (int k = 0; k < k_extent; ++k) {
      Row8 row;
      for (int j = 0; j < 8; ++j) row[j] = b[k][j];
      for (int i = 0; i < 8; ++i) d[i] += static_cast<double>(a[8 * half + i][k]) * row;
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 2; ++i) own(lane)[i] = cut_off(d[lane / 4][2 * (lane % 4) + i]);
  }
}

inline void gather(const Operands& lane, uint32_t (&a)[4], uint32_t (&b)[2]) {
  memcpy(a, lane.operand, sizeof a);
  memcpy(b, lane.operand2, sizeof b);
}

// A word of `a` is two neighbours of a row, one of `b` two neighbours of a column.
template <float (*widen)(uint32_t)>
inline void multiply_16_bits(const Operands (&lanes)[32]) {
  uint32_t a_words[16][8], b_words[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    uint32_t x[4], y[2];
    gather(lanes[lane], x, y);
    a_words[g][t] = x[0], a_words[g + 8][t] = x[1], a_words[g][t + 4] = x[2], a_words[g + 8][t + 4] = x[3];
    b_words[t][g] = y[0], b_words[t + 4][g] = y[1];
  }
  float a[16][16], b[16][8];
  for (int i = 0; i < 16; ++i) {
    uint16_t row[16];
    memcpy(row, a_words[i], sizeof row);
    for (int k = 0; k < 16; ++k) a[i][k] = widen(row[k]);
  }
  for (int k = 0; k < 8; ++k) {
    for (int j = 0; j < 8; ++j) b[2 * k][j] = widen(b_words[k][j] & 0xffffu);
    for (int j = 0; j < 8; ++j) b[2 * k + 1][j] = widen(b_words[k][j] >> 16);
  }
  multiply(lanes, a, b);
}

inline float float_of_bfloat16(uint32_t bits) { return bit_cast<float>(bits << 16); }

// The tensor cores read the upper 19 bits of a number.
inline void multiply_tf32(const Operands (&lanes)[32]) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    uint32_t x[4], y[2];
    gather(lanes[lane], x, y);
    for (uint32_t& word : x) word &= ~0x1fffu;
    for (uint32_t& word : y) word &= ~0x1fffu;
    a[g][t] = bit_cast<float>(x[0]), a[g + 8][t] = bit_cast<float>(x[1]);
    a[g][t + 4] = bit_cast<float>(x[2]), a[g + 8][t + 4] = bit_cast<float>(x[3]);
    b[t][g] = bit_cast<float>(y[0]), b[t + 4][g] = bit_cast<float>(y[1]);
  }
  multiply(lanes, a, b);
}

// `operand` of lane 8 i + r is row r of matrix i.
inline void read_matrices(const Operands (&lanes)[32], bool transposed) {
  uint16_t rows[32][8];
  for (int row = 0; row < 32; ++row) memcpy(rows[row], lanes[row].operand, 16);
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    uint32_t r[4];
    for (int i = 0; i < 4; ++i) {
      if (transposed) {
        r[i] = rows[8 * i + 2 * t][g] | static_cast<uint32_t>(rows[8 * i + 2 * t + 1][g]) << 16;
      } else {
        memcpy(&r[i], &rows[8 * i + g][2 * t], 4);
      }
    }
    memcpy(lanes[lane].in_out, r, sizeof r);
  }
}

inline bool is_any(const Operands (&lanes)[32]) {
  bool any = false;
  for (const Operands& lane : lanes) any = any || *static_cast<const bool*>(lane.in_out);
  return any;
}
inline void set_all(const Operands (&lanes)[32], bool value) {
  for (const Operands& lane : lanes) *static_cast<bool*>(lane.in_out) = value;
}

// Lane l gets the value of lane operand (or l ^ operand).
inline void exchange(const Operands (&lanes)[32], bool with_xor) {
  float values[32];
  for (int lane = 0; lane < 32; ++lane) memcpy(&values[lane], lanes[lane].in_out, 4);
  for (int lane = 0; lane < 32; ++lane) {
    int from;
    memcpy(&from, lanes[lane].operand, sizeof from);
    memcpy(lanes[lane].in_out, &values[(with_xor ? lane ^ from : from) & 31], 4);
  }
}

}  // namespace host_layer
}  // namespace cuda
}  // namespace attn_ops
