// The C interface of libattn_ops_cuda.so: attention on NVIDIA GPUs, for any framework. Nothing of CUDA is needed to
// link or load it; the driver is looked for at the first call.
//
// Arrays are in the memory of the stream's device, lengths and dropout words as well: the one of the context that the
// stream belongs to, or of the thread's current context where it is a default stream. Calls only launch: they never
// wait, copy or allocate, and may be captured into a CUDA graph, to be replayed with the arrays and the workspace that
// they were captured with. What first launches have to load is loaded in a capture as well; drivers before CUDA 12.3
// cannot, and attn_ops_cuda_unavailable_reason(-1) must have been asked before, on each device.
#pragma once

#include "../attention.h"

extern "C" {

// sizeof(AttentionParams) << 32 | sizeof(BackwardParams) of the library: a caller built from other headers must not
// call.
uint64_t attn_ops_cuda_abi();

// Why nothing can be run here, "" when it can: no driver, or the device of the current context (`device` < 0), or
// device number `device`, is none that the library has kernels for.
const char* attn_ops_cuda_unavailable_reason(int device);

// Why the kernels do not take this call (its dtype, its head dimensions, its extents); "" when they do. The composite
// does, then. Needs no driver.
const char* attn_ops_cuda_unsupported_reason(const attn_ops::AttentionParams*);

// Bytes of workspace the functions below must be lent (16-byte aligned, on the device, for the time of the kernels). By
// the extents and options of a call alone, whatever device it is for.
size_t attn_ops_cuda_forward_workspace_bytes(const attn_ops::AttentionParams*);
size_t attn_ops_cuda_backward_workspace_bytes(const attn_ops::BackwardParams*);

// Launches on `stream` (a CUstream). 0, or an error code that attn_ops_cuda_error_text explains: CUresult of the
// driver, or negative for what the library itself refuses.
int attn_ops_cuda_forward(const attn_ops::AttentionParams*, void* stream, attn_ops::Workspace);
int attn_ops_cuda_backward(const attn_ops::BackwardParams*, void* stream, attn_ops::Workspace);

// What the last error of this thread was, with the kernel and what was asked of it.
const char* attn_ops_cuda_error_text();

// Up to how many query rows of a key/value head are decoded: 64 at first. For measurements and tests, of both kernels.
void attn_ops_cuda_set_most_decode_rows(int64_t rows);

}  // extern "C"
