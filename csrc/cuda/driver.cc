#include "driver.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include "images.h"

namespace attn_ops {
namespace cuda {
namespace {

// Of the driver's interface (CUDA 12.0, driver 525, and up), what is used here.
using Handle = void*;
enum : int {
  kMultiprocessors = 16,
  kCapabilityMajor = 75,
  kCapabilityMinor = 76,
  kSharedBytesPerMultiprocessor = 81,
  kMaxDynamicSharedBytes = 8,  // of a kernel
};

struct Driver {
  std::string reason;
  int (*init)(unsigned);
  int (*current_device)(int*);
  int (*device)(int*, int);
  int (*attribute)(int*, int, int);
  int (*load)(Handle*, const void*, void*, void*, unsigned, void*, void*, unsigned);
  int (*kernel)(Handle*, Handle, const char*);
  int (*set_attribute)(int, int, Handle, int);
  int (*launch)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**, void**);
  int (*error_string)(int, const char**);

  Driver() {
    const char* named = std::getenv("ATTN_OPS_CUDA_DRIVER");
    const char* name = named != nullptr && *named != '\0' ? named : "libcuda.so.1";
    void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      reason = std::string("there is no CUDA driver (") + dlerror() + ")";
      return;
    }
    const auto find = [&](auto* function, const char* symbol) {
      *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, symbol));
      if (*function == nullptr && reason.empty()) {
        reason = std::string("the CUDA driver ") + name + " has no " + symbol + ": 525 or newer is needed";
      }
    };
    find(&init, "cuInit");
    find(&current_device, "cuCtxGetDevice");
    find(&device, "cuDeviceGet");
    find(&attribute, "cuDeviceGetAttribute");
    find(&load, "cuLibraryLoadData");
    find(&kernel, "cuLibraryGetKernel");
    find(&set_attribute, "cuKernelSetAttribute");
    find(&launch, "cuLaunchKernel");
    find(&error_string, "cuGetErrorString");
    if (!reason.empty()) return;
    if (const int code = init(0)) reason = "the CUDA driver cannot be used: " + explain(code);
  }

  std::string explain(int code) const {
    const char* text = nullptr;
    error_string(code, &text);
    return std::string(text != nullptr ? text : "unknown error") + " (CUresult " + std::to_string(code) + ")";
  }
};

// Never destroyed: launches may come from threads that outlive main().
const Driver& driver() {
  static const Driver* result = new Driver;
  return *result;
}

constexpr const char* kNeeded = "the kernels need compute capability 8.0 or newer (Ampere)";

const Image* image_for(const Device& device) {
  switch (device.major) {
    case 8: return &kImages[0];
    case 9: return &kImages[1];
    case 10: return &kImages[2];
    case 12: return &kImages[3];
    default: return &kImages[4];
  }
}

// What has been loaded in this process. A library of kernels belongs to no context: it is loaded once for all devices.
struct Loaded {
  std::mutex mutex;
  std::map<int, Device> devices;
  std::map<const Image*, Handle> libraries;
  std::map<std::pair<const Image*, std::string>, Handle> kernels;
  std::map<std::pair<Handle, int>, int> shared_bytes;  // allowed for a kernel on a device
};

Loaded& loaded() {
  static Loaded* result = new Loaded;
  return *result;
}

int failed(int code, const char* what) { return fail(code, "%s: %s", what, driver().explain(code).c_str()); }

// The kernel, ready to be launched on the device. `mutex` is held.
int find_kernel(Loaded& all, const Device& device, const char* name, int shared_bytes, Handle* kernel) {
  const Image* image = image_for(device);
  Handle& library = all.libraries[image];
  if (library == nullptr) {
    if (const int code = driver().load(&library, image->begin, nullptr, nullptr, 0, nullptr, nullptr, 0)) {
      library = nullptr;
      return failed(code, (std::string("loading the kernels for ") + image->name).c_str());
    }
  }
  Handle& found = all.kernels[{image, name}];
  if (found == nullptr) {
    if (const int code = driver().kernel(&found, library, name)) {
      found = nullptr;
      return failed(code, (std::string("looking for the kernel ") + name).c_str());
    }
  }
  int& allowed = all.shared_bytes[{found, device.ordinal}];
  if (shared_bytes > allowed) {
    if (const int code = driver().set_attribute(kMaxDynamicSharedBytes, shared_bytes, found, device.ordinal)) {
      return failed(code, (std::string("giving shared memory to ") + name).c_str());
    }
    allowed = shared_bytes;
  }
  *kernel = found;
  return 0;
}

thread_local char last_error[512] = "";

}  // namespace

int fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return code;
}

const char* error_text() { return last_error; }

const char* driver_reason() { return driver().reason.c_str(); }

const Device* find_device(int ordinal) {
  if (*driver_reason() != '\0') {
    fail(kNoDevice, "%s", driver_reason());
    return nullptr;
  }
  const Driver& cuda = driver();
  int device = 0;
  if (ordinal < 0) {
    if (const int code = cuda.current_device(&device)) {
      failed(code, "asking for the device of the current context");
      return nullptr;
    }
  } else if (const int code = cuda.device(&device, ordinal)) {
    fail(code, "there is no CUDA device %d: %s", ordinal, cuda.explain(code).c_str());
    return nullptr;
  }
  Loaded& all = loaded();
  const std::lock_guard<std::mutex> lock(all.mutex);
  Device& found = all.devices[device];
  if (found.major == 0) {
    Device fresh;
    fresh.ordinal = device;
    int code = cuda.attribute(&fresh.minor, kCapabilityMinor, device);
    if (code == 0) code = cuda.attribute(&fresh.multiprocessors, kMultiprocessors, device);
    if (code == 0) code = cuda.attribute(&fresh.shared_bytes, kSharedBytesPerMultiprocessor, device);
    if (code == 0) code = cuda.attribute(&fresh.major, kCapabilityMajor, device);
    if (code != 0) {
      failed(code, "asking for the attributes of a device");
      return nullptr;
    }
    found = fresh;
  }
  if (found.major < 8) {
    fail(kNoDevice, "CUDA device %d has compute capability %d.%d: %s", device, found.major, found.minor, kNeeded);
    return nullptr;
  }
  return &found;
}

int launch(const Device& device, const char* name, int64_t blocks, int threads, int shared_bytes, void* stream,
           void* args) {
  if (blocks <= 0) return 0;
  if (blocks > INT32_MAX) {
    return fail(kUnsupported, "%s: %lld blocks are more than one launch can have (2^31 - 1)", name,
                static_cast<long long>(blocks));
  }
  Handle kernel = nullptr;
  {
    Loaded& all = loaded();
    const std::lock_guard<std::mutex> lock(all.mutex);
    if (const int code = find_kernel(all, device, name, shared_bytes, &kernel)) return code;
  }
  void* parameters[] = {args};
  const int code = driver().launch(kernel, static_cast<unsigned>(blocks), 1, 1, threads, 1, 1, shared_bytes, stream,
                                   parameters, nullptr);
  if (code == 0) return 0;
  return fail(code, "launching %s (%lld blocks of %d threads, %d bytes of shared memory): %s", name,
              static_cast<long long>(blocks), threads, shared_bytes, driver().explain(code).c_str());
}

}  // namespace cuda
}  // namespace attn_ops
