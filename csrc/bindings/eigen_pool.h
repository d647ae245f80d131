// TensorFlow's intra-op threads. The C API has no way to them, but OpKernelContext::eigen_device<ThreadPoolDevice>()
// has neither an absl nor a std type in its mangled name, and Eigen's classes behind it have kept their layout in
// every TensorFlow from 2.16 to 2.22. They are mirrored here; the symbol is weak, so its loss costs only the pool.
#pragma once

#include <cstdlib>
#include <functional>

#include "worker_pool.h"

namespace attn_ops {

struct EigenPool {
  virtual void Schedule(std::function<void()> task) = 0;
  virtual void ScheduleWithHint(std::function<void()> task, int start, int limit) = 0;
  virtual void Cancel() = 0;
  virtual int NumThreads() const = 0;
  virtual int CurrentThreadId() const = 0;
  virtual ~EigenPool() {}
};

struct EigenDevice {
  EigenPool* pool;
  int num_threads;
  void* allocator;
};

extern "C" const EigenDevice* attn_ops_eigen_device(const void* op_kernel_context) __asm__(
    "_ZNK10tensorflow15OpKernelContext12eigen_deviceIN5Eigen16ThreadPoolDeviceEEERKT_v") __attribute__((weak));

// The threads for one execution of a kernel: TensorFlow's, or our own where there are none (or where the environment
// variable ATTN_OPS_DISABLE_TF_POOL is set, for tests and as a way out).
class KernelThreads {
 public:
  explicit KernelThreads(const void* op_kernel_context) {
    static const bool disabled = std::getenv("ATTN_OPS_DISABLE_TF_POOL") != nullptr;
    const EigenDevice* device =
        attn_ops_eigen_device == nullptr || disabled ? nullptr : attn_ops_eigen_device(op_kernel_context);
    if (device != nullptr && device->pool != nullptr) {
      count_ = thread_count(device->num_threads);
      scheduler_ = {device->pool, [](void* pool, Scheduler::Task task, void* arg) {
                      static_cast<EigenPool*>(pool)->Schedule([task, arg] { task(arg); });
                    }};
    } else {
      count_ = available_cpus();
      scheduler_ = WorkerPool::with(count_ - 1).scheduler();
    }
  }

  Threads threads() { return lend(&scheduler_, count_); }

 private:
  int count_;
  Scheduler scheduler_;
};

}  // namespace attn_ops
