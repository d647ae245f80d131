// The devices of TensorFlow that the operators have kernels for. An object is one execution's.
#pragma once

#include "call.h"
#include "cpu_kernels.h"
#include "cuda_kernels.h"
#include "eigen_pool.h"
#include "eigen_stream.h"
#include "tf_capi.h"

namespace attn_ops::tf {

// Memory of TensorFlow's, on the device or in that of the host.
class Scratch {
 public:
  Scratch(TF_OpKernelContext* context, size_t bytes, bool on_host) : bytes_(bytes) {
    if (bytes > 0) tensor_ = Execution(context).temporary(bytes + kAlignment, on_host);
  }
  Workspace lend() const {
    if (tensor_ == nullptr) return {};
    const uintptr_t address = reinterpret_cast<uintptr_t>(TF_TensorData(tensor_.get()));
    return {reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment), bytes_};
  }

 private:
  static constexpr size_t kAlignment = 64;
  size_t bytes_;
  Tensor tensor_;
};

class CpuDevice {
 public:
  static constexpr const char* kType = "CPU";
  static constexpr Place kPlace = Place::kCpu;

  explicit CpuDevice(TF_OpKernelContext* context) : context_(context), pool_(context) {}
  CpuKernels kernels() { return CpuKernels(pool_.threads()); }
  Scratch workspace(size_t bytes) const { return Scratch(context_, bytes, true); }

 private:
  TF_OpKernelContext* context_;
  KernelThreads pool_;
};

class GpuDevice {
 public:
  static constexpr const char* kType = "GPU";
  static constexpr Place kPlace = Place::kGpu;

  explicit GpuDevice(TF_OpKernelContext* context) : context_(context), stream_(kernel_stream(context)) {}
  CudaKernels kernels() { return CudaKernels(stream_); }
  Scratch workspace(size_t bytes) const { return Scratch(context_, bytes, false); }

 private:
  TF_OpKernelContext* context_;
  void* stream_;
};

}  // namespace attn_ops::tf
