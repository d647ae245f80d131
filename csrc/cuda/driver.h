// The NVIDIA driver, found when it is first needed: devices, and kernels on their way to a stream. Nothing here throws, waits or
// allocates device memory, and everything may be called by any number of threads.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "kernel_names.h"

namespace attn_ops {
namespace cuda {

// Text for people, cut off where it does not fit.
class Text {
 public:
  __attribute__((format(printf, 2, 3))) const char* format(const char* pattern, ...) {
    va_list arguments;
    va_start(arguments, pattern);
    vsnprintf(text_, sizeof text_, pattern, arguments);
    va_end(arguments);
    return text_;
  }
  const char* c_str() const { return text_; }

 private:
  char text_[512] = "";
};

struct Device {
  int number = -1;
  int capability = 0;  // 9.0 is 90
  int multiprocessors = 0;
  int shared_bytes = 0;  // of one multiprocessor
  int image = -1;        // images.h
};

// Device `number`, or below 0 that of the thread's current context. Null where kernels cannot run, and why.
const Device* find_device(int number, Text* reason);

// Why the kernels for this device cannot be loaded; null when they are.
const char* load_kernels(const Device&, Text* reason);

// What of a launch is not in the kernel's name.
struct Grid {
  int64_t blocks;  // at most kMostBlocks
  int threads, shared_bytes;
};
constexpr int64_t kMostBlocks = 0x7fffffff;

// Launches on the device, which must be that of the current context. 0, or a CUresult and what failed.
int launch(const Device&, const KernelName&, const Grid&, const void* args, void* stream, Text* error);

}  // namespace cuda
}  // namespace attn_ops
