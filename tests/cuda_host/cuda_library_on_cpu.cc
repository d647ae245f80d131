// csrc/cuda/library.h by the CPU's kernels, for a driver whose device memory is the host's: what is tested is who calls it.
#include <cstdlib>
#include <cstring>

#include "cuda/library.h"

using namespace attn_ops;

namespace {

const char* error = "";

int fail(const char* reason) {
  error = reason;
  return -1;
}

Threads one_thread() {
  return {1, nullptr, [](void*, int, void (*body)(void*, int), void* arg) { body(arg, 0); }};
}

AttentionParams on_cpu(AttentionParams p) {
  if (p.dropout_words != nullptr) p.dropout_seed = p.dropout_words[0], p.dropout_offset = p.dropout_words[1];
  return p;
}

BackwardParams on_cpu(BackwardParams p) {
  p.forward = on_cpu(p.forward);
  return p;
}

// What callers owe: a stream of their own, and memory that was asked for.
const char* broken(const AttentionParams& p, void* stream, Workspace workspace, size_t bytes) {
  if (stream == nullptr) return "there is no stream";
  if (workspace.bytes < bytes || reinterpret_cast<uintptr_t>(workspace.data) % 16 != 0) return "the workspace is wrong";
  if (p.dropout_rate > 0 && p.dropout_words == nullptr) return "the seed was read on the host";
  if (std::getenv("ATTN_OPS_TEST_FAIL") != nullptr) return "a test wants an error";
  return nullptr;
}

}  // namespace

extern "C" {

uint64_t attn_ops_cuda_abi() { return uint64_t{sizeof(AttentionParams)} << 32 | sizeof(BackwardParams); }
const char* attn_ops_cuda_unavailable_reason(int) { return ""; }
const char* attn_ops_cuda_unsupported_reason(const AttentionParams* p) {
  if (p->dtype == DType::kFloat64) return "float64 is not for GPUs";
  return p->head_dim > 256 || p->value_dim > 256 ? "head_dim and value_dim must be at most 256" : "";
}
size_t attn_ops_cuda_forward_workspace_bytes(const AttentionParams* p) {
  return cpu::forward_workspace_bytes(*p, 1) + 64;
}
size_t attn_ops_cuda_backward_workspace_bytes(const BackwardParams* p) {
  return cpu::backward_workspace_bytes(*p, 1) + 64;
}
int attn_ops_cuda_forward(const AttentionParams* p, void* stream, Workspace workspace) {
  const char* reason = broken(*p, stream, workspace, attn_ops_cuda_forward_workspace_bytes(p));
  if (reason != nullptr) return fail(reason);
  return cpu::forward(on_cpu(*p), one_thread(), workspace) ? 0 : fail("the CPU refuses");
}
int attn_ops_cuda_backward(const BackwardParams* p, void* stream, Workspace workspace) {
  const char* reason = broken(p->forward, stream, workspace, attn_ops_cuda_backward_workspace_bytes(p));
  if (reason != nullptr) return fail(reason);
  return cpu::backward(on_cpu(*p), one_thread(), workspace) ? 0 : fail("the CPU refuses");
}
const char* attn_ops_cuda_error_text() { return error; }

}  // extern "C"
