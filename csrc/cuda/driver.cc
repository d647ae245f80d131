#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <mutex>

#include "images.h"

namespace attn_ops {
namespace cuda {
namespace {

// ---------------------------------------------------------------------------------------------- the driver's functions

using Library = struct CUlib_st*;
using Kernel = struct CUkern_st*;

constexpr int kInvalidContext = 201;

enum DeviceAttribute {
  kMultiprocessors = 16,
  kCapabilityMajor = 75,
  kCapabilityMinor = 76,
  kSharedBytesOfMultiprocessor = 81,
};
constexpr int kMaxDynamicSharedBytes = 8;  // an attribute of kernels
constexpr int kSharedBytesWithoutAsking = 48 * 1024;

struct Functions {
  int (*init)(unsigned flags);
  int (*driver_version)(int* version);
  int (*error_string)(int error, const char** text);
  int (*current_device)(int* device);
  int (*device_get)(int* device, int ordinal);
  int (*device_attribute)(int* value, int attribute, int device);
  int (*library_load)(Library*, const void* code, void* jit_options, void* jit_values, unsigned num_jit_options,
                      void* options, void* values, unsigned num_options);
  int (*library_kernel)(Kernel*, Library, const char* name);
  int (*kernel_set_attribute)(int attribute, int value, Kernel, int device);
  int (*launch_kernel)(Kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                       unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra);
};

class Driver {
 public:
  Driver() {
    // A test's own driver, or one that lies where nothing looks for it.
    const char* named = getenv("ATTN_OPS_CUDA_DRIVER");
    const char* name = named != nullptr && *named ? named : "libcuda.so.1";
    void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* error = dlerror();
      reason_.format("there is no NVIDIA driver: %s", error != nullptr ? error : name);
      return;
    }
    if (find(library, name, "cuInit", &f_.init) && find(library, name, "cuDriverGetVersion", &f_.driver_version) &&
        find(library, name, "cuGetErrorString", &f_.error_string) &&
        find(library, name, "cuCtxGetDevice", &f_.current_device) &&
        find(library, name, "cuDeviceGet", &f_.device_get) &&
        find(library, name, "cuDeviceGetAttribute", &f_.device_attribute) &&
        find(library, name, "cuLibraryLoadData", &f_.library_load) &&
        find(library, name, "cuLibraryGetKernel", &f_.library_kernel) &&
        find(library, name, "cuKernelSetAttribute", &f_.kernel_set_attribute) &&
        find(library, name, "cuLaunchKernel", &f_.launch_kernel)) {
      if (const int error = f_.init(0)) reason_.format("the NVIDIA driver does not start: %s", text(error));
      else usable_ = true;
    }
  }

  const Functions* operator->() const { return &f_; }
  bool usable() const { return usable_; }
  const char* reason() const { return reason_.c_str(); }

  const char* text(int error) const {
    const char* text = nullptr;
    return f_.error_string(error, &text) == 0 && text != nullptr ? text : "unknown error";
  }

 private:
  template <class Function>
  bool find(void* library, const char* name, const char* symbol, Function* function) {
    *function = reinterpret_cast<Function>(dlsym(library, symbol));
    if (*function == nullptr)
      reason_.format("the NVIDIA driver (%s) has no %s: version 525 or newer is needed", name, symbol);
    return *function != nullptr;
  }

  Functions f_{};
  Text reason_;
  bool usable_ = false;
};

// Never closed: kernels may run until the process ends.
const Driver& driver() {
  static const Driver* const driver = new Driver;
  return *driver;
}

// ---------------------------------------------------------------------------------------------- devices

constexpr int kMostDevices = 64;

struct KnownDevice {
  std::atomic<bool> known{false};
  Device device;
};
KnownDevice devices[kMostDevices];
std::mutex devices_mutex;

// ---------------------------------------------------------------------------------------------- kernels

// An image as the driver has loaded it: for all devices, and never unloaded.
struct LoadedImage {
  std::atomic<Library> library{nullptr};
  std::atomic<Kernel> kernels[kNumKernelNames] = {};
};
LoadedImage loaded[kMostImages];
std::mutex loading;

// Whether a kernel may use the shared memory it needs. To allow it twice does no harm.
std::atomic<bool> allowed[kMostDevices][kNumKernelNames];

int load(const Device& d, Library* library, Text* error) {
  LoadedImage& own = loaded[d.image];
  *library = own.library.load(std::memory_order_acquire);
  if (*library != nullptr) return 0;
  const std::lock_guard<std::mutex> lock(loading);
  *library = own.library.load(std::memory_order_relaxed);
  if (*library != nullptr) return 0;
  if (const int code = driver()->library_load(library, image(d.image).data, nullptr, nullptr, 0, nullptr, nullptr, 0)) {
    int version = 0;
    driver()->driver_version(&version);
    error->format("the driver (for CUDA %d.%d) does not load the kernels for %s: %s (CUresult %d)", version / 1000,
                  version % 1000 / 10, image(d.image).architecture, driver().text(code), code);
    return code;
  }
  own.library.store(*library, std::memory_order_release);
  return 0;
}

int find_kernel(const Device& d, const KernelName& name, Kernel* kernel, Text* error) {
  std::atomic<Kernel>& known = loaded[d.image].kernels[name.index()];
  *kernel = known.load(std::memory_order_acquire);
  if (*kernel != nullptr) return 0;
  Library library;
  if (const int code = load(d, &library, error)) return code;
  const KernelText text(name);
  if (const int code = driver()->library_kernel(kernel, library, text.text)) {
    error->format("the kernels for %s have no %s: %s (CUresult %d)", image(d.image).architecture, text.text,
                  driver().text(code), code);
    return code;
  }
  known.store(*kernel, std::memory_order_release);
  return 0;
}

}  // namespace

const Device* find_device(int number, Text* reason) {
  const Driver& driver = cuda::driver();
  if (!driver.usable()) return reason->format("%s", driver.reason()), nullptr;
  int device = -1;
  if (const int error = number < 0 ? driver->current_device(&device) : driver->device_get(&device, number)) {
    if (number >= 0) reason->format("there is no CUDA device %d: %s", number, driver.text(error));
    else if (error == kInvalidContext) reason->format("no CUDA context is current on this thread");
    else reason->format("the current CUDA context tells no device: %s", driver.text(error));
    return nullptr;
  }
  if (device < 0 || device >= kMostDevices) {
    return reason->format("CUDA device %d is not among the first %d", device, kMostDevices), nullptr;
  }

  KnownDevice& entry = devices[device];
  if (!entry.known.load(std::memory_order_acquire)) {
    Device d;
    d.number = device;
    int major = 0, minor = 0;
    const auto ask = [&](int attribute, int* value) { return driver->device_attribute(value, attribute, device); };
    int error = ask(kCapabilityMajor, &major);
    if (!error) error = ask(kCapabilityMinor, &minor);
    if (!error) error = ask(kMultiprocessors, &d.multiprocessors);
    if (!error) error = ask(kSharedBytesOfMultiprocessor, &d.shared_bytes);
    if (error) return reason->format("CUDA device %d does not tell what it is: %s", device, driver.text(error)), nullptr;
    d.capability = 10 * major + minor;
    d.image = image_for(d.capability);
    const std::lock_guard<std::mutex> lock(devices_mutex);
    if (!entry.known.load(std::memory_order_relaxed)) entry.device = d;
    entry.known.store(true, std::memory_order_release);
  }
  const Device& d = entry.device;
  if (d.image >= 0) return &d;
  const int major = d.capability / 10, minor = d.capability % 10;
  if (d.capability < kLeastCapability) {
    reason->format("CUDA device %d has compute capability %d.%d; the kernels need 8.0 (Ampere) or newer", device, major,
                   minor);
  } else {
    reason->format("CUDA device %d has compute capability %d.%d, for which this library was built without kernels",
                   device, major, minor);
  }
  return nullptr;
}

const char* load_kernels(const Device& d, Text* reason) {
  Library library;
  return load(d, &library, reason) ? reason->c_str() : nullptr;
}

int launch(const Device& d, const KernelName& name, const Grid& grid, const void* args, void* stream, Text* error) {
  Kernel kernel;
  if (const int code = find_kernel(d, name, &kernel, error)) return code;
  const char* what = "launched";
  int code = 0;
  std::atomic<bool>& is_allowed = allowed[d.number][name.index()];
  if (grid.shared_bytes > kSharedBytesWithoutAsking && !is_allowed.load(std::memory_order_relaxed)) {
    what = "given its shared memory";
    code = driver()->kernel_set_attribute(kMaxDynamicSharedBytes, grid.shared_bytes, kernel, d.number);
    if (!code) is_allowed.store(true, std::memory_order_relaxed);
  }
  if (!code) {
    what = "launched";
    void* parameters[] = {const_cast<void*>(args)};
    code = driver()->launch_kernel(kernel, static_cast<unsigned>(grid.blocks), 1, 1,
                                   static_cast<unsigned>(grid.threads), 1, 1, static_cast<unsigned>(grid.shared_bytes),
                                   stream, parameters, nullptr);
  }
  if (code) {
    error->format("%s (%lld blocks of %d threads, %d bytes of shared memory each) could not be %s on CUDA device %d: %s "
                  "(CUresult %d)", KernelText(name).text, static_cast<long long>(grid.blocks), grid.threads,
                  grid.shared_bytes, what, d.number, driver().text(code), code);
  }
  return code;
}

}  // namespace cuda
}  // namespace attn_ops
