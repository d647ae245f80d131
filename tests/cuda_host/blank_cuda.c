// Enough of CUDA's driver, runtime, NVML, cuDNN and cuBLAS for TensorFlow and its XLA to find one GPU: memory is malloc's,
// streams are always done, kernels do nothing. tensorflow_gpu.py adds a function that does nothing for every other name
// that TensorFlow may look up.
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Status;
typedef void* Handle;
typedef unsigned long long Pointer;

enum { kVersion = 12050 };
static const size_t kMemory = (size_t)4 << 30;
static __thread Handle current;

static Handle handle(void) { return calloc(1, 64); }
static Status give(void** p, size_t bytes) {
  return (*p = aligned_alloc(512, (bytes + 511) / 512 * 512)) == NULL ? 2 : 0;
}

// --- The driver ---
Status cuInit(unsigned flags) {
  (void)flags;
  return 0;
}
Status cuDriverGetVersion(int* version) {
  *version = kVersion;
  return 0;
}
Status cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}
Status cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
Status cuDeviceGetName(char* name, int size, int device) {
  (void)device;
  snprintf(name, size, "blank");
  return 0;
}
Status cuDeviceTotalMem_v2(size_t* bytes, int device) {
  (void)device;
  *bytes = kMemory;
  return 0;
}
Status cuDeviceGetPCIBusId(char* id, int size, int device) {
  (void)device;
  snprintf(id, size, "0000:00:1e.0");
  return 0;
}
Status cuDeviceGetUuid(char* id, int device) {
  (void)device;
  memset(id, 7, 16);
  return 0;
}
Status cuDeviceGetUuid_v2(char* id, int device) { return cuDeviceGetUuid(id, device); }
Status cuDeviceGetAttribute(int* value, int attribute, int device) {
  static const int known[][2] = {
      {1, 1024},  {2, 1024},     {3, 1024},   {4, 64},       {5, 2147483647}, {6, 65535}, {7, 65535},
      {8, 49152}, {9, 65536},    {10, 32},    {12, 65536},   {13, 1700000},   {16, 132},  {33, 0},
      {34, 30},   {36, 2600000}, {37, 5120},  {38, 1 << 25}, {39, 2048},      {41, 1},    {75, 9},
      {76, 0},    {81, 233472},  {82, 65536}, {97, 232448},  {106, 32},
  };
  (void)device;
  *value = 0;
  for (size_t i = 0; i < sizeof known / sizeof *known; ++i) {
    if (known[i][0] == attribute) *value = known[i][1];
  }
  return 0;
}
Status cuDevicePrimaryCtxRetain(Handle* context, int device) {
  (void)device;
  *context = (Handle)8;
  return 0;
}
Status cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
  (void)device;
  *flags = 0;
  *active = 1;
  return 0;
}
Status cuCtxGetCurrent(Handle* context) {
  *context = current;
  return 0;
}
Status cuCtxSetCurrent(Handle context) {
  current = context;
  return 0;
}
Status cuCtxPushCurrent_v2(Handle context) { return cuCtxSetCurrent(context); }
Status cuCtxPopCurrent_v2(Handle* context) { return context == NULL ? 0 : cuCtxGetCurrent(context); }
Status cuCtxGetDevice(int* device) {
  *device = 0;
  return current == NULL ? 201 : 0;
}
Status cuCtxGetStreamPriorityRange(int* least, int* most) {
  *least = *most = 0;
  return 0;
}
Status cuStreamCreate(Handle* stream, unsigned flags) {
  (void)flags;
  *stream = handle();
  return 0;
}
Status cuStreamCreateWithPriority(Handle* s, unsigned f, int priority) {
  (void)priority;
  return cuStreamCreate(s, f);
}
Status cuStreamIsCapturing(Handle stream, int* status) {
  (void)stream;
  *status = 0;
  return 0;
}
Status cuStreamGetCtx(Handle stream, Handle* context) {
  (void)stream;
  *context = (Handle)8;
  return 0;
}
Status cuEventCreate(Handle* event, unsigned flags) {
  (void)flags;
  *event = handle();
  return 0;
}
Status cuEventElapsedTime(float* time, Handle a, Handle b) {
  (void)a;
  (void)b;
  *time = 0;
  return 0;
}
Status cuLaunchHostFunc(Handle stream, void (*run)(void*), void* data) {
  (void)stream;
  run(data);
  return 0;
}
Status cuMemAlloc_v2(Pointer* p, size_t bytes) { return give((void**)p, bytes); }
Status cuMemFree_v2(Pointer p) {
  free((void*)p);
  return 0;
}
Status cuMemHostAlloc(void** p, size_t bytes, unsigned flags) {
  (void)flags;
  return give(p, bytes);
}
Status cuMemAllocHost_v2(void** p, size_t bytes) { return give(p, bytes); }
Status cuMemFreeHost(void* p) {
  free(p);
  return 0;
}
Status cuMemGetInfo_v2(size_t* left, size_t* all) {
  *left = *all = kMemory;
  return 0;
}
Status cuMemcpyHtoD_v2(Pointer to, const void* from, size_t n) {
  memcpy((void*)to, from, n);
  return 0;
}
Status cuMemcpyDtoH_v2(void* to, Pointer from, size_t n) {
  memcpy(to, (void*)from, n);
  return 0;
}
Status cuMemcpyDtoD_v2(Pointer to, Pointer from, size_t n) {
  memmove((void*)to, (void*)from, n);
  return 0;
}
Status cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t n, Handle s) {
  (void)s;
  return cuMemcpyHtoD_v2(to, from, n);
}
Status cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t n, Handle s) {
  (void)s;
  return cuMemcpyDtoH_v2(to, from, n);
}
Status cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t n, Handle s) {
  (void)s;
  return cuMemcpyDtoD_v2(to, from, n);
}
Status cuMemsetD8Async(Pointer p, unsigned char x, size_t n, Handle s) {
  (void)s;
  memset((void*)p, x, n);
  return 0;
}
Status cuMemsetD32Async(Pointer p, unsigned x, size_t n, Handle s) {
  (void)s;
  for (size_t i = 0; i < n; ++i) ((unsigned*)p)[i] = x;
  return 0;
}
Status cuModuleLoadData(Handle* module, const void* image) {
  (void)image;
  *module = handle();
  return 0;
}
Status cuModuleLoadDataEx(Handle* m, const void* image, unsigned n, void* o, void* v) {
  (void)n;
  (void)o;
  (void)v;
  return cuModuleLoadData(m, image);
}
Status cuModuleGetFunction(Handle* function, Handle module, const char* name) {
  (void)module;
  (void)name;
  *function = handle();
  return 0;
}
Status cuGetErrorName(Status error, const char** text) {
  (void)error;
  *text = "BLANK";
  return 0;
}
Status cuGetErrorString(Status error, const char** text) {
  (void)error;
  *text = "blank";
  return 0;
}

// --- The runtime, for TensorFlow's own kernels ---
static int unit;
Handle* __cudaRegisterFatBinary(void* binary) {
  (void)binary;
  static Handle module;
  return &module;
}
Status cudaRuntimeGetVersion(int* version) {
  *version = kVersion;
  return 0;
}
Status cudaDriverGetVersion(int* version) {
  *version = kVersion;
  return 0;
}
Status cudaGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}
Status cudaGetDevice(int* device) {
  *device = unit;
  return 0;
}
Status cudaDeviceGetAttribute(int* value, int attribute, int device) {
  return cuDeviceGetAttribute(value, attribute, device);
}
Status cudaGetDeviceProperties_v2(void* properties, int device) {
  (void)device;
  memset(properties, 0, 1032);
  return 0;
}
Status cudaMemGetInfo(size_t* left, size_t* all) { return cuMemGetInfo_v2(left, all); }
Status cudaMemcpyAsync(void* to, const void* from, size_t n, int kind, Handle s) {
  (void)kind;
  (void)s;
  memmove(to, from, n);
  return 0;
}
Status cudaMemsetAsync(void* p, int x, size_t n, Handle s) {
  (void)s;
  memset(p, x, n);
  return 0;
}
const char* cudaGetErrorString(Status error) {
  (void)error;
  return "blank";
}
const char* cudaGetErrorName(Status error) {
  (void)error;
  return "BLANK";
}

// --- NVML, and what XLA asks of cuDNN and cuBLAS before it compiles anything ---
Status nvmlDeviceGetCount_v2(unsigned* count) {
  *count = 1;
  return 0;
}
Status nvmlSystemGetDriverVersion(char* version, unsigned size) {
  snprintf(version, size, "555.42");
  return 0;
}
size_t cudnnGetVersion(void) { return 90300; }
Status cudnnGetProperty(int which, int* value) {
  *value = which == 0 ? 9 : which == 1 ? 3 : 0;
  return 0;
}
Status cudnnCreate(Handle* library) {
  *library = handle();
  return 0;
}
Status cublasCreate_v2(Handle* library) {
  *library = handle();
  return 0;
}
Status cublasLtCreate(Handle* library) {
  *library = handle();
  return 0;
}
const char* cublasGetStatusString(int error) {
  (void)error;
  return "blank";
}
const char* cublasLtGetStatusString(int error) {
  (void)error;
  return "blank";
}
const char* cudnnGetErrorString(int error) {
  (void)error;
  return "blank";
}
