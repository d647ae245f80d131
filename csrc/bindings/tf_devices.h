// The devices of TensorFlow that the operators have kernels for. An object is one execution's.
#pragma once

#include "call.h"
#include "cpu_kernels.h"
#include "cuda_kernels.h"
#include "eigen_pool.h"
#include "eigen_stream.h"

namespace attn_ops::tf {

class CpuDevice {
 public:
  static constexpr const char* kType = "CPU";
  static constexpr Place kPlace = Place::kCpu;

  explicit CpuDevice(const void* op_kernel_context) : pool_(op_kernel_context) {}
  CpuKernels kernels() { return CpuKernels(pool_.threads()); }

 private:
  KernelThreads pool_;
};

class GpuDevice {
 public:
  static constexpr const char* kType = "GPU";
  static constexpr Place kPlace = Place::kGpu;

  explicit GpuDevice(const void* op_kernel_context) : stream_(kernel_stream(op_kernel_context)) {}
  CudaKernels kernels() { return CudaKernels(stream_); }

 private:
  void* stream_;
};

}  // namespace attn_ops::tf
