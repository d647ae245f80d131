// The platforms of XLA that there are custom calls for. An object is one execution's.
#pragma once

#include "cpu_kernels.h"
#include "cuda_kernels.h"
#include "heap_workspace.h"
#include "worker_pool.h"
#include "xla_frame.h"

namespace attn_ops::xla {

// XLA's intra-op threads, or our own where it has none.
class PoolThreads {
 public:
  explicit PoolThreads(const XLA_FFI_CallFrame& frame) : frame_(frame) {
    if (!count()) {
      count_ = available_cpus();
      scheduler_ = WorkerPool::with(count_ - 1).scheduler();
    }
  }
  Threads threads() { return lend(&scheduler_, count_); }

 private:
  // Whether there is a pool.
  bool count() {
    const XLA_FFI_Api& api = *frame_.api;
    // TensorFlow 2.18 and 2.19 do not tell how many threads there are: too many tasks only find nothing left to do.
    count_ = available_cpus();
    if (api.struct_size > offsetof(XLA_FFI_Api, XLA_FFI_ThreadPool_NumThreads)) {
      int64_t threads = 0;
      XLA_FFI_ThreadPool_NumThreads_Args args{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, frame_.ctx,
                                              &threads};
      if (XLA_FFI_Error* e = api.XLA_FFI_ThreadPool_NumThreads(&args)) {
        destroy(frame_.api, e);
        return false;
      }
      count_ = thread_count(threads);
    }
    scheduler_ = {this, [](void* self, Scheduler::Task task, void* arg) {
                    const XLA_FFI_CallFrame& frame = static_cast<PoolThreads*>(self)->frame_;
                    XLA_FFI_ThreadPool_Schedule_Args args{XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr,
                                                          frame.ctx, task, arg};
                    if (XLA_FFI_Error* e = frame.api->XLA_FFI_ThreadPool_Schedule(&args)) {
                      destroy(frame.api, e);
                      task(arg);
                    }
                  }};
    return true;
  }

  const XLA_FFI_CallFrame& frame_;
  int count_ = 1;
  Scheduler scheduler_;
};

class HostDevice {
 public:
  static constexpr Place kPlace = Place::kCpu;

  HostDevice(const XLA_FFI_CallFrame& frame, const std::optional<Workspace>&) : pool_(frame) {}
  CpuKernels kernels() { return CpuKernels(pool_.threads()); }
  HeapWorkspace workspace(size_t bytes) const { return HeapWorkspace(bytes); }

 private:
  PoolThreads pool_;
};

// What was lent, or memory of XLA's, given back when the kernels are launched: whoever gets it next is behind them in the
// stream.
class StreamWorkspace {
 public:
  StreamWorkspace(const XLA_FFI_CallFrame& frame, const std::optional<Workspace>& lent, size_t bytes)
      : frame_(frame), lent_(lent), bytes_(bytes) {
    if (lent.has_value() && lent->bytes < bytes) {
      throw std::invalid_argument("the result workspace has " + std::to_string(lent->bytes) + " bytes, of " +
                                  std::to_string(bytes) + " that the kernels need");
    }
    if (bytes == 0 || lent.has_value()) return;
    constexpr size_t kAlignment = 16;  // XLA refuses to promise more
    XLA_FFI_DeviceMemory_Allocate_Args args{
        XLA_FFI_DeviceMemory_Allocate_Args_STRUCT_SIZE, nullptr, frame.ctx, bytes, kAlignment, nullptr};
    if (XLA_FFI_Error* e = frame.api->XLA_FFI_DeviceMemory_Allocate(&args)) {
      destroy(frame.api, e);
      throw std::bad_alloc();
    }
    data_ = args.data;
  }
  ~StreamWorkspace() {
    if (data_ == nullptr) return;
    XLA_FFI_DeviceMemory_Free_Args args{XLA_FFI_DeviceMemory_Free_Args_STRUCT_SIZE, nullptr, frame_.ctx, bytes_, data_};
    if (XLA_FFI_Error* e = frame_.api->XLA_FFI_DeviceMemory_Free(&args)) destroy(frame_.api, e);
  }
  StreamWorkspace(const StreamWorkspace&) = delete;
  StreamWorkspace& operator=(const StreamWorkspace&) = delete;

  Workspace lend() const { return lent_.value_or(Workspace{data_, bytes_}); }

 private:
  const XLA_FFI_CallFrame& frame_;
  const std::optional<Workspace> lent_;
  size_t bytes_;
  void* data_ = nullptr;
};

class CudaDevice {
 public:
  static constexpr Place kPlace = Place::kGpu;

  CudaDevice(const XLA_FFI_CallFrame& frame, const std::optional<Workspace>& lent) : frame_(frame), lent_(lent) {
    XLA_FFI_Stream_Get_Args args{XLA_FFI_Stream_Get_Args_STRUCT_SIZE, nullptr, frame.ctx, nullptr};
    if (XLA_FFI_Error* e = frame.api->XLA_FFI_Stream_Get(&args)) {
      destroy(frame.api, e);
      throw std::runtime_error("XLA does not tell its CUDA stream");
    }
    stream_ = args.stream;
  }
  CudaKernels kernels() { return CudaKernels(stream_); }
  StreamWorkspace workspace(size_t bytes) const { return StreamWorkspace(frame_, lent_, bytes); }

 private:
  const XLA_FFI_CallFrame& frame_;
  const std::optional<Workspace> lent_;
  void* stream_ = nullptr;
};

}  // namespace attn_ops::xla
