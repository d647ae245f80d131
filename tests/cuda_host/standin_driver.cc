// Stands for libcuda.so.1: the functions of the driver that the library and its tests call, with a processor's memory
// and fibres instead of a device. Everything is done when a call returns.
//
// Set by the environment, read at every call:
//   ATTN_OPS_STANDIN_CAPABILITY      9.0 (default 8.0), or of each device: 8.0,9.0
//   ATTN_OPS_STANDIN_SHARED_BYTES    that one block may ask for (default: what such a card has)
//   ATTN_OPS_STANDIN_RUN             0: launches are checked and written down, and nothing is computed
//   ATTN_OPS_STANDIN_DEVICES         how many (default 1)
//   ATTN_OPS_STANDIN_DRIVER_VERSION  12080 (default)
//   ATTN_OPS_STANDIN_FAIL            cuLaunchKernel:2:701,cuInit:1:100 - the second launch returns 701, and so on;
//                                    counted since standin_reset()
// and ATTN_OPS_HOST_LAYER_SEED (fibres.h). What a kernel does wrong is in the text of the launch's error
// (cuGetErrorString), in standin_log(), and on stderr.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../../csrc/cuda/hopper/args.h"
#include "fibres.h"

#define DRIVER extern "C" __attribute__((visibility("default")))
// The driver has these by both names.
#define ALSO_WITHOUT_V2(name, ...) DRIVER int name(__VA_ARGS__) __attribute__((alias(#name "_v2")))

namespace {

using namespace attn_ops::cuda;

enum Result {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotFound = 500,
  kCaptureUnsupported = 900,
  kLaunchFailed = 719,
};

struct Error {
  int code;
  const char* name;
  const char* text;
};
constexpr Error kErrors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {35, "CUDA_ERROR_INSUFFICIENT_DRIVER", "CUDA driver version is insufficient for CUDA runtime version"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

constexpr int kMostDevices = 16;
constexpr int kSharedWithoutAsking = 48 * 1024;
constexpr size_t kPage = 65536;  // a multiple of any machine's
// The largest that a kernel asks for. The driver's is 256, but here the end shall be near to the page that traps.
constexpr size_t kAlignment = 16;

struct Allocation {
  char* pages;
  size_t pages_bytes, bytes;
};

struct Image {
  size_t bytes;
  std::string head;  // the first bytes, in hexadecimal digits
};

struct LoadedKernel {
  const host_layer::Kernel* kernel;
  int image;
  int shared_bytes[kMostDevices];  // allowed
  bool is_loaded[kMostDevices];    // to the device, which the first launch does
};

// What was launched on a stream while it was captured.
struct Graph {
  std::vector<std::function<int()>> launches;
};

struct Launch {
  std::string kernel;
  int device, image;
  unsigned grid[3], block[3], shared_bytes;
  uintptr_t stream;
};

// What the copy engine was told of an array: what a tensor map has in it here (ptx/copy_engine.py reads it).
struct TensorMap {
  char magic[8] = {'s', 't', 'a', 'n', 'd', 'i', 'n', '4'};
  uint64_t address, extent[4], stride[3];
  uint32_t box[4];
};
static_assert(sizeof(TensorMap) <= 128, "a CUtensorMap");

struct Library {
  int image;
  std::vector<std::unique_ptr<LoadedKernel>> kernels;
};

// Runs launches in the place of the fibres (ptx/device.py): 0, or else with a text of what a kernel did wrong.
using Interpreter = int (*)(const char* kernel, const void* args, unsigned blocks, unsigned shared_bytes, char* error,
                            size_t error_bytes);

struct Event {
  std::chrono::steady_clock::time_point time;
};

// A context and a device are the same thing here: its address is the context.
char contexts[kMostDevices];
thread_local int current_device = -1;  // none
thread_local std::vector<int> pushed;  // what was current before

// Of a thread: 0 (global), what may break a capture is refused while there is any; 2 (relaxed), it is not. 1 (of this
// thread's captures alone) is as 0 here.
thread_local int capture_mode = 0;
constexpr int kRelaxed = 2;

struct State {
  std::mutex mutex;
  bool initialized = false;
  std::map<uintptr_t, Allocation> memory;
  std::set<Library*> libraries;
  std::map<void*, int> streams;  // the device of each
  std::map<void*, Graph*> captures;  // by stream
  std::vector<Image> images;
  std::vector<Launch> launches;
  std::vector<TensorMap> tensor_maps;
  std::map<std::string, int> calls;
  std::string error, log;
  std::string described;  // what cuGetErrorString has returned
  Interpreter interpreter = nullptr;
};
State& state() {
  static State s;
  return s;
}

int number(const char* variable, int otherwise) {
  const char* text = getenv(variable);
  return text ? atoi(text) : otherwise;
}
int version() { return number("ATTN_OPS_STANDIN_DRIVER_VERSION", 12080); }
int device_count() { return std::min(number("ATTN_OPS_STANDIN_DEVICES", 1), kMostDevices); }

void capability(int device, int* major, int* minor) {
  const char* text = getenv("ATTN_OPS_STANDIN_CAPABILITY");
  for (; text && device > 0 && strchr(text, ','); --device) text = strchr(text, ',') + 1;
  if (!text || sscanf(text, "%d.%d", major, minor) != 2) *major = 8, *minor = 0;
}

// As the real ones have.
int most_shared_bytes(int device) {
  if (const int told = number("ATTN_OPS_STANDIN_SHARED_BYTES", 0)) return told;
  int major, minor;
  capability(device, &major, &minor);
  switch (10 * major + minor) {
    case 70: return 96 * 1024;
    case 75: return 64 * 1024;
    case 80:
    case 87: return 163 * 1024;
    case 90:
    case 100:
    case 103: return 227 * 1024;
    default: return major < 7 ? kSharedWithoutAsking : 99 * 1024;
  }
}

// Counts the call. The error that it is to return, or 0.
int called(const char* function, bool before_init = false) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const int count = ++s.calls[function];
  const char* rules = getenv("ATTN_OPS_STANDIN_FAIL");
  for (const char* rule = rules; rule && *rule; rule = strchr(rule, ',') ? strchr(rule, ',') + 1 : nullptr) {
    char name[100];
    int nth, code;
    if (sscanf(rule, "%99[^:]:%d:%d", name, &nth, &code) == 3 && !strcmp(name, function) && nth == count) return code;
  }
  return before_init || s.initialized ? kSuccess : kNotInitialized;
}

#define CALLED() \
  if (const int code = called(__func__)) return code

// The error of a call that waits, or is not in order with a stream, where a stream is being captured.
int refused_in_capture(const char* function) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (s.captures.empty() || capture_mode == kRelaxed) return kSuccess;
  s.error = std::string(function) + " while a stream is being captured";
  return kCaptureUnsupported;
}

#define CALLED_OUTSIDE_CAPTURES() \
  CALLED();                       \
  if (const int code = refused_in_capture(__func__)) return code

bool is_allocated(uintptr_t address, size_t bytes) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (!bytes) return true;
  auto after = s.memory.upper_bound(address);
  if (after == s.memory.begin()) return false;
  --after;
  return address + bytes <= after->first + after->second.bytes;
}

std::string describe(const void* pointer) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  for (const auto& [begin, a] : state().memory) {
    const uintptr_t pages = reinterpret_cast<uintptr_t>(a.pages);
    if (address < pages || address >= pages + a.pages_bytes) continue;
    const auto offset = static_cast<int64_t>(address - begin);
    return std::to_string(offset) + " bytes into an allocation of " + std::to_string(a.bytes);
  }
  return "";
}

// Bytes between the end of an allocation and the page behind it.
size_t slack(const Allocation& a) { return (kAlignment - a.bytes % kAlignment) % kAlignment; }

std::string damaged_memory() {
  for (const auto& [begin, a] : state().memory) {
    const char* end = reinterpret_cast<const char*>(begin) + a.bytes;
    for (size_t i = 0; i < slack(a); ++i) {
      if (end[i] != '\xff') return "wrote behind an allocation of " + std::to_string(a.bytes) + " bytes";
    }
  }
  return "";
}

// As much as an image says about itself: a fat binary, an ELF file, or the text of PTX.
Image image_of(const void* data) {
  Image image;
  uint32_t magic;
  memcpy(&magic, data, 4);
  const char* bytes = static_cast<const char*>(data);
  if (magic == 0xba55ed50u) {
    uint16_t header;
    uint64_t rest;
    memcpy(&header, bytes + 6, 2);
    memcpy(&rest, bytes + 8, 8);
    image.bytes = header + rest;
  } else if (!memcmp(data, "\177ELF", 4)) {
    uint64_t sections, segments;
    uint16_t section_bytes, section_count, segment_bytes, segment_count;
    memcpy(&segments, bytes + 32, 8);
    memcpy(&sections, bytes + 40, 8);
    memcpy(&segment_bytes, bytes + 54, 2);
    memcpy(&segment_count, bytes + 56, 2);
    memcpy(&section_bytes, bytes + 58, 2);
    memcpy(&section_count, bytes + 60, 2);
    image.bytes = std::max(sections + section_bytes * section_count, segments + segment_bytes * segment_count);
  } else {
    image.bytes = strlen(bytes);
  }
  char digits[3];
  for (size_t i = 0; i < std::min<size_t>(image.bytes, 64); ++i) {
    snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(bytes[i]));
    image.head += digits;
  }
  return image;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return out + '"';
}

int launch_error(int code, std::string text) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.error = std::move(text);
  fprintf(stderr, "stand-in driver: %s\n", s.error.c_str());
  return code;
}

}  // namespace

// --- Of the stand-in alone ------------------------------------------------------------------------------------------

// {"calls": {function: count}, "images": [{"bytes", "head"}], "launches": [{...}], "error": text, "allocations": count}
DRIVER const char* standin_log() {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  std::string& out = s.log;
  const char* comma = "";
  out = "{\"calls\": {";
  for (const auto& [name, count] : s.calls) out += comma + quoted(name) + ": " + std::to_string(count), comma = ", ";
  out += "}, \"images\": [", comma = "";
  for (const Image& i : s.images) {
    out += std::string(comma) + "{\"bytes\": " + std::to_string(i.bytes) + ", \"head\": " + quoted(i.head) + "}";
    comma = ", ";
  }
  out += "], \"launches\": [", comma = "";
  for (const Launch& l : s.launches) {
    char numbers[300];
    snprintf(numbers, sizeof numbers,
             "\"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], \"shared_bytes\": %u, \"stream\": %llu, \"device\": %d, "
             "\"image\": %d}",
             l.grid[0], l.grid[1], l.grid[2], l.block[0], l.block[1], l.block[2], l.shared_bytes,
             static_cast<unsigned long long>(l.stream), l.device, l.image);
    out += std::string(comma) + "{\"kernel\": " + quoted(l.kernel) + ", " + numbers, comma = ", ";
  }
  out += "], \"tensor_maps\": [", comma = "";
  for (const TensorMap& m : s.tensor_maps) {
    char numbers[300];
    snprintf(numbers, sizeof numbers, "{\"extent\": [%llu, %llu, %llu, %llu], \"stride\": [%llu, %llu, %llu], \"box\": "
             "[%u, %u, %u, %u]}", m.extent[0] + 0ull, m.extent[1] + 0ull, m.extent[2] + 0ull, m.extent[3] + 0ull,
             m.stride[0] + 0ull, m.stride[1] + 0ull, m.stride[2] + 0ull, m.box[0], m.box[1], m.box[2], m.box[3]);
    out += std::string(comma) + numbers, comma = ", ";
  }
  out += "], \"error\": " + quoted(s.error) + ", \"allocations\": " + std::to_string(s.memory.size()) + "}";
  return out.c_str();
}

// Forgets the calls, launches and the error; what is loaded and allocated stays.
DRIVER void standin_reset() {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.calls.clear();
  s.launches.clear();
  s.tensor_maps.clear();
  s.error.clear();
}

// From now on launches go there; null: to the fibres.
DRIVER void standin_interpret(Interpreter interpreter) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().interpreter = interpreter;
}

// Where the allocations begin and how many bytes they have, of the first `capacity` ones; how many there are.
DRIVER size_t standin_allocations(uint64_t* begins, uint64_t* bytes, size_t capacity) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  size_t n = 0;
  for (const auto& [begin, allocation] : s.memory) {
    if (n < capacity) begins[n] = begin, bytes[n] = allocation.bytes;
    ++n;
  }
  return n;
}

// --- Errors ---------------------------------------------------------------------------------------------------------

DRIVER int cuGetErrorName(int code, const char** name) {
  for (const Error& e : kErrors) {
    if (e.code == code) return *name = e.name, kSuccess;
  }
  return *name = nullptr, kInvalidValue;
}

DRIVER int cuGetErrorString(int code, const char** text) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  for (const Error& e : kErrors) {
    if (e.code != code) continue;
    s.described = e.text;
    if (code && !s.error.empty()) s.described += " (" + s.error + ")";
    return *text = s.described.c_str(), kSuccess;
  }
  return *text = nullptr, kInvalidValue;
}

// --- Devices and contexts -------------------------------------------------------------------------------------------

DRIVER int cuInit(unsigned flags) {
  if (const int code = called(__func__, true)) return code;
  if (flags) return kInvalidValue;
  if (device_count() < 1) return kNoDevice;
  host_layer::describe_address = describe;
  state().initialized = true;
  return kSuccess;
}

DRIVER int cuDriverGetVersion(int* version) {
  if (const int code = called(__func__, true)) return code;
  *version = ::version();
  return kSuccess;
}

DRIVER int cuDeviceGetCount(int* count) {
  CALLED();
  *count = device_count();
  return kSuccess;
}

DRIVER int cuDeviceGet(int* device, int ordinal) {
  CALLED();
  if (ordinal < 0 || ordinal >= device_count()) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

DRIVER int cuDeviceGetName(char* name, int bytes, int device) {
  CALLED();
  if (device < 0 || device >= device_count()) return kInvalidDevice;
  snprintf(name, bytes, "Stand-in %d", device);
  return kSuccess;
}

DRIVER int cuDeviceGetAttribute(int* value, int attribute, int device) {
  CALLED();
  if (device < 0 || device >= device_count()) return kInvalidDevice;
  int major, minor;
  capability(device, &major, &minor);
  switch (attribute) {
    case 1: *value = host_layer::kMostThreads; break;  // MAX_THREADS_PER_BLOCK
    case 2: *value = host_layer::kMostThreads; break;  // MAX_BLOCK_DIM_X
    case 5: *value = 0x7fffffff; break;  // MAX_GRID_DIM_X
    case 6:
    case 7: *value = 65535; break;  // MAX_GRID_DIM_Y, Z
    case 8: *value = kSharedWithoutAsking; break;  // MAX_SHARED_MEMORY_PER_BLOCK
    case 10: *value = host_layer::kWarpLanes; break;  // WARP_SIZE
    case 12: *value = 65536; break;  // MAX_REGISTERS_PER_BLOCK
    case 13: *value = 1000000; break;  // CLOCK_RATE, kHz
    case 16: *value = 16; break;  // MULTIPROCESSOR_COUNT
    case 36: *value = 1000000; break;  // MEMORY_CLOCK_RATE, kHz
    case 37: *value = 256; break;  // GLOBAL_MEMORY_BUS_WIDTH
    case 38: *value = 4 << 20; break;  // L2_CACHE_SIZE
    case 39: *value = 1536; break;  // MAX_THREADS_PER_MULTIPROCESSOR
    case 75: *value = major; break;  // COMPUTE_CAPABILITY_MAJOR
    case 76: *value = minor; break;  // COMPUTE_CAPABILITY_MINOR
    case 81: *value = most_shared_bytes(device) + 1024; break;  // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    case 82: *value = 65536; break;  // MAX_REGISTERS_PER_MULTIPROCESSOR
    case 97: *value = most_shared_bytes(device); break;  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    case 106: *value = 16; break;  // MAX_BLOCKS_PER_MULTIPROCESSOR
    case 111: *value = 1024; break;  // RESERVED_SHARED_MEMORY_PER_BLOCK
    default: return kInvalidValue;
  }
  return kSuccess;
}

DRIVER int cuDevicePrimaryCtxRetain(void** context, int device) {
  CALLED();
  if (device < 0 || device >= device_count()) return kInvalidDevice;
  *context = &contexts[device];
  return kSuccess;
}

DRIVER int cuDevicePrimaryCtxRelease_v2(int device) {
  CALLED();
  return device < 0 || device >= device_count() ? kInvalidDevice : kSuccess;
}

ALSO_WITHOUT_V2(cuDevicePrimaryCtxRelease, int);

DRIVER int cuCtxSetCurrent(void* context) {
  CALLED();
  char* c = static_cast<char*>(context);
  if (c && (c < contexts || c >= contexts + kMostDevices)) return kInvalidContext;
  current_device = c ? static_cast<int>(c - contexts) : -1;
  return kSuccess;
}

DRIVER int cuCtxGetCurrent(void** context) {
  CALLED();
  *context = current_device < 0 ? nullptr : &contexts[current_device];
  return kSuccess;
}

DRIVER int cuCtxPushCurrent_v2(void* context) {
  CALLED();
  char* c = static_cast<char*>(context);
  if (!c || c < contexts || c >= contexts + kMostDevices) return kInvalidContext;
  pushed.push_back(current_device);
  current_device = static_cast<int>(c - contexts);
  return kSuccess;
}

DRIVER int cuCtxPopCurrent_v2(void** context) {
  CALLED();
  if (pushed.empty()) return kInvalidContext;
  *context = &contexts[current_device];
  current_device = pushed.back();
  pushed.pop_back();
  return kSuccess;
}

DRIVER int cuCtxGetDevice(int* device) {
  CALLED();
  if (current_device < 0) return kInvalidContext;
  *device = current_device;
  return kSuccess;
}

DRIVER int cuCtxSynchronize() {
  CALLED_OUTSIDE_CAPTURES();
  return current_device < 0 ? kInvalidContext : kSuccess;
}

// --- Memory ---------------------------------------------------------------------------------------------------------

// Between two pages that trap, at the end, and filled with NaN.
DRIVER int cuMemAlloc_v2(uintptr_t* address, size_t bytes) {
  CALLED_OUTSIDE_CAPTURES();
  if (current_device < 0) return kInvalidContext;
  if (!bytes) return kInvalidValue;
  const size_t usable = (bytes + kPage - 1) / kPage * kPage;
  Allocation a{nullptr, usable + 2 * kPage, bytes};
  void* pages = mmap(nullptr, a.pages_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) return kOutOfMemory;
  a.pages = static_cast<char*>(pages);
  char* end = a.pages + kPage + usable;
  char* begin = end - bytes - slack(a);
  const size_t page = sysconf(_SC_PAGESIZE);
  char* opened = a.pages + (begin - a.pages) / page * page;
  if (mprotect(opened, end - opened, PROT_READ | PROT_WRITE)) return munmap(pages, a.pages_bytes), kOutOfMemory;
  memset(begin, 0xff, end - begin);
  *address = reinterpret_cast<uintptr_t>(begin);
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.memory[*address] = a;
  return kSuccess;
}

DRIVER int cuMemFree_v2(uintptr_t address) {
  CALLED_OUTSIDE_CAPTURES();
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const auto found = s.memory.find(address);
  if (found == s.memory.end()) return kInvalidValue;
  munmap(found->second.pages, found->second.pages_bytes);
  s.memory.erase(found);
  return kSuccess;
}

DRIVER int cuMemcpyHtoD_v2(uintptr_t to, const void* from, size_t bytes) {
  CALLED_OUTSIDE_CAPTURES();
  if (!is_allocated(to, bytes)) return kInvalidValue;
  memcpy(reinterpret_cast<void*>(to), from, bytes);
  return kSuccess;
}

DRIVER int cuMemcpyDtoH_v2(void* to, uintptr_t from, size_t bytes) {
  CALLED_OUTSIDE_CAPTURES();
  if (!is_allocated(from, bytes)) return kInvalidValue;
  memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return kSuccess;
}

DRIVER int cuMemsetD8_v2(uintptr_t to, unsigned char value, size_t bytes) {
  CALLED_OUTSIDE_CAPTURES();
  if (!is_allocated(to, bytes)) return kInvalidValue;
  memset(reinterpret_cast<void*>(to), value, bytes);
  return kSuccess;
}

// --- Streams and events: in order, and never late --------------------------------------------------------------------

DRIVER int cuStreamCreate(void** stream, unsigned) {
  CALLED_OUTSIDE_CAPTURES();
  if (current_device < 0) return kInvalidContext;
  *stream = new char;
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.streams[*stream] = current_device;
  return kSuccess;
}

// 0, 1 and 2 are the default streams.
static bool is_stream(void* stream) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  return reinterpret_cast<uintptr_t>(stream) <= 2 || s.streams.count(stream);
}

// Where what a stream is given runs; -1: nowhere.
static int device_of(void* stream) {
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const auto found = s.streams.find(stream);
  return found == s.streams.end() ? current_device : found->second;
}

DRIVER int cuStreamGetCtx(void* stream, void** context) {
  CALLED();
  if (!is_stream(stream)) return kInvalidHandle;
  const int device = device_of(stream);
  if (device < 0) return kInvalidContext;
  *context = &contexts[device];
  return kSuccess;
}

DRIVER int cuStreamSynchronize(void* stream) {
  CALLED_OUTSIDE_CAPTURES();
  return is_stream(stream) ? kSuccess : kInvalidHandle;
}

DRIVER int cuStreamDestroy_v2(void* stream) {
  CALLED();
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.streams.erase(stream)) return kInvalidHandle;
  delete static_cast<char*>(stream);
  return kSuccess;
}

DRIVER int cuThreadExchangeStreamCaptureMode(int* mode) {
  CALLED();
  std::swap(capture_mode, *mode);
  return kSuccess;
}

DRIVER int cuStreamBeginCapture_v2(void* stream, int mode) {
  CALLED();
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.streams.count(stream) || s.captures.count(stream) || mode != 0) return kInvalidValue;
  s.captures[stream] = new Graph;
  return kSuccess;
}

DRIVER int cuStreamEndCapture(void* stream, Graph** graph) {
  CALLED();
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  const auto found = s.captures.find(stream);
  if (found == s.captures.end()) return kInvalidValue;
  *graph = found->second;
  s.captures.erase(found);
  return kSuccess;
}

// A graph and its executable are the same thing.
DRIVER int cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) {
  CALLED_OUTSIDE_CAPTURES();
  *executable = graph;
  return kSuccess;
}

DRIVER int cuGraphLaunch(const Graph* graph, void*) {
  CALLED();
  for (const auto& launch : graph->launches) {
    if (const int code = launch()) return code;
  }
  return kSuccess;
}

DRIVER int cuEventCreate(Event** event, unsigned) {
  CALLED();
  *event = new Event;
  return kSuccess;
}

DRIVER int cuEventRecord(Event* event, void* stream) {
  CALLED();
  if (!is_stream(stream)) return kInvalidHandle;
  event->time = std::chrono::steady_clock::now();
  return kSuccess;
}

DRIVER int cuEventSynchronize(Event*) {
  CALLED_OUTSIDE_CAPTURES();
  return kSuccess;
}

DRIVER int cuEventElapsedTime(float* milliseconds, const Event* begin, const Event* end) {
  CALLED();
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - begin->time).count();
  return kSuccess;
}

DRIVER int cuEventDestroy_v2(Event* event) {
  CALLED();
  delete event;
  return kSuccess;
}

ALSO_WITHOUT_V2(cuEventDestroy, Event*);

// --- Kernels --------------------------------------------------------------------------------------------------------

DRIVER int cuLibraryLoadData(Library** library, const void* code, void*, void**, unsigned, void*, void**, unsigned) {
  CALLED_OUTSIDE_CAPTURES();
  if (!code) return kInvalidValue;
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  s.images.push_back(image_of(code));
  *library = new Library{static_cast<int>(s.images.size()) - 1, {}};
  s.libraries.insert(*library);
  return kSuccess;
}

DRIVER int cuLibraryUnload(Library* library) {
  CALLED_OUTSIDE_CAPTURES();
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.libraries.erase(library)) return kInvalidHandle;
  delete library;
  return kSuccess;
}

// Kernels that no processor can run, of Hopper's own instructions: unless an interpreter does, their launches are written
// down, and that is all.
bool is_of_hopper(const char* name) { return !strncmp(name, "attn_ops_hopper_", 16); }
const host_layer::Kernel* not_run(const char* name) {
  static std::map<std::string, host_layer::Kernel> known;  // under the mutex of the state
  const auto entry = known.try_emplace(name, host_layer::Kernel{}).first;
  entry->second.name = entry->first.c_str();
  entry->second.args_bytes = strstr(name, "_forward_") ? sizeof(hopper::ForwardArgs) : sizeof(hopper::BackwardArgs);
  return &entry->second;
}

// As the driver's own checks are: CUDA driver API, "Tensor Map Object Management".
DRIVER int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* data, const uint64_t* extent,
                                  const uint64_t* stride, const uint32_t* box, const uint32_t* step, int interleave,
                                  int swizzle, int, int outside) {
  CALLED();
  if (!map || reinterpret_cast<uintptr_t>(map) % 64 || type != 1 || rank != 4) return kInvalidValue;
  if (reinterpret_cast<uintptr_t>(data) % 16 || box[0] * 2 != 128) return kInvalidValue;
  if (interleave != 0 || swizzle != 3 || outside != 0) return kInvalidValue;  // what there is here: 128 bytes, zeros
  TensorMap told{};
  told.address = reinterpret_cast<uintptr_t>(data);
  for (int i = 0; i < 4; ++i) {
    told.extent[i] = extent[i], told.box[i] = box[i];
    if (!extent[i] || extent[i] > uint64_t{1} << 32 || !box[i] || box[i] > 256 || step[i] != 1) return kInvalidValue;
    if (i == 3) break;
    told.stride[i] = stride[i];
    if (!stride[i] || stride[i] % 16 || stride[i] >= uint64_t{1} << 40) return kInvalidValue;
  }
  memcpy(map, &told, sizeof told);
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().tensor_maps.push_back(told);
  return kSuccess;
}

DRIVER int cuLibraryGetKernel(LoadedKernel** kernel, Library* library, const char* name) {
  CALLED();
  State& s = state();
  const std::lock_guard<std::mutex> lock(s.mutex);
  if (!s.libraries.count(library)) return kInvalidHandle;
  const host_layer::Kernel* found = host_layer::find_kernel(name);
  if (!found && is_of_hopper(name)) found = not_run(name);
  if (!found) return kNotFound;
  for (const auto& k : library->kernels) {
    if (k->kernel == found) return *kernel = k.get(), kSuccess;
  }
  library->kernels.push_back(std::make_unique<LoadedKernel>(LoadedKernel{found, library->image, {}, {}}));
  *kernel = library->kernels.back().get();
  std::fill_n((*kernel)->shared_bytes, kMostDevices, kSharedWithoutAsking);
  std::fill_n((*kernel)->is_loaded, kMostDevices, false);
  return kSuccess;
}

// A function of the current context and its kernel are the same thing.
DRIVER int cuKernelGetFunction(LoadedKernel** function, LoadedKernel* kernel) {
  CALLED_OUTSIDE_CAPTURES();
  if (current_device < 0) return kInvalidContext;
  kernel->is_loaded[current_device] = true;
  *function = kernel;
  return kSuccess;
}

static int set_attribute(LoadedKernel* kernel, int attribute, int value, int device) {
  if (device < 0 || device >= device_count()) return kInvalidDevice;
  if (attribute == 9) return kSuccess;  // PREFERRED_SHARED_MEMORY_CARVEOUT
  if (attribute != 8 || value < 0 || value > most_shared_bytes(device)) return kInvalidValue;
  kernel->shared_bytes[device] = value;
  return kSuccess;
}

DRIVER int cuKernelSetAttribute(int attribute, int value, LoadedKernel* kernel, int device) {
  CALLED();
  return set_attribute(kernel, attribute, value, device);
}

DRIVER int cuFuncSetAttribute(LoadedKernel* function, int attribute, int value) {
  CALLED();
  return set_attribute(function, attribute, value, current_device);
}

DRIVER int cuKernelGetAttribute(int* value, int attribute, const LoadedKernel* kernel, int device) {
  CALLED();
  if (device < 0 || device >= device_count()) return kInvalidDevice;
  int major, minor;
  capability(device, &major, &minor);
  switch (attribute) {
    case 0: *value = kernel->kernel->threads; break;  // MAX_THREADS_PER_BLOCK
    case 1:
    case 2:
    case 3: *value = 0; break;  // SHARED, CONST, LOCAL_SIZE_BYTES
    case 4: *value = std::min(255, 65536 / kernel->kernel->threads); break;  // NUM_REGS
    case 5:
    case 6: *value = 10 * major + minor; break;  // PTX_VERSION, BINARY_VERSION
    case 8: *value = kernel->shared_bytes[device]; break;  // MAX_DYNAMIC_SHARED_SIZE_BYTES
    default: return kInvalidValue;
  }
  return kSuccess;
}

DRIVER int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const LoadedKernel* function, int threads,
                                                       size_t shared_bytes) {
  CALLED();
  if (current_device < 0) return kInvalidContext;
  if (threads < 1) return kInvalidValue;
  const size_t by_memory = (most_shared_bytes(current_device) + 1024) / (shared_bytes + 1024);
  *blocks = threads > function->kernel->threads ? 0 : std::min<int>(by_memory, std::min(16, 1536 / threads));
  return kSuccess;
}

static int run(const host_layer::Kernel& kernel, const void* args, unsigned grid_x, unsigned shared_bytes) {
  std::string error;
  if (const Interpreter interpreter = state().interpreter) {
    std::vector<char> text(2000);
    if (interpreter(kernel.name, args, grid_x, shared_bytes, text.data(), text.size())) error = text.data();
  } else if (kernel.run) {
    error = host_layer::run_grid(kernel, args, grid_x, shared_bytes);
  }
  if (error.empty()) {
    const std::lock_guard<std::mutex> lock(state().mutex);
    error = damaged_memory();
    if (!error.empty()) error = "kernel " + std::string(kernel.name) + ": " + error;
  }
  return error.empty() ? kSuccess : launch_error(kLaunchFailed, error);
}

DRIVER int cuLaunchKernel(LoadedKernel* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                          void** extra) {
  CALLED();
  if (current_device < 0) return kInvalidContext;
  if (!is_stream(stream)) return launch_error(kInvalidHandle, "no such stream");
  if (device_of(stream) != current_device) return launch_error(kInvalidHandle, "a stream of another context");
  const host_layer::Kernel& kernel = *function->kernel;
  const auto refuse = [&kernel](const std::string& text) {
    return launch_error(kInvalidValue, "kernel " + std::string(kernel.name) + ": " + text);
  };
  const bool runs = kernel.run != nullptr;
  if ((runs && static_cast<int>(block_x) != kernel.threads) || block_y != 1 || block_z != 1) {
    return refuse("launched with another number of threads than its " + std::to_string(kernel.threads));
  }
  if (!grid_x || grid_x > 0x7fffffffu || grid_y != 1 || grid_z != 1) return refuse("no grid of one dimension");
  if (static_cast<int>(shared_bytes) > function->shared_bytes[current_device]) {
    return refuse(std::to_string(shared_bytes) + " bytes of shared memory, which were not allowed before");
  }
  if (!parameters || !parameters[0] || extra) return refuse("no parameter");
  {
    State& s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    s.launches.push_back({kernel.name,
                          current_device,
                          function->image,
                          {grid_x, grid_y, grid_z},
                          {block_x, block_y, block_z},
                          shared_bytes,
                          reinterpret_cast<uintptr_t>(stream)});
  }
  bool& is_loaded = function->is_loaded[current_device];
  if (!is_loaded && version() < 12030) {
    if (const int code = refused_in_capture("loading a kernel")) return code;
  }
  is_loaded = true;
  if (!number("ATTN_OPS_STANDIN_RUN", 1) || (!runs && !state().interpreter)) return kSuccess;
  std::vector<std::max_align_t> args((kernel.args_bytes + sizeof(std::max_align_t) - 1) / sizeof(std::max_align_t));
  memcpy(args.data(), parameters[0], kernel.args_bytes);
  const auto launch = [=, &kernel] { return run(kernel, args.data(), grid_x, shared_bytes); };
  {
    State& s = state();
    const std::lock_guard<std::mutex> lock(s.mutex);
    const auto capture = s.captures.find(stream);
    if (capture != s.captures.end()) return capture->second->launches.push_back(launch), kSuccess;
  }
  return launch();
}
