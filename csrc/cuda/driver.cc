#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "hopper/config.h"
#include "images.h"

namespace attn_ops::cuda {
namespace {

struct Text {
  char data[512] = "";

  void format(const char* pattern, ...) __attribute__((format(printf, 2, 3))) {
    va_list arguments;
    va_start(arguments, pattern);
    vsnprintf(data, sizeof data, pattern, arguments);
    va_end(arguments);
  }
};

thread_local Text last_error;

// ---------------------------------------------------------------------------------------------- the driver's functions

// Of the driver's interface (CUDA 12.0, driver 525, and up), what is used here.
using Library = struct CUlib_st*;
using Kernel = struct CUkern_st*;

constexpr int kInvalidContext = 201, kNotFound = 500, kNotSupported = 801;
constexpr int kRelaxedCapture = 2;             // a CUstreamCaptureMode
constexpr int kLoadsKernelsInCapture = 12030;  // drivers of this version and later

enum DeviceAttribute {
  kMultiprocessors = 16,
  kCapabilityMajor = 75,
  kCapabilityMinor = 76,
  kSharedBytesPerMultiprocessor = 81,
  kSharedBytesPerBlock = 97,  // with asking: MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
};
constexpr int kMaxDynamicSharedBytes = 8;  // an attribute of kernels
constexpr int kSharedBytesWithoutAsking = 48 * 1024;

struct Driver {
  Text reason;  // why it cannot be used
  int (*init)(unsigned flags);
  int (*version)(int* version);
  int (*error_string)(int code, const char** text);
  int (*current_device)(int* device);
  int (*current_context)(void** context);
  int (*push_context)(void* context);
  int (*pop_context)(void** context);
  int (*stream_context)(void* stream, void** context);
  int (*device)(int* device, int ordinal);
  int (*attribute)(int* value, int attribute, int device);
  int (*load)(Library*, const void* image, void* jit_options, void* jit_values, unsigned num_jit_options, void* options,
              void* values, unsigned num_options);
  int (*kernel)(Kernel*, Library, const char* name);
  int (*function)(void** function, Kernel);
  int (*exchange_capture_mode)(int* mode);
  int (*set_attribute)(int attribute, int value, Kernel, int device);
  int (*launch)(Kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra);
  int (*encode)(void* map, int type, uint32_t rank, void* data, const uint64_t* extent, const uint64_t* stride,
                const uint32_t* box, const uint32_t* step, int interleave, int swizzle, int promotion, int outside);

  Driver() {
    // A test's own driver, or one that lies where nothing looks for it.
    const char* named = getenv("ATTN_OPS_CUDA_DRIVER");
    const char* name = named != nullptr && *named ? named : "libcuda.so.1";
    void* library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* error = dlerror();
      reason.format("there is no CUDA driver (%s)", error != nullptr ? error : name);
      return;
    }
    const auto find = [&](auto* function, const char* symbol) {
      *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, symbol));
      if (*function == nullptr && usable())
        reason.format("the CUDA driver %s has no %s: 525 or newer is needed", name, symbol);
    };
    find(&init, "cuInit");
    find(&version, "cuDriverGetVersion");
    find(&error_string, "cuGetErrorString");
    find(&current_device, "cuCtxGetDevice");
    find(&current_context, "cuCtxGetCurrent");
    find(&push_context, "cuCtxPushCurrent_v2");
    find(&pop_context, "cuCtxPopCurrent_v2");
    find(&stream_context, "cuStreamGetCtx");
    find(&device, "cuDeviceGet");
    find(&attribute, "cuDeviceGetAttribute");
    find(&load, "cuLibraryLoadData");
    find(&kernel, "cuLibraryGetKernel");
    find(&function, "cuKernelGetFunction");
    find(&exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
    find(&set_attribute, "cuKernelSetAttribute");
    find(&launch, "cuLaunchKernel");
    encode = reinterpret_cast<decltype(encode)>(dlsym(library, "cuTensorMapEncodeTiled"));  // of Hopper alone
    if (!usable()) return;
    if (const int code = init(0))
      reason.format("the CUDA driver cannot be used: %s (CUresult %d)", explain(code), code);
  }

  bool usable() const { return *reason.data == '\0'; }

  const char* explain(int code) const {
    const char* text = nullptr;
    return error_string(code, &text) == 0 && text != nullptr ? text : "unknown error";
  }
};

// Never destroyed: launches may come from threads that outlive main().
const Driver& driver() {
  static const Driver* const result = new Driver;
  return *result;
}

// ---------------------------------------------------------------------------------------------- what is known already

constexpr int kMostDevices = 64;

struct KnownDevice {
  std::atomic<bool> known{false};
  Device device;
};
KnownDevice devices[kMostDevices];

// An image as the driver has loaded it: for all devices, and never unloaded.
struct LoadedImage {
  std::atomic<Library> library{nullptr};
  std::atomic<Kernel> kernels[kNumKernelNames] = {};
};
LoadedImage loaded[kMostImages];

// Whether a kernel may use the shared memory that it needs. To allow it twice does no harm.
std::atomic<bool> allowed[kMostDevices][kNumKernelNames];

std::mutex mutex;  // held while one of them is made

// While it lives, this thread may load what a stream needs that is being captured into a graph. Nothing of it becomes
// part of the graph: it is not in order with the stream.
class AllowedInCapture {
 public:
  AllowedInCapture() { driver().exchange_capture_mode(&mode_); }
  ~AllowedInCapture() { driver().exchange_capture_mode(&mode_); }
  AllowedInCapture(const AllowedInCapture&) = delete;
  AllowedInCapture& operator=(const AllowedInCapture&) = delete;

 private:
  int mode_ = kRelaxedCapture;
};

int load(int number, Library* library) {
  std::atomic<Library>& known = loaded[number].library;
  *library = known.load(std::memory_order_acquire);
  if (*library != nullptr) return 0;
  const std::lock_guard<std::mutex> lock(mutex);
  *library = known.load(std::memory_order_relaxed);
  if (*library != nullptr) return 0;
  const Image& image = cuda::image(number);
  const AllowedInCapture allowed;
  if (const int code = driver().load(library, image.data, nullptr, nullptr, 0, nullptr, nullptr, 0)) {
    int version = 0;
    driver().version(&version);
    return fail(code, "loading the kernels for %s, with a driver for CUDA %d.%d: %s (CUresult %d)", image.name,
                version / 1000, version % 1000 / 10, driver().explain(code), code);
  }
  known.store(*library, std::memory_order_release);
  return 0;
}

int image_of(const Device& device, const KernelName& name) { return name.hopper ? device.hopper_image : device.image; }

int find_kernel(const Device& device, const KernelName& name, Kernel* kernel) {
  const int image = image_of(device, name);
  std::atomic<Kernel>& known = loaded[image].kernels[name.index()];
  *kernel = known.load(std::memory_order_acquire);
  if (*kernel != nullptr) return 0;
  Library library;
  if (const int code = load(image, &library)) return code;
  const KernelText text(name);
  const AllowedInCapture allowed;
  if (const int code = driver().kernel(kernel, library, text.data)) {
    return fail(code, "looking for the kernel %s: %s (CUresult %d)", text.data, driver().explain(code), code);
  }
  known.store(*kernel, std::memory_order_release);
  return 0;
}

int allow_shared_memory(const Device& device, const KernelName& name, Kernel kernel, int bytes) {
  std::atomic<bool>& is_allowed = allowed[device.ordinal][name.index()];
  if (bytes <= kSharedBytesWithoutAsking || is_allowed.load(std::memory_order_relaxed)) return 0;
  const AllowedInCapture while_set;
  if (const int code = driver().set_attribute(kMaxDynamicSharedBytes, bytes, kernel, device.ordinal)) {
    return fail(code, "giving shared memory to %s (%d bytes): %s (CUresult %d)", KernelText(name).data, bytes,
                driver().explain(code), code);
  }
  is_allowed.store(true, std::memory_order_relaxed);
  return 0;
}

// 0 or a CUresult.
int ask(int ordinal, Device* device) {
  device->ordinal = ordinal;
  const auto attribute = [=](int which, int* value) { return driver().attribute(value, which, ordinal); };
  int code = attribute(kCapabilityMajor, &device->major);
  if (code == 0) code = attribute(kCapabilityMinor, &device->minor);
  if (code == 0) code = attribute(kMultiprocessors, &device->multiprocessors);
  if (code == 0) code = attribute(kSharedBytesPerMultiprocessor, &device->shared_bytes);
  if (code == 0) code = attribute(kSharedBytesPerBlock, &device->block_shared_bytes);
  const int capability = 10 * device->major + device->minor;
  device->image = image_for(capability);
  if (driver().encode != nullptr && device->block_shared_bytes >= hopper::kMostSharedBytes) {
    device->hopper_image = hopper_image_for(capability);
  }
  return code;
}

}  // namespace

int fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error.data, sizeof last_error.data, format, arguments);
  va_end(arguments);
  return code;
}

const char* error_text() { return last_error.data; }

const Device* find_device(int ordinal) {
  const Driver& cuda = driver();
  if (!cuda.usable()) return fail(kNoDevice, "%s", cuda.reason.data), nullptr;
  int device = -1;
  if (const int code = ordinal < 0 ? cuda.current_device(&device) : cuda.device(&device, ordinal)) {
    if (ordinal >= 0) fail(code, "there is no CUDA device %d: %s (CUresult %d)", ordinal, cuda.explain(code), code);
    else if (code == kInvalidContext) fail(code, "no CUDA context is current on this thread (CUresult %d)", code);
    else fail(code, "asking for the device of the current context: %s (CUresult %d)", cuda.explain(code), code);
    return nullptr;
  }
  if (device < 0 || device >= kMostDevices) {
    return fail(kNoDevice, "CUDA device %d is not among the first %d", device, kMostDevices), nullptr;
  }
  KnownDevice& entry = devices[device];
  if (!entry.known.load(std::memory_order_acquire)) {
    Device fresh;
    if (const int code = ask(device, &fresh)) {
      fail(code, "asking for the attributes of CUDA device %d: %s (CUresult %d)", device, cuda.explain(code), code);
      return nullptr;
    }
    const std::lock_guard<std::mutex> lock(mutex);
    if (!entry.known.load(std::memory_order_relaxed)) entry.device = fresh;
    entry.known.store(true, std::memory_order_release);
  }
  const Device& found = entry.device;
  if (found.image >= 0) {
    if (found.block_shared_bytes >= most_shared_bytes()) return &found;
    fail(kNoDevice, "CUDA device %d lends a block %d bytes of shared memory: the kernels need up to %d", device,
         found.block_shared_bytes, most_shared_bytes());
    return nullptr;
  }
  fail(kNoDevice, "CUDA device %d has compute capability %d.%d: %s", device, found.major, found.minor,
       found.major < 8 ? "the kernels need compute capability 8.0 or newer (Ampere)"
                       : "this library was built without kernels for it");
  return nullptr;
}

StreamScope::StreamScope(void* stream) {
  const Driver& cuda = driver();
  constexpr uintptr_t kLastDefaultStream = 2;
  if (cuda.usable() && reinterpret_cast<uintptr_t>(stream) > kLastDefaultStream) {
    void *own = nullptr, *current = nullptr;
    int code = cuda.stream_context(stream, &own);
    if (code == 0) code = cuda.current_context(&current);
    if (code == 0 && own != current) {
      code = cuda.push_context(own);
      pushed_ = code == 0;
    }
    // Streams of a part of a device (green contexts) are said to have none: they are the current context's.
    if (code != 0 && code != kNotSupported) {
      fail(code, "asking for the context of the stream %p: %s (CUresult %d)", stream, cuda.explain(code), code);
      return;
    }
  }
  device_ = find_device(-1);
}

StreamScope::~StreamScope() {
  void* popped = nullptr;
  if (pushed_) driver().pop_context(&popped);
}

int load_kernels(const Device& device) {
  Library library;
  if (const int code = load(device.image, &library)) return code;
  if (device.hopper_image >= 0) {
    if (const int code = load(device.hopper_image, &library)) return code;
  }
  // Code comes to the device when a kernel is first launched, which older drivers do not allow in a capture.
  int version = 0, current = -1;
  driver().version(&version);
  if (version >= kLoadsKernelsInCapture) return 0;
  if (driver().current_device(&current) != 0 || current != device.ordinal) return 0;
  for (int i = 0; i < kNumKernelNames; ++i) {
    const KernelName name = kernel_name(i);
    if (image_of(device, name) < 0) continue;
    Kernel kernel;
    void* function;
    int code = find_kernel(device, name, &kernel);
    if (code == kNotFound) continue;  // not every combination of a name is a kernel
    if (code != 0) return code;
    const AllowedInCapture allowed;
    code = driver().function(&function, kernel);
    if (code == 0) continue;
    return fail(code, "loading %s: %s (CUresult %d)", KernelText(name).data, driver().explain(code), code);
  }
  return 0;
}

int encode_tensor_map(void* map, void* data, const uint64_t (&extent)[4], const uint64_t (&stride)[3],
                      const uint32_t (&box)[4]) {
  constexpr int kUint16 = 1, kNotInterleaved = 0, kSwizzle128 = 3, kPromote256 = 3, kZerosOutside = 0;
  constexpr uint32_t step[] = {1, 1, 1, 1};
  const int code = driver().encode(map, kUint16, 4, data, extent, stride, box, step, kNotInterleaved, kSwizzle128,
                                   kPromote256, kZerosOutside);
  if (code == 0) return 0;
  return fail(code, "telling the copy engine of an array (%llu x %llu x %llu x %llu at %p): %s (CUresult %d)",
              static_cast<unsigned long long>(extent[3]), static_cast<unsigned long long>(extent[2]),
              static_cast<unsigned long long>(extent[1]), static_cast<unsigned long long>(extent[0]), data,
              driver().explain(code), code);
}

int launch(const Device& device, const KernelName& name, int64_t blocks, int threads, int shared_bytes, void* stream,
           void* args) {
  if (blocks <= 0) return 0;
  if (blocks > INT32_MAX) {
    return fail(kUnsupported, "%s: %lld blocks are more than one launch can have (2^31 - 1)", KernelText(name).data,
                static_cast<long long>(blocks));
  }
  Kernel kernel;
  if (const int code = find_kernel(device, name, &kernel)) return code;
  if (const int code = allow_shared_memory(device, name, kernel, shared_bytes)) return code;
  void* parameters[] = {args};
  const int code = driver().launch(kernel, static_cast<unsigned>(blocks), 1, 1, threads, 1, 1, shared_bytes, stream,
                                   parameters, nullptr);
  if (code == 0) return 0;
  return fail(code,
              "launching %s (%lld blocks of %d threads, %d bytes of shared memory) on CUDA device %d: %s (CUresult %d)",
              KernelText(name).data, static_cast<long long>(blocks), threads, shared_bytes, device.ordinal,
              driver().explain(code), code);
}

}  // namespace attn_ops::cuda
