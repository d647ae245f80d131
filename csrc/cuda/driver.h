// The CUDA driver, found when it is first needed: nothing of CUDA is linked, so the library loads everywhere.
// Thread-safe, and without exceptions; once a kernel is known, a launch takes no lock and no memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernel_names.h"

namespace attn_ops::cuda {

struct Device {
  int ordinal = 0, major = 0, minor = 0;
  int multiprocessors = 0;
  int shared_bytes = 0, block_shared_bytes = 0;  // of a multiprocessor; that one block may ask for
  int image = -1;  // images.h
  int hopper_image = -1;  // where there is memory for it, and the driver can tell the copy engine of arrays
};

// Codes of our own, beside the driver's CUresult (which are positive).
enum Error : int { kNoDevice = -1, kUnsupported = -2, kWorkspace = -3 };

// Device number `ordinal`, or with -1 that of the thread's current context. Null when it cannot be had, or has none of
// our kernels: the reason is then in error_text().
const Device* find_device(int ordinal);

// While it lives, the context that a stream belongs to is the thread's current one: launches go where the stream is,
// whatever the caller has current. The default streams (null, legacy, per thread) are those of the current context.
class StreamScope {
 public:
  explicit StreamScope(void* stream);
  ~StreamScope();
  StreamScope(const StreamScope&) = delete;
  StreamScope& operator=(const StreamScope&) = delete;

  // As find_device() has it.
  const Device* device() const { return device_; }

 private:
  const Device* device_ = nullptr;
  bool pushed_ = false;
};

// Loads the kernels for this device, which only the driver knows whether it can. All of them, where the driver could not
// later, in a capture, and the device's context is current. 0 or an error code.
int load_kernels(const Device&);

// Launches `blocks` of `threads` of the kernel; `args` is its one parameter. 0 or an error code.
int launch(const Device&, const KernelName&, int64_t blocks, int threads, int shared_bytes, void* stream, void* args);

// Tells the copy engine (hopper/args.h) of an array of 4 dimensions of 16-bit elements, the first one dense; stride[i]
// is that of dimension i + 1, in bytes. Panels of 128 bytes are swizzled. 0 or an error code.
int encode_tensor_map(void* map, void* data, const uint64_t (&extent)[4], const uint64_t (&stride)[3],
                      const uint32_t (&box)[4]);

// The last error of this thread, for people.
int fail(int code, const char* format, ...) __attribute__((format(printf, 2, 3)));
const char* error_text();

}  // namespace attn_ops::cuda
