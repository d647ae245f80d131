// The library's interface (library.h): what the kernels do not take, and the launches a call becomes.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "hopper/dispatch.h"
#include "library.h"
#include "plan.h"

namespace attn_ops::cuda {
namespace {

// A text that is valid until the thread's next call.
const char* keep(const std::string& text) {
  thread_local std::string kept;
  kept = text;
  return kept.c_str();
}

std::string number(int64_t x) { return std::to_string(x); }

std::string unsupported_reason(const AttentionParams& p) {
  if (p.dtype != DType::kFloat32 && p.dtype != DType::kFloat16 && p.dtype != DType::kBFloat16) {
    return "the CUDA kernels take float32, float16 and bfloat16, not float64";
  }
  if (dim_of(p) == 0) {
    return "the CUDA kernels take a head_dim (" + number(p.head_dim) + ") and value_dim (" + number(p.value_dim) +
           ") up to " + number(kLargestDim);
  }
  if (p.bias.data != nullptr && p.bias.dtype != p.dtype && p.bias.dtype != DType::kFloat32) {
    return "the CUDA kernels take a bias of float32 or of the dtype of the inputs";
  }
  const bool of_16_bits = p.k.dtype == DType::kFloat16 || p.k.dtype == DType::kBFloat16;
  if (has_narrow_keys(p) && !(p.dtype == DType::kFloat32 && of_16_bits)) {
    return "the CUDA kernels take keys of the dtype of the queries, or of 16 bits beside queries of float32";
  }
  if (p.relative_bias != nullptr && p.relative_reach > kMostReach) {
    return "the CUDA kernels take a relative_bias of up to " + number(kMostReach) + " distances each way (" +
           number(p.relative_reach) + ")";
  }
  constexpr int64_t kMost = INT32_MAX - 4096;
  if (num_rows(p) > kMost || p.seqlen_k > kMost) {
    return "the CUDA kernels take up to " + number(kMost) + " query rows (" + number(num_rows(p)) + ") and keys (" +
           number(p.seqlen_k) + ") of a head";
  }
  const double blocks = static_cast<double>(p.batch) * p.num_kv_heads *
                        std::max(ceil_div(num_rows(p), kDecodeRows), 2 * ceil_div(p.seqlen_k, 32));
  if (blocks > INT32_MAX) {
    return "batch (" + number(p.batch) + ") and num_kv_heads (" + number(p.num_kv_heads) +
           ") are too large for one launch";
  }
  return "";
}

// Whether the kernels take this call, where it is to run.
int check(const AttentionParams& p, const StreamScope& scope) {
  const std::string reason = unsupported_reason(p);
  if (!reason.empty()) return fail(kUnsupported, "%s", reason.c_str());
  if (p.dropout_rate > 0 && p.dropout_words == nullptr) {
    return fail(kUnsupported, "the CUDA kernels read the seed of dropout from device memory: dropout_words is null");
  }
  return scope.device() == nullptr ? kNoDevice : 0;
}

int check(const Workspace& workspace, size_t needed) {
  const bool aligned = workspace.data != nullptr && reinterpret_cast<uintptr_t>(workspace.data) % 16 == 0;
  if (needed == 0 || (aligned && workspace.bytes >= needed)) return 0;
  return fail(kWorkspace, "%zu bytes of workspace, 16-byte aligned, are needed; %zu were lent at %p", needed,
              workspace.bytes, workspace.data);
}

// 48 bits that no other launch of this process has, and none of another by more than chance.
uint64_t next_launch() {
  static std::atomic<uint64_t>* counter = [] {
    std::random_device random;
    return new std::atomic<uint64_t>(static_cast<uint64_t>(random()) << 20 ^ random());
  }();
  const uint64_t launch = counter->fetch_add(1) & 0xffffffffffffu;
  return launch != 0 ? launch : next_launch();  // 0 is what a finished ticket holds
}

std::atomic<int64_t> most_decode_rows{kMostDecodeRows};

// Pages and keys of another dtype are read by this kernel alone.
bool is_decode(const AttentionParams& p) {
  return p.block_table != nullptr || has_narrow_keys(p) ||
         num_rows(p) <= most_decode_rows.load(std::memory_order_relaxed);
}

// Of kernels.cu.
int launch(const Device& device, const KernelName& name, int64_t blocks, void* stream, void* args) {
  const BlockShape shape = block_shape(name);
  return launch(device, name, blocks, shape.threads, shape.shared_bytes, stream, args);
}

int launch_decode(const AttentionParams& p, const Device& device, void* stream, Workspace workspace) {
  const DecodePlan plan(p);
  if (const int code = check(workspace, plan.workspace_bytes())) return code;
  DecodeArgs args;
  args.p = p;
  args.factors = factors_of(p);
  args.rows = rows_of(p, plan.tiles_per_head);
  args.aligned = aligned_of(p);
  args.plain = is_plain(p) && p.scale <= 1;
  args.splits = plan.choose_splits(p, device);
  if (args.splits > 1) {
    char* memory = static_cast<char*>(workspace.data);
    args.partial_out = reinterpret_cast<float*>(memory);
    args.partial_stats = reinterpret_cast<float*>(memory + plan.partial_out_bytes);
    args.tickets = reinterpret_cast<uint64_t*>(memory + plan.partial_out_bytes + plan.partial_stats_bytes);
    args.launch = next_launch();
  }
  return launch(device, decode_kernel(p), plan.tiles * args.splits, stream, &args);
}

int launch_forward(const AttentionParams& p, const Device& device, void* stream) {
  if (hopper::takes(p, device)) return hopper::launch_forward(p, device, stream);
  const Math math = math_of(p, false);
  const int dim = dim_of(p);
  const bool plain = is_plain(p);
  const Tile tile = forward_tile(math, dim, plain);
  const int64_t tiles = ceil_div(num_rows(p), tile.block_m);
  ForwardArgs args;
  args.p = p;
  args.factors = factors_of(p);
  args.rows = rows_of(p, tiles);
  args.aligned = aligned_of(p);
  return launch(device, {Role::kForward, math, dim, plain}, p.batch * p.num_kv_heads * tiles, stream, &args);
}

size_t delta_bytes(const AttentionParams& p) {
  return static_cast<size_t>(p.batch) * p.num_heads * p.seqlen_q * sizeof(float);
}

Tile score_gradient_tile(const AttentionParams& p) {
  return backward_tile(math_of(p, is_decode(p)), dim_of(p), false, true);
}

// Of delta, and behind it parts of the gradient of relative_bias.
size_t backward_workspace_bytes(const BackwardParams& b) {
  const size_t delta = delta_bytes(b.forward);
  if (b.d_relative_bias == nullptr || dim_of(b.forward) == 0) return delta;
  return delta + TablePlan(b.forward, score_gradient_tile(b.forward)).workspace_bytes();
}

int launch_table_gradient(BackwardArgs args, const Device& device, void* stream) {
  const AttentionParams& p = args.b.forward;
  const Math math = math_of(p, is_decode(p));
  const TablePlan plan(p, score_gradient_tile(p));
  args.parts = plan.parts;
  args.partial_tables = args.delta + delta_bytes(p) / sizeof(float);
  const int code = launch(device, {Role::kDistanceGradient, math, dim_of(p)}, plan.blocks, stream, &args);
  if (code != 0 || plan.parts == 1) return code;
  return launch(device, {Role::kTableSum, Math::kFloat32, 0}, ceil_div(plan.numbers, kTableThreads), stream, &args);
}

int launch_backward(const BackwardParams& b, const Device& device, void* stream, Workspace workspace) {
  const AttentionParams& p = b.forward;
  if (const int code = check(workspace, backward_workspace_bytes(b))) return code;
  if (hopper::takes(b, device)) return hopper::launch_backward(b, device, stream, static_cast<float*>(workspace.data));
  const int dim = dim_of(p);
  const Math math = math_of(p, is_decode(p));
  const bool plain = is_plain(p);
  const int64_t heads = p.batch * p.num_kv_heads;
  BackwardArgs args;
  args.b = b;
  args.factors = factors_of(p);
  args.aligned = aligned_of(b);
  args.delta = static_cast<float*>(workspace.data);

  int code = 0;
  if (!sums_delta(math)) {
    code = launch(device, {Role::kDelta, math, dim, false}, ceil_div(p.batch * p.num_heads * p.seqlen_q, kDeltaWarps),
                  stream, &args);
    if (code != 0) return code;
  }

  const int64_t row_tiles = ceil_div(num_rows(p), backward_tile(math, dim, plain, true).block_m);
  const int64_t key_tiles = ceil_div(p.seqlen_k, backward_tile(math, dim, plain, false).block_m);
  args.rows = rows_of(p, row_tiles);
  args.key_tiles = static_cast<int32_t>(key_tiles);
  const int64_t dq_blocks = heads * row_tiles, key_blocks = heads * key_tiles * (splits_dk_dv(math, dim) ? 2 : 1);
  const KernelName all{Role::kAllGradients, math, dim, plain};
  if (joins_gradients(all, dq_blocks, key_blocks, device)) {
    args.key_blocks = static_cast<int32_t>(key_blocks);
    code = launch(device, all, dq_blocks + key_blocks, stream, &args);
  } else {
    code = launch(device, {Role::kQueryGradient, math, dim, plain}, dq_blocks, stream, &args);
    if (code == 0) code = launch(device, {Role::kKeyGradients, math, dim, plain}, key_blocks, stream, &args);
  }
  if (code == 0 && b.d_sinks != nullptr) {
    code = launch(device, {Role::kSinkGradient, Math::kFloat32, 0}, p.num_heads, stream, &args);
  }
  if (code == 0 && b.d_relative_bias != nullptr) code = launch_table_gradient(args, device, stream);
  if (code != 0 || b.d_bias == nullptr) return code;

  const Tile bias_tile = score_gradient_tile(p);
  const int64_t* shape = b.d_bias_shape;
  const int64_t owners = shape[0] * shape[1] * (shape[2] == 1 ? 1 : ceil_div(shape[2], bias_tile.block_m)) *
                         (shape[3] == 1 ? 1 : ceil_div(shape[3], bias_tile.block_n));
  return launch(device, {Role::kBiasGradient, math, dim, false}, owners, stream, &args);
}

bool is_empty(const AttentionParams& p) { return p.batch == 0 || p.num_heads == 0; }

}  // namespace
}  // namespace attn_ops::cuda

using namespace attn_ops;

#define ATTN_OPS_EXPORT extern "C" __attribute__((visibility("default")))

ATTN_OPS_EXPORT uint64_t attn_ops_cuda_abi() {
  return static_cast<uint64_t>(sizeof(AttentionParams)) << 32 | sizeof(BackwardParams);
}

ATTN_OPS_EXPORT const char* attn_ops_cuda_unavailable_reason(int device) {
  const cuda::Device* found = cuda::find_device(device);
  return found != nullptr && cuda::load_kernels(*found) == 0 ? "" : cuda::error_text();
}

ATTN_OPS_EXPORT const char* attn_ops_cuda_unsupported_reason(const AttentionParams* p) {
  return cuda::keep(cuda::unsupported_reason(*p));
}

ATTN_OPS_EXPORT size_t attn_ops_cuda_forward_workspace_bytes(const AttentionParams* p) {
  if (cuda::is_empty(*p) || !cuda::unsupported_reason(*p).empty() || !cuda::is_decode(*p)) return 0;
  return cuda::DecodePlan(*p).workspace_bytes();
}

ATTN_OPS_EXPORT size_t attn_ops_cuda_backward_workspace_bytes(const BackwardParams* b) {
  return cuda::backward_workspace_bytes(*b);
}

ATTN_OPS_EXPORT int attn_ops_cuda_forward(const AttentionParams* p, void* stream, Workspace workspace) {
  if (cuda::is_empty(*p) || p->seqlen_q == 0) return 0;
  const cuda::StreamScope scope(stream);
  if (const int code = cuda::check(*p, scope)) return code;
  return cuda::is_decode(*p) ? cuda::launch_decode(*p, *scope.device(), stream, workspace)
                             : cuda::launch_forward(*p, *scope.device(), stream);
}

// Even of nothing at all, a bias may have a gradient: zeros.
ATTN_OPS_EXPORT int attn_ops_cuda_backward(const BackwardParams* b, void* stream, Workspace workspace) {
  const cuda::StreamScope scope(stream);
  if (const int code = cuda::check(b->forward, scope)) return code;
  return cuda::launch_backward(*b, *scope.device(), stream, workspace);
}

ATTN_OPS_EXPORT const char* attn_ops_cuda_error_text() { return cuda::error_text(); }

ATTN_OPS_EXPORT void attn_ops_cuda_set_most_decode_rows(int64_t rows) { cuda::most_decode_rows = rows; }
