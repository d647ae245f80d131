// Every tuning constant of the CPU kernels, with where it was tuned. Those that may change the last bit of a result
// (block size, splits, chunks) act by shape alone, never by the number of threads.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace attn_ops::cpu {

// The smallest L1 data cache of the processors that matter: 32 KiB (Zen 1 to 4, Intel before Ice Lake), else 48 or 64.
static constexpr int64_t kL1Bytes = int64_t{32} << 10;

// Of the processor's L2 cache; 0 where the system does not tell.
static inline int64_t l2_bytes() {
  static const int64_t bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return bytes < 0 ? 0 : bytes;
}
static constexpr int64_t kLargeL2Bytes = int64_t{2} << 20;  // Intel's servers since 2023, whose L3 is far

// What a helper must find to do, or waking it costs more than it brings (some 50 us; Zen 4, 2026-11-25): products, so many for
// each lane of a vector (with 8.4e6 in all two threads take 1.05 times as long as one by AVX-512, 0.84 times by AVX2, with 13e6
// 0.97 and 0.74; Intel model 167, 2026-11-28), or reading at 20 GB/s.
static constexpr double kHelperFlopsOfLane = 6e5;
static constexpr double kHelperBytes = 1e6;

// Keys per block: the score tile [kBlockKeys][lanes] stays in L1 (12 KiB on AVX2, 24 KiB on AVX-512). 128 is 2 to 4 %
// faster than 64 on every shape tried (Zen 5, 2026-11-22): half as many visits to the output tile.
static constexpr int64_t kBlockKeys = 128;

// Few rows (decode), where memory is the limit (Zen 5, 2026-11-23). Keys of a block: those of all heads, and the next
// block, stay in L2; 16 are up to 1.3 times faster than 32 with 16 heads, and as fast with 8. In int8 32 are as many bytes.
static constexpr int64_t head_lanes_keys(int64_t element_size) { return element_size == 1 ? 32 : 16; }
static constexpr int64_t kHeadLanesKeys = 64;  // at most: a word of bits
// Whether a block that does not fit L1 is asked for in the order it lies in memory, and nearer with the head before. With a large
// L2 rows are asked for once, to L2, with the same rows of the block before: 1.05 to 1.2 times as fast for halves from memory
// and L3, 1.0 to 1.04 for floats (Intel model 167, 2026-11-28).
static inline bool walks_ahead() { return l2_bytes() < kLargeL2Bytes; }
// kv heads of a task: their rows of one key are neighbours in BSHD, and their queries and outputs stay in L2.
static constexpr int64_t kHeadLanesHeads = 16;
// At least this many keys in a split: the partial results of one are a few percent of the keys it reads.
static constexpr int64_t kHeadLanesSplitKeys = 128;

// Tasks that the last heads of a call are cut into, one head for each thread (Zen 5, 2026-11-27).
static constexpr int64_t kLastHeadTasks = 4;

// Row tiles that meet a key/value block together, while it is in L1.
static constexpr int64_t kForwardTiles = 4;
// The same in backward.
static constexpr int64_t kBackwardTiles = 4;

// Scores and dp that backward keeps from one pass over the keys to the next, where it makes two: up to a MiB they stay in
// the L2 cache of most processors (Zen 5, 2026-11-27).
static constexpr int64_t kKeptScoresBytes = int64_t{1} << 20;

// Rows of keys that lie a multiple of so many bytes apart are copied before several tiles read them: of a multiple of 4 KiB
// reading in place takes up to 1.3 times the time with an L2 cache of a MiB, of 2 KiB 0.94 to 1.0 (Zen 5, AVX2 and AVX-512,
// 2026-11-27). There 128 keys, values and those of the next head are 32 lines to a set of 16, or 16.
static inline int64_t colliding_bytes() { return l2_bytes() < (int64_t{1} << 20) ? 2048 : 4096; }
// And any rows, with a large L2, where every key is passed by so many groups of tiles: 1.03 times as fast at 512 tokens, 1.1 at
// 1,024, 1.19 at 2,048 (Intel model 167, 2026-11-28). Of 3 KiB a quarter of the sets take all, and what they lose is in L3.
static inline bool copies_pay(double passes) { return l2_bytes() >= kLargeL2Bytes && passes >= 2; }

// A bias, or its gradient, beyond what the L3 cache may keep of it is asked for ahead, the rows of so many lanes with each tile
// of registers of a product (Zen 5, 2026-11-27: 12 of some 16 then ask for all). Of a smaller one that costs 2 % and brings
// nothing.
static constexpr double kBiasInCacheBytes = 4 << 20;
static constexpr int kLaneRowsAhead = 4;

// Keys and values that are copied (other dtype, or rows far apart) are kept for the whole task up to this size: one
// copy then serves all its rows. Above it every group of tiles copies its own.
static constexpr int64_t kKeptKeysBytes = int64_t{8} << 20;

// While a head is computed, this much of the next one is asked for: 15 % at 128 tokens (Zen 5, 2026-11-23), and with all of a
// head of 512 tokens, out too, 4 to 9 % (Intel model 167 with 2 MiB of L2, 2026-11-28).
static inline int64_t next_task_bytes() {
  const int64_t part = l2_bytes() / 8 * 3, least = int64_t{384} << 10;
  return part > least ? part : least;
}

// Forward key splits (few rows, many keys: decode). By shape alone, so that results do not depend on threads.
static constexpr int64_t kSplitKeys = 512;   // at least this many keys in a split
static constexpr int64_t kSplitTasks = 32;   // split until there are this many tasks

// Masks are packed by key where up to so many query heads share a kv head: of so many, the bits take what the mask does.
static constexpr int64_t kMaskGroup = 8;

// Bytes of boolean masks that a task packs.
static constexpr int64_t kMaskBytes = int64_t{1} << 18;

// Backward row chunks: each has its own dk, dv, summed in order at the end. By shape alone, again.
static constexpr int64_t kChunkRows = 512;
static constexpr int64_t kChunkTasks = 32;

// The gradient of a bias that several scores share (Zen 3, 2026-11-26): tasks that its heads and rows are shared out
// to, as long as a chunk has so many rows and all sums fit kWaveBytes; and heads whose terms one chain of additions
// takes.
static constexpr int64_t kSumTasks = 16;
static constexpr int64_t kSumChunkRows = 256;
static constexpr int64_t kSumTerms = 16;
static constexpr int64_t kSumSlice = int64_t{1} << 16;  // elements that a task writes at the end

// Memory for those partial dk, dv: heads are processed in waves that fit (at least one head). 8 MiB are summed from L3,
// and are 1 to 3 % faster than 64 (Zen 4, 2026-11-25).
static constexpr int64_t kWaveBytes = int64_t{8} << 20;

}  // namespace attn_ops::cpu
