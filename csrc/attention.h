// The vocabulary shared by the kernels and their callers: plain data, no framework, no allocation.
//
//   s = scale * q k^T      s = cap tanh(s / cap)      s += slope (j - own_i) + relative_bias(j - own_i) + bias
//   out = softmax(s, masked, with a sink) v           lse = log(sum(exp(s)) + exp(sink))
//
// of which all but the first is optional; own_i is where row i stands among the keys (mask.h).
//
// Kernels are stateless: the caller lends the threads (`Threads`) and the workspace, and has validated the
// parameters (bindings/validate.h). Everything here may be shared between threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attn_ops {

enum class DType : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16, kBool, kInt8 };

static constexpr int64_t size_of(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : t == DType::kBool || t == DType::kInt8 ? 1 : 2;
}

// Softmax statistics, lse and accumulation: float32, or float64 when the inputs are float64.
static constexpr DType accumulator_of(DType t) { return t == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// A 4-d array by pointer and element strides; stride 0 broadcasts. Index order is fixed by the role, not by
// memory: tensors are [batch, seqlen, heads, dim] (so BHSD memory is only other strides), score-shaped views
// (masks, bias) are [batch, num_heads, seqlen_q, seqlen_k].
struct StridedView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride[4] = {0, 0, 0, 0};

  int64_t step() const { return stride[3] * size_of(dtype); }  // bytes between neighbours of the last axis
};

// Which keys a query row may see: one interval per row, computed by key_range() in mask.h.
struct Mask {
  int64_t window_left = -1;   // keys seen before the row's own position; -1 = all
  int64_t window_right = -1;  // keys seen after it; -1 = all; causal is 0
  bool bottom_right = false;  // the last query is aligned with the last key (false: the first with the first)
  // Where the first query stands among the keys, instead: [batch], or null.
  const int32_t* query_offset = nullptr;
  // Intervals of the caller's, [batch][seqlen_q], whose ends never move back along a row; or null.
  const int32_t *key_begin = nullptr, *key_end = nullptr;
  int64_t offset_stride = 0, interval_stride = 0;  // from one batch entry to the next; 0: all have the same
};

// Integers [batch][seqlen]; stride 0 broadcasts.
struct Ids {
  const int32_t* data = nullptr;
  int64_t stride = 0;

  const int32_t* of(int64_t batch) const { return data + batch * stride; }
};

constexpr int kMaxMasks = 4;

// What the arithmetic of kernels and plans is made for; validate.h says so in words. Dimensions small enough that no
// sum of scratch memory overflows, with any number of threads; positions, heads and lengths that 32 bits hold.
constexpr int64_t kMaxDim = int64_t{1} << 24;
constexpr int64_t kMaxExtent = INT32_MAX;      // of seqlen_q, seqlen_k, num_heads
constexpr int64_t kMaxStreams = UINT32_MAX;    // of dropout: batch * num_heads
constexpr int64_t kMaxOffset = int64_t{1} << 30;  // of query_offset
constexpr int64_t kPageRows = 16;                 // the size of a page of keys is a multiple of it
constexpr double kMaxSlope = 18446744073709551616.0;  // 2^64: times any distance it cannot leave the range of float32

// Where a call stands in a larger one, as dropout counts: the number of its first head there (of its first batch entry),
// how many heads an entry has there, and its first row and key.
struct DropoutOrigin {
  uint32_t first_head, heads_of_entry, first_row, first_key;
};

struct AttentionParams {
  DType dtype = DType::kFloat32;  // of q, k, v, out and their gradients; in forward k and v may have another, below
  int64_t batch = 0, seqlen_q = 0, seqlen_k = 0;
  int64_t num_heads = 0, num_kv_heads = 0;  // query head h reads kv head h / (num_heads / num_kv_heads)
  int64_t head_dim = 0, value_dim = 0;
  double scale = 1.0;

  // [batch, seqlen, heads, dim]. Forward reads k and v of any one dtype of float32, float16, bfloat16 and int8 beside a q
  // that is not float64: caches, which may be narrower than queries.
  StridedView q, k, v;
  // Of int8 keys and values, else data null: float32 [batch, seqlen_k, num_kv_heads, 1]. Key j of head h is k_scales[j, h]
  // times k[j, h]. A scale that is NaN makes NaN of its row, for whoever sees it.
  StridedView k_scales, v_scales;
  // Keys and values in pages, for forward alone: those of batch entry b from n page_size on are the rows of page
  // block_table[b block_table_stride + n], which k and v have in place of the batch (stride[0] goes from page to page,
  // stride[1] stays inside one). page_size is a multiple of kPageRows. Entries that no length reaches are not read.
  const int32_t* block_table = nullptr;  // null: none
  int64_t block_table_stride = 0, page_size = 0;
  StridedView out;                // [batch, seqlen_q, num_heads, value_dim]; an input of backward
  // What backward needs of every row, contiguous [batch, num_heads, seqlen_q, 2], accumulator_of(dtype): the maximum of
  // its scores and sum(exp(s - maximum)); 0 and 0 where it sees no key. Their logarithm is lse, but once that is
  // rounded the weights can no longer be had from it: with scores near 1e4, float32 has lse to 1e-3.
  void* statistics = nullptr;
  void* lse = nullptr;  // null where nobody wants it; contiguous [batch, num_heads, seqlen_q], accumulator_of(dtype)

  Mask mask;
  const int32_t* query_lengths = nullptr;  // [batch] or null: rows at and past it see nothing
  const int32_t* key_lengths = nullptr;    // [batch] or null: keys at and past it are never read
  StridedView masks[kMaxMasks];            // bool, true = may see; ANDed
  int32_t num_masks = 0;
  StridedView mask_bits;                   // masks packed by cpu/packed_masks.h; data null = none
  Ids query_ids, key_ids;                  // data null = none; a row sees the keys of its own id
  StridedView blocks;                      // bool by blocks of block_q rows and block_k keys; data null = none
  int64_t block_q = 1, block_k = 1;
  StridedView bias;                        // data null = none; of dtype or float32; -inf hides a key like a mask

  // The rest of the scores' algebra, arrays of accumulator_of(dtype), contiguous; null = none.
  double soft_cap = 0.0;                  // 0 = none
  const void* slopes = nullptr;           // [batch][num_heads], the first by slopes_stride
  int64_t slopes_stride = 0;
  const void* relative_bias = nullptr;    // [num_heads][2 reach + 1], of distance clip(j - own_i, -reach, reach)
  int64_t relative_reach = 0;
  const void* sinks = nullptr;            // [num_heads]

  double dropout_rate = 0.0;
  uint64_t dropout_seed = 0, dropout_offset = 0;
  DropoutOrigin dropout_origin{};  // of CPUs
  // GPUs read seed and offset from here instead, in device memory: a launch must not wait for their values.
  const uint64_t* dropout_words = nullptr;
  bool allow_tf32 = false;  // GPUs: products of float32 in TF32, with 10 bits of mantissa, instead of 3xTF32
};

// Whether there is anything to compute: without a row there are at most gradients of zero to write.
static inline bool has_rows(const AttentionParams& p) { return p.batch > 0 && p.seqlen_q > 0 && p.num_heads > 0; }

// Query heads per key/value head. (Static: code compiled per ISA must not be shared through the linker.)
static inline int64_t group_size(const AttentionParams& p) {
  return p.num_kv_heads ? p.num_heads / p.num_kv_heads : 1;
}

struct BackwardParams {
  AttentionParams forward;      // with out and statistics as forward left them
  StridedView d_out;            // [batch, seqlen_q, num_heads, value_dim]
  const void* d_lse = nullptr;  // contiguous like lse, or null for zero
  StridedView dq, dk, dv;
  // Gradient of the bias, contiguous, of its dtype and the shape it has before broadcasting: an extent is 1 or full.
  // Null when not wanted.
  void* d_bias = nullptr;
  int64_t d_bias_shape[4] = {1, 1, 1, 1};
  void *d_relative_bias = nullptr, *d_sinks = nullptr;  // like relative_bias and sinks, or null
};

// Threads lent by the caller: `run` calls body(arg, slot) for slots 0..n-1 with 1 <= n <= count, each on its own
// thread (the calling one takes part), and returns when all are done.
struct Threads {
  int count = 1;
  void* self = nullptr;
  void (*run)(void* self, int slots, void (*body)(void* arg, int slot), void* arg) = nullptr;
};

// Memory lent by the caller, 64-byte aligned: `bytes` as told by *_workspace_bytes for the same params and count.
struct Workspace {
  void* data = nullptr;
  size_t bytes = 0;
};

namespace cpu {

// The limits of the machine that benchmarks measure kernels against.
enum class Probe : int32_t { kFmaFloat32, kFmaFloat64, kExpFloat32, kExpFloat64, kRead };

constexpr int kReadVariants = 8;  // ways to read memory: how many streams, prefetched how far ahead

struct ProbeSlice {
  Probe what = Probe::kFmaFloat32;
  int variant = 0;             // kRead: which way, below kReadVariants
  const void* data = nullptr;  // kRead: what to read, in whole cache lines
  int64_t bytes = 0;
};

// Instruction sets compiled in and usable on this machine, best first. Returns how many were written to `names`.
int isas(const char** names, int capacity);

bool isa_usable(const char* isa);

// The best one, or what the environment variable ATTN_OPS_ISA says, usable or not: that is for bindings to check.
const char* default_isa();

// Does one slice of some 10 to 100 us on the calling thread, and returns how much that was: floating-point operations,
// exponentials, or bytes. `*sink` receives a value that depends on all of it, so that nothing can be optimised
// away.
double probe(const ProbeSlice&, double* sink, const char* isa = nullptr);

// `isa` null is the default one. With an unusable one, or too little workspace, these do nothing and return 0 / false.

// `count` rows of `dim` elements of float32, float16 or bfloat16, one behind the other, as an int8 cache keeps them, and what
// they are to be multiplied with: the rule is in cpu/quantize.h.
bool quantize(DType dtype, const void* rows, int64_t count, int64_t dim, int8_t* out, float* scales,
              const char* isa = nullptr);

size_t forward_workspace_bytes(const AttentionParams&, int num_threads, const char* isa = nullptr);
bool forward(const AttentionParams&, Threads, Workspace, const char* isa = nullptr);

size_t backward_workspace_bytes(const BackwardParams&, int num_threads, const char* isa = nullptr);
bool backward(const BackwardParams&, Threads, Workspace, const char* isa = nullptr);

}  // namespace cpu
}  // namespace attn_ops
