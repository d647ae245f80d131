// The instructions of csrc/cuda/ptx.cuh for a CPU, included there in place of the device's. A thread of a block is a
// fibre, and a warp takes one step whenever all its 32 lanes have reached the same instruction (fibres.cc).
//
// What a GPU may forgive on one day and not on the next is an error of the launch here, with a message: see fail().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define ATTN_DEVICE inline
// A function that takes its arguments by address, and a note of it, by which the driver finds it.
#define ATTN_KERNEL(name, threads, Args) ATTN_HOST_KERNEL(name, threads, Args)
#define ATTN_HOST_KERNEL(name, threads, Args)                                                         \
  extern "C" void name(const Args& args);                                                             \
  static const ::attn_ops::cuda::host_layer::Registration name##_registration(                        \
      #name, threads, sizeof(Args), [](const void* args) { name(*static_cast<const Args*>(args)); }); \
  extern "C" void name(const Args& args)

namespace attn_ops {
namespace cuda {
namespace host_layer {

struct Kernel {
  const char* name;
  int threads;
  size_t args_bytes;
  void (*run)(const void* args);
};
struct Registration {
  Registration(const char* name, int threads, size_t args_bytes, void (*run)(const void*));
};

// What all lanes of a warp do together.
enum class Meeting : int32_t {
  kSyncBlock,
  kSyncBlockOr,
  kSyncWarp,
  kShuffle,
  kShuffleXor,
  kAnyInWarp,
  kLoadMatrices,
  kLoadMatricesTransposed,
  kMmaF16,
  kMmaBf16,
  kMmaTf32,
  kReturn,  // from the kernel
};

// Where the running fibre is.
struct Place {
  int thread, block;
  char* shared;
};
extern __thread Place place __attribute__((tls_model("initial-exec")));

// Returns when all lanes of the warp have come to the same meeting, and results have taken the places of operands.
void meet(Meeting, void* in_out, const void* operand = nullptr, const void* operand2 = nullptr);

// What lies in a lane's row when the lane arrives at load_matrices, which is as early as it may be read.
const void* read_row(const void* shared);

void start_copy(void* shared, const void* global, int bytes, bool exists);
void commit_copies();
void wait_for_copies(int pending);

// Ends the launch, with a message that names kernel, block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2), cold));

template <class To, class From>
inline To bit_cast(From x) {
  static_assert(sizeof(To) == sizeof(From), "");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// To the nearest, ties to even. Every NaN becomes the one that the device makes.
inline uint32_t half_of(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;  // 65520 and more
  if (magnitude < 0x38800000u) {                       // below 2^-14: the sum has the spacing of half's denormals
    return sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u);
  }
  return sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
}
inline uint32_t bfloat16_of(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
// Without a branch: loops over it become vectors.
inline float float_of_half(uint32_t half) {
  const uint32_t shifted = (half & 0x7fffu) << 13;
  const uint32_t magnitude = bit_cast<uint32_t>(bit_cast<float>(shifted) * 0x1p112f);  // exact, denormals too
  const uint32_t special = shifted >= 0x0f800000u ? 0x7f800000u : 0u;                  // Inf and NaN
  return bit_cast<float>(magnitude | special | (half & 0x8000u) << 16);
}

}  // namespace host_layer

// --- Where this thread is -------------------------------------------------------------------------------------------

inline int thread_index() { return host_layer::place.thread; }
inline int block_index() { return host_layer::place.block; }
inline int lane_index() { return host_layer::place.thread & 31; }
inline int warp_index() { return host_layer::place.thread >> 5; }
inline char* shared_memory() { return host_layer::place.shared; }

// --- Waiting for each other -----------------------------------------------------------------------------------------

inline void sync_block() { host_layer::meet(host_layer::Meeting::kSyncBlock, nullptr); }
inline bool sync_block_or(bool value) {
  host_layer::meet(host_layer::Meeting::kSyncBlockOr, &value);
  return value;
}
inline void sync_warp() { host_layer::meet(host_layer::Meeting::kSyncWarp, nullptr); }

// --- Within a warp --------------------------------------------------------------------------------------------------

inline float shuffle_xor(float value, int mask) {
  host_layer::meet(host_layer::Meeting::kShuffleXor, &value, &mask);
  return value;
}
inline float shuffle(float value, int lane) {
  host_layer::meet(host_layer::Meeting::kShuffle, &value, &lane);
  return value;
}
inline uint32_t shuffle(uint32_t value, int lane) {
  host_layer::meet(host_layer::Meeting::kShuffle, &value, &lane);
  return value;
}
inline bool any_in_warp(bool value) {
  host_layer::meet(host_layer::Meeting::kAnyInWarp, &value);
  return value;
}

// --- Memory ---------------------------------------------------------------------------------------------------------

inline void copy_async(void* shared, const void* global, bool exists) {
  host_layer::start_copy(shared, global, 16, exists);
}
template <int kBytes>
inline void copy_async_few(void* shared, const void* global, bool exists) {
  static_assert(kBytes == 4 || kBytes == 8, "what cp.async.ca takes");
  host_layer::start_copy(shared, global, kBytes, exists);
}
inline void copy_async_commit() { host_layer::commit_copies(); }
template <int pending>
inline void copy_async_wait() {
  host_layer::wait_for_copies(pending);
}

using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* p) { return reinterpret_cast<SharedAddress>(p); }
inline const void* shared_place(SharedAddress address) { return reinterpret_cast<const void*>(address); }

inline void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  host_layer::meet(host_layer::Meeting::kLoadMatrices, r, host_layer::read_row(shared_place(row)));
}
inline void load_matrices_transposed(uint32_t (&r)[4], SharedAddress row) {
  host_layer::meet(host_layer::Meeting::kLoadMatricesTransposed, r, host_layer::read_row(shared_place(row)));
}

struct alignas(16) Bytes16 {
  uint32_t word[4];
};

inline void fence_acquire_release() { __atomic_thread_fence(__ATOMIC_ACQ_REL); }
inline uint64_t compare_and_swap(uint64_t* address, uint64_t expected, uint64_t desired) {
  __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// --- Matrix products ------------------------------------------------------------------------------------------------

inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host_layer::meet(host_layer::Meeting::kMmaF16, d, a, b);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host_layer::meet(host_layer::Meeting::kMmaBf16, d, a, b);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host_layer::meet(host_layer::Meeting::kMmaTf32, d, a, b);
}

// --- Numbers --------------------------------------------------------------------------------------------------------

inline uint32_t bits_of(float x) { return host_layer::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return host_layer::bit_cast<float>(bits); }

inline SharedAddress opaque(SharedAddress x) { return x; }
inline int recomputed(int x) { return x; }
inline void replace_if_equal(float& value, float candidate, int a, int b) { value = a == b ? candidate : value; }

inline float exp2_fast(float x) {
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
inline float product(float x, float y) { return x * y; }  // kernels are compiled with -ffp-contract=off
inline float min_or_nan(float x, float y) { return x < y || x != x ? x : y; }
inline float log2_fast(float x) { return log2f(x); }
inline float log_of(float x) { return logf(x); }
inline float tanh_of(float x) { return tanhf(x); }
inline uint32_t multiply_high(uint32_t x, uint32_t y) { return static_cast<uint64_t>(x) * y >> 32; }

inline uint32_t round_to_tf32(float x) {
  return x != x ? 0x7fffffffu : (bits_of(x) + 0x1000u) & 0xffffe000u;
}
inline uint32_t pack_f16(float low, float high) { return host_layer::half_of(low) | host_layer::half_of(high) << 16; }
inline uint32_t pack_bf16(float low, float high) {
  return host_layer::bfloat16_of(low) | host_layer::bfloat16_of(high) << 16;
}
inline float from_f16(uint16_t bits) { return host_layer::float_of_half(bits); }

}  // namespace cuda
}  // namespace attn_ops
