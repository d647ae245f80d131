// The one parameter of each kernel: the call, and what dispatch.cc has worked out about it.
#pragma once

#include "../attention.h"

namespace attn_ops::cuda {

// x / divisor by a multiplication, for 0 <= x < 2^31: the rows of a key/value head are divided by the group size often.
struct Divisor {
  uint32_t divisor = 1, multiplier = 0;
  int32_t shift = 0;
};

// How many bytes of each array's rows can be moved at a time: 16, 8 or 4 of dense rows, which begin at a multiple of it
// and are one long; 0: single elements.
struct Aligned {
  uint8_t q = 0, k = 0, v = 0, out = 0, d_out = 0, dq = 0, dk = 0, dv = 0;
};

// All query heads that share a key/value head form one list of rows, position-major: row r is position r / group of
// head r % group, as on the CPU.
struct Rows {
  Divisor group;
  int32_t count = 0;  // seqlen_q * group_size
  int32_t tiles = 0;  // of the kernel's rows (or, of Hopper's where keys stay, of its keys)
};

// What would be computed by every thread, and in double precision, which many cards hardly have.
struct Factors {
  Divisor block_q, block_k;  // of rows and keys, where the mask has blocks
  float scale = 1.0f;  // of the scores
  float cap = 0.0f, into_cap = 0.0f;  // 0: none; scale / cap
  float keep = 1.0f;  // 1 / (1 - dropout_rate)
  uint32_t drop_below = 0;  // dropout_rate * 2^32; 0: no dropout
  // Whether 16 keys of a mask can be read at a time, and two of the bias, from every multiple of as many.
  bool whole_masks[kMaxMasks] = {};
  bool bias_pairs = false;
};

struct ForwardArgs {
  AttentionParams p;
  Factors factors;
  Rows rows;
  Aligned aligned;
};

// Blocks are cut along the keys as well; the last of those of a tile puts the parts together.
struct DecodeArgs {
  AttentionParams p;
  Factors factors;
  Rows rows;
  Aligned aligned;
  bool plain = false;  // is_plain() of plan.h, with a scale up to 1
  int32_t splits = 1;
  float* partial_out = nullptr;  // [batch, num_kv_heads, tiles, splits, kDecodeRows, decode_quads(value_dim), 4]
  float* partial_stats = nullptr;  // [batch, num_kv_heads, tiles, splits, kDecodeRows, 2]: maximum, sum
  uint64_t* tickets = nullptr;  // [batch, num_kv_heads, tiles]: launch << 16 | parts done. Not initialised
  uint64_t launch = 0;  // 48 bits that no other launch has
};

struct BackwardArgs {
  BackwardParams b;
  Factors factors;
  Rows rows;
  Aligned aligned;
  int32_t key_tiles = 0;  // of a head, where keys stay
  int32_t key_blocks = 0;  // the first so many of a launch that makes dq as well make dk and dv (all_gradients.cuh)
  float* delta = nullptr;  // [batch, num_heads, seqlen_q]: rowsum(p * dp) - d_lse
  int32_t parts = 1;  // that the rows of a head are cut into for the gradient of relative_bias
  float* partial_tables = nullptr;  // [parts, num_heads, 2 relative_reach + 1], of more than one part
};

}  // namespace attn_ops::cuda
