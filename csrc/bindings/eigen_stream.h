// TensorFlow's CUDA stream. The C API has it only for pluggable devices, but OpKernelContext::eigen_device<GpuDevice>()
// has neither an absl nor a std type in its mangled name, and of Eigen's classes behind it only the first virtual
// function and the first field count here. The CPU's builds of TensorFlow have the symbol too, and give nothing.
#pragma once

#include <stdexcept>

namespace attn_ops {

struct EigenStream {
  virtual ~EigenStream() {}
  virtual void* const& stream() const = 0;  // a cudaStream_t, which is a CUstream
};

struct EigenGpuDevice {
  const EigenStream* stream;
  int max_blocks;
};

extern "C" const EigenGpuDevice* attn_ops_eigen_gpu_device(const void* op_kernel_context) __asm__(
    "_ZNK10tensorflow15OpKernelContext12eigen_deviceIN5Eigen9GpuDeviceEEERKT_v") __attribute__((weak));

// The stream that one execution of a kernel belongs to. There is no other to take in its place: it orders the work.
inline void* kernel_stream(const void* op_kernel_context) {
  const EigenGpuDevice* device =
      attn_ops_eigen_gpu_device == nullptr ? nullptr : attn_ops_eigen_gpu_device(op_kernel_context);
  if (device == nullptr || device->stream == nullptr) {
    throw std::runtime_error("TensorFlow does not tell its CUDA stream (OpKernelContext::eigen_device<GpuDevice>)");
  }
  return device->stream->stream();
}

}  // namespace attn_ops
