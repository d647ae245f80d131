// The C interface: says which calls the kernels take, chooses the kernels of a call, and launches them.
#include <sys/random.h>

#include <atomic>
#include <chrono>
#include <initializer_list>

#include "divisor.h"
#include "driver.h"
#include "library.h"
#include "splits.h"

#define EXPORT __attribute__((visibility("default")))

namespace attn_ops {
namespace cuda {
namespace {

// What the library itself refuses; the driver's codes are positive.
enum Refusal { kNoDevice = -1, kUnsupported = -2, kWorkspaceTooSmall = -3 };

// What the functions return is the calling thread's, until it calls them again.
thread_local Text reason_text, error_text;

// Numbers of rows and keys are 32-bit in the kernels, and go past the end by up to a tile.
constexpr int64_t kMostRows = 0x7fffffff - 256;

// ---------------------------------------------------------------------------------------------- which kernels

struct Choice {
  Math math;   // of the kernels that exist for TF32
  Math exact;  // of the others
  int dim;     // index into kDims
  bool plain;

  // Of a call that is supported.
  explicit Choice(const AttentionParams& p) : dim(0) {
    exact = p.dtype == DType::kFloat16 ? Math::kFloat16 : p.dtype == DType::kBFloat16 ? Math::kBFloat16 : Math::kFloat32;
    math = exact == Math::kFloat32 && p.allow_tf32 ? Math::kTf32 : exact;
    while (kDims[dim] < p.head_dim || kDims[dim] < p.value_dim) ++dim;
    plain = element_bytes(math) == 2 && p.bias.data == nullptr && p.num_masks == 0 && p.dropout_rate == 0 && p.scale > 0;
  }
  int columns() const { return kDims[dim]; }
};

int64_t row_count(const AttentionParams& p) { return p.seqlen_q * group_size(p); }
int64_t heads(const AttentionParams& p) { return p.batch * p.num_kv_heads; }

// `counted`: what tiles are made of, rows or keys.
Rows rows_of(const AttentionParams& p, int64_t counted, int per_tile) {
  Rows rows;
  rows.group = make_divisor(static_cast<uint32_t>(group_size(p)));
  rows.count = static_cast<int32_t>(row_count(p));
  rows.tiles = static_cast<int32_t>(ceil_div(counted, per_tile));
  return rows;
}

struct ForwardPlan {
  Choice choice;
  KernelName kernel;
  Grid grid;
  Rows rows;
  bool decodes;

  explicit ForwardPlan(const AttentionParams& p) : choice(p), decodes(row_count(p) <= kMostDecodeRows) {
    const int columns = choice.columns();
    if (decodes) {
      kernel = {Role::kDecode, choice.exact, choice.dim};
      rows = rows_of(p, row_count(p), kDecodeRows);
      grid = {heads(p) * rows.tiles, 32 * kDecodeWarps, decode_shared_bytes(choice.exact, columns)};
    } else {
      const Tile tile = forward_tile(choice.math, columns, choice.plain);
      kernel = {Role::kForward, choice.math, choice.dim, choice.plain};
      rows = rows_of(p, row_count(p), tile.rows);
      grid = {heads(p) * rows.tiles, tile.threads(), forward_shared_bytes(choice.math, columns, choice.plain)};
    }
  }
};

struct BackwardPlan {
  Choice choice;
  Tile tile;
  Grid delta, dq, dkdv;
  Rows query_rows, key_rows;

  explicit BackwardPlan(const AttentionParams& p)
      : choice(p), tile(backward_tile(choice.math, choice.columns(), choice.plain)),
        query_rows(rows_of(p, row_count(p), tile.rows)), key_rows(rows_of(p, p.seqlen_k, tile.rows)) {
    const int shared = backward_shared_bytes(choice.math, choice.columns(), choice.plain);
    delta = {ceil_div(p.batch * p.seqlen_q * p.num_heads, kDeltaWarps), 32 * kDeltaWarps, 0};
    dq = {heads(p) * query_rows.tiles, tile.threads(), shared};
    dkdv = {heads(p) * key_rows.tiles * (splits_dk_dv(choice.columns()) ? 2 : 1), tile.threads(), shared};
  }

  // One block for each tile of the bias, which visits what the tile was broadcast to.
  Grid d_bias(const BackwardParams& b) const {
    const int columns = choice.columns();
    const Tile t = backward_tile(choice.exact, columns, false);
    const int64_t* shape = b.d_bias_shape;
    const int64_t blocks = shape[0] * shape[1] * (shape[2] == 1 ? 1 : ceil_div(shape[2], t.rows)) *
                           (shape[3] == 1 ? 1 : ceil_div(shape[3], t.columns));
    return {blocks, t.threads(), backward_shared_bytes(choice.exact, columns, false)};
  }
};

// ---------------------------------------------------------------------------------------------- what is not supported

const char* unsupported_reason(const AttentionParams& p, Text* reason) {
  if (p.dtype != DType::kFloat32 && p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) {
    return reason->format("the CUDA kernels compute in float32, float16 and bfloat16%s",
                          p.dtype == DType::kFloat64 ? ", not in float64" : "");
  }
  if (p.head_dim > kLargestDim || p.value_dim > kLargestDim) {
    return reason->format("the CUDA kernels take head dimensions up to %d, not %lld", kLargestDim,
                          static_cast<long long>(p.head_dim > p.value_dim ? p.head_dim : p.value_dim));
  }
  // The products below are of numbers that have been found small enough.
  for (const int64_t extent : {p.batch, p.num_heads, p.seqlen_q, p.seqlen_k}) {
    if (extent > kMostRows)
      return reason->format("the CUDA kernels take extents up to %lld, not %lld", static_cast<long long>(kMostRows),
                            static_cast<long long>(extent));
  }
  if (row_count(p) > kMostRows) {
    return reason->format("the CUDA kernels take up to %lld query rows for each key/value head, not %lld",
                          static_cast<long long>(kMostRows), static_cast<long long>(row_count(p)));
  }
  int64_t elements, products;
  if (!__builtin_mul_overflow(p.batch * p.num_heads, p.seqlen_q > p.seqlen_k ? p.seqlen_q : p.seqlen_k, &elements) &&
      !__builtin_mul_overflow(elements, 2, &products)) {
    const ForwardPlan forward(p);
    const BackwardPlan backward(p);
    int64_t most = forward.grid.blocks;
    for (const Grid& grid : {backward.delta, backward.dq, backward.dkdv})
      if (grid.blocks > most) most = grid.blocks;
    if (most <= kMostBlocks) return nullptr;
  }
  return reason->format("the CUDA kernels take no call with so many blocks: batch %lld, heads %lld, queries %lld, keys %lld",
                        static_cast<long long>(p.batch), static_cast<long long>(p.num_heads),
                        static_cast<long long>(p.seqlen_q), static_cast<long long>(p.seqlen_k));
}

int refuse_unsupported(const AttentionParams& p) {
  if (unsupported_reason(p, &error_text) != nullptr) return kUnsupported;
  if (p.dropout_rate > 0 && p.dropout_words == nullptr) {
    error_text.format("the CUDA kernels read the seed of dropout from device memory: dropout_words must not be null");
    return kUnsupported;
  }
  return 0;
}

// ---------------------------------------------------------------------------------------------- 16 bytes at a time

// Whether each row of [batch, seqlen, heads, dim] begins at a multiple of 16 bytes and lies densely.
bool rows_load(const AttentionParams& p, const StridedView& view, int64_t seqlen, int64_t num_heads, int64_t dim) {
  const int64_t bytes = static_cast<int64_t>(size_of(p.dtype)), extent[] = {p.batch, seqlen, num_heads};
  bool aligned = dim > 0 && (dim == 1 || view.stride[3] == 1) && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int axis = 0; axis < 3; ++axis) aligned = aligned && (extent[axis] <= 1 || view.stride[axis] * bytes % 16 == 0);
  return aligned;
}
// And ends at one: the last 16 bytes of a row are written whole.
bool rows_store(const AttentionParams& p, const StridedView& view, int64_t seqlen, int64_t num_heads, int64_t dim) {
  return rows_load(p, view, seqlen, num_heads, dim) && dim * static_cast<int64_t>(size_of(p.dtype)) % 16 == 0;
}

Aligned aligned_inputs(const AttentionParams& p) {
  Aligned aligned;
  aligned.q = rows_load(p, p.q, p.seqlen_q, p.num_heads, p.head_dim);
  aligned.k = rows_load(p, p.k, p.seqlen_k, p.num_kv_heads, p.head_dim);
  aligned.v = rows_load(p, p.v, p.seqlen_k, p.num_kv_heads, p.value_dim);
  return aligned;
}

Aligned aligned_forward(const AttentionParams& p) {
  Aligned aligned = aligned_inputs(p);
  aligned.out = rows_store(p, p.out, p.seqlen_q, p.num_heads, p.value_dim);
  return aligned;
}

Aligned aligned_backward(const BackwardParams& b) {
  const AttentionParams& p = b.forward;
  Aligned aligned = aligned_inputs(p);
  aligned.out = rows_load(p, p.out, p.seqlen_q, p.num_heads, p.value_dim);
  aligned.d_out = rows_load(p, b.d_out, p.seqlen_q, p.num_heads, p.value_dim);
  aligned.dq = rows_store(p, b.dq, p.seqlen_q, p.num_heads, p.head_dim);
  aligned.dk = rows_store(p, b.dk, p.seqlen_k, p.num_kv_heads, p.head_dim);
  aligned.dv = rows_store(p, b.dv, p.seqlen_k, p.num_kv_heads, p.value_dim);
  return aligned;
}

// ---------------------------------------------------------------------------------------------- splits and workspace

// Keys that the rows of one tile can see at most.
int64_t keys_in_sight(const AttentionParams& p) {
  const Mask& m = p.mask;
  if (m.window_left < 0 || m.window_right < 0 || m.window_left >= p.seqlen_k || m.window_right >= p.seqlen_k)
    return p.seqlen_k;
  const int64_t window = m.window_left + m.window_right + kDecodeRows;
  return window < p.seqlen_k ? window : p.seqlen_k;
}

// Registers let no more blocks than this share a multiprocessor.
constexpr int kMostDecodeBlocks = 2;
constexpr int kSharedBytesOfSystem = 1024;  // in each block

int splits_on(const Device& d, const AttentionParams& p, const ForwardPlan& plan) {
  if (!plan.decodes) return 1;
  const int fit = d.shared_bytes / (plan.grid.shared_bytes + kSharedBytesOfSystem);
  const int64_t slots = int64_t{d.multiprocessors} * (fit < 1 ? 1 : fit < kMostDecodeBlocks ? fit : kMostDecodeBlocks);
  return decode_splits(plan.grid.blocks, ceil_div(keys_in_sight(p), kDecodeWarps * decode_keys(plan.choice.exact)), slots);
}

size_t aligned_bytes(int64_t bytes) { return static_cast<size_t>(ceil_div(bytes, 16) * 16); }

// What the blocks of a split decode step leave for the last of them.
struct Parts {
  size_t tickets, stats, out;  // bytes of each

  Parts(const AttentionParams& p, const ForwardPlan& plan, int splits) : tickets(0), stats(0), out(0) {
    if (splits == 1) return;
    const int64_t rows = plan.grid.blocks * splits * kDecodeRows, bytes = sizeof(float);
    tickets = aligned_bytes(plan.grid.blocks * static_cast<int64_t>(sizeof(uint64_t)));
    stats = aligned_bytes(rows * 2 * bytes);
    out = aligned_bytes(rows * p.value_dim * bytes);
  }
  size_t bytes() const { return tickets + stats + out; }
};

size_t delta_bytes(const AttentionParams& p) {
  return aligned_bytes(p.batch * p.num_heads * p.seqlen_q * static_cast<int64_t>(sizeof(float)));
}

int refuse_workspace(const Workspace& lent, size_t needed) {
  if (lent.bytes >= needed && reinterpret_cast<uintptr_t>(lent.data) % 16 == 0) return 0;
  error_text.format("the workspace has %zu bytes at %p; %zu are needed, from a multiple of 16 on", lent.bytes, lent.data,
                    needed);
  return kWorkspaceTooSmall;
}

// 48 bits that no other launch has: not of this process, and hardly of one that had the memory before.
uint64_t unique_launch() {
  static std::atomic<uint64_t> next{[] {
    uint64_t start = static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count());
    if (getrandom(&start, sizeof start, GRND_NONBLOCK) < 0) start *= 0x9E3779B97F4A7C15u;
    return start;
  }()};
  return next.fetch_add(1, std::memory_order_relaxed) & ((uint64_t{1} << 48) - 1);
}

// ---------------------------------------------------------------------------------------------- launches

int launch_if_any(const Device& d, const KernelName& name, const Grid& grid, const void* args, void* stream) {
  if (grid.blocks <= 0) return 0;
  if (grid.blocks > kMostBlocks) {
    error_text.format("%s would need %lld blocks; %lld are possible", KernelText(name).text,
                      static_cast<long long>(grid.blocks), static_cast<long long>(kMostBlocks));
    return kUnsupported;
  }
  return launch(d, name, grid, args, stream, &error_text);
}

int forward(const AttentionParams& p, void* stream, const Workspace& workspace) {
  if (const int refusal = refuse_unsupported(p)) return refusal;
  const Device* d = find_device(-1, &error_text);
  if (d == nullptr) return kNoDevice;
  const ForwardPlan plan(p);
  if (!plan.decodes) {
    const ForwardArgs args{p, plan.rows, aligned_forward(p)};
    return launch_if_any(*d, plan.kernel, plan.grid, &args, stream);
  }
  const int splits = splits_on(*d, p, plan);
  const Parts parts(p, plan, splits);
  if (const int refusal = refuse_workspace(workspace, parts.bytes())) return refusal;
  DecodeArgs args;
  args.p = p;
  args.rows = plan.rows;
  args.aligned = aligned_forward(p);
  args.splits = splits;
  if (splits > 1) {
    char* memory = static_cast<char*>(workspace.data);
    args.tickets = reinterpret_cast<uint64_t*>(memory);
    args.partial_stats = reinterpret_cast<float*>(memory + parts.tickets);
    args.partial_out = reinterpret_cast<float*>(memory + parts.tickets + parts.stats);
    args.launch = unique_launch();
  }
  Grid grid = plan.grid;
  grid.blocks *= splits;
  return launch_if_any(*d, plan.kernel, grid, &args, stream);
}

int backward(const BackwardParams& b, void* stream, const Workspace& workspace) {
  const AttentionParams& p = b.forward;
  if (const int refusal = refuse_unsupported(p)) return refusal;
  const Device* d = find_device(-1, &error_text);
  if (d == nullptr) return kNoDevice;
  if (const int refusal = refuse_workspace(workspace, delta_bytes(p))) return refusal;
  const BackwardPlan plan(p);
  const Choice& c = plan.choice;
  BackwardArgs args;
  args.b = b;
  args.aligned = aligned_backward(b);
  args.delta = static_cast<float*>(workspace.data);
  args.rows = plan.query_rows;
  if (const int code = launch_if_any(*d, {Role::kDelta, c.exact, 0}, plan.delta, &args, stream)) return code;
  if (const int code = launch_if_any(*d, {Role::kQueryGradient, c.math, c.dim, c.plain}, plan.dq, &args, stream))
    return code;
  args.rows = plan.key_rows;
  if (const int code = launch_if_any(*d, {Role::kKeyGradients, c.math, c.dim, c.plain}, plan.dkdv, &args, stream))
    return code;
  if (b.d_bias == nullptr) return 0;
  return launch_if_any(*d, {Role::kBiasGradient, c.exact, c.dim}, plan.d_bias(b), &args, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace attn_ops

using namespace attn_ops;
using namespace attn_ops::cuda;

extern "C" {

EXPORT uint64_t attn_ops_cuda_abi() { return uint64_t{sizeof(AttentionParams)} << 32 | sizeof(BackwardParams); }

EXPORT const char* attn_ops_cuda_unavailable_reason(int device) {
  const Device* d = find_device(device, &reason_text);
  return d == nullptr || load_kernels(*d, &reason_text) != nullptr ? reason_text.c_str() : "";
}

EXPORT const char* attn_ops_cuda_unsupported_reason(const AttentionParams* p) {
  const char* reason = unsupported_reason(*p, &reason_text);
  return reason != nullptr ? reason : "";
}

EXPORT size_t attn_ops_cuda_forward_workspace_bytes(const AttentionParams* p) {
  const Device* d = find_device(-1, &reason_text);
  if (d == nullptr || unsupported_reason(*p, &reason_text) != nullptr) return 0;
  const ForwardPlan plan(*p);
  return Parts(*p, plan, splits_on(*d, *p, plan)).bytes();
}

EXPORT size_t attn_ops_cuda_backward_workspace_bytes(const BackwardParams* b) {
  const Device* d = find_device(-1, &reason_text);
  if (d == nullptr || unsupported_reason(b->forward, &reason_text) != nullptr) return 0;
  return delta_bytes(b->forward);
}

EXPORT int attn_ops_cuda_forward(const AttentionParams* p, void* stream, Workspace workspace) {
  return forward(*p, stream, workspace);
}

EXPORT int attn_ops_cuda_backward(const BackwardParams* b, void* stream, Workspace workspace) {
  return backward(*b, stream, workspace);
}

EXPORT const char* attn_ops_cuda_error_text() { return error_text.c_str(); }

}  // extern "C"
