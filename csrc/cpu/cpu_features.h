// What isas.inc asks of the processor that this code runs on.
//
//   ATTN_OPS_ON_<processor>(code)    the code where the compiler is one for that processor
//   ATTN_OPS_CPU_HAS(feature)        whether this processor and its system have it
//   ATTN_OPS_CPU_IS(maker)           whether it is theirs
#pragma once

#define ATTN_OPS_ON_any(...) __VA_ARGS__
#if defined(__x86_64__)
#define ATTN_OPS_ON_x86_64(...) __VA_ARGS__
#else
#define ATTN_OPS_ON_x86_64(...)
#endif
#if defined(__aarch64__)
#define ATTN_OPS_ON_aarch64(...) __VA_ARGS__
#else
#define ATTN_OPS_ON_aarch64(...)
#endif

#if defined(__aarch64__)
#include <sys/auxv.h>

static inline bool attn_ops_cpu_has_bf16() { return (getauxval(AT_HWCAP2) & 1u << 14) != 0; }  // HWCAP2_BF16
#define ATTN_OPS_CPU_HAS(feature) attn_ops_cpu_has_##feature()
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// gcc before 11 and clang before 19 do not know the name f16c: its bit is read instead. Whether the system keeps the
// registers, AVX says.
static inline bool attn_ops_cpu_has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __builtin_cpu_supports("avx") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}
#define ATTN_OPS_INSTEAD_OF_f16c , attn_ops_cpu_has_f16c()
// The same of gcc before 11: leaf 7, 1 has it. The registers are AVX-512's. (ATTN_OPS_EMULATED: tests/avx512.)
static inline bool attn_ops_cpu_has_avx512bf16() {
#ifdef ATTN_OPS_EMULATED
  return true;
#endif
  unsigned eax = 0, ebx, ecx, edx;
  return __builtin_cpu_supports("avx512f") && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 5) != 0;
}
#define ATTN_OPS_INSTEAD_OF_avx512bf16 , attn_ops_cpu_has_avx512bf16()

// Tiles of bfloat16, which Linux (from 5.16 on) lets a process use that asks for the memory in which it saves them. It may say no:
// an older one, one that hides them, or where a thread's signal stack has no room.
static inline bool attn_ops_cpu_has_amxbf16() {
#if defined(ATTN_OPS_EMULATED)
  return true;
#elif !defined(__linux__)
  return false;
#else
  constexpr unsigned kTile = 1u << 24, kBFloat16 = 1u << 22, kSavesRegisters = 1u << 27;
  constexpr unsigned kTileState = 3u << 17;  // of XCR0
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned eax, ebx, ecx = 0, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kSavesRegisters)) return false;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kTile | kBFloat16)) != (kTile | kBFloat16)) return false;
  asm volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (eax & kTileState) == kTileState && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#endif
}
#define ATTN_OPS_INSTEAD_OF_amxbf16 , attn_ops_cpu_has_amxbf16()

#define ATTN_OPS_CPU_IS(maker) attn_ops_cpu_is_##maker()
static inline bool attn_ops_cpu_is_Intel() { return __builtin_cpu_is("intel") != 0; }

#define ATTN_OPS_CPU_HAS(feature) ATTN_OPS_SECOND_OF(ATTN_OPS_INSTEAD_OF_##feature, __builtin_cpu_supports(#feature), )
#define ATTN_OPS_SECOND_OF(...) ATTN_OPS_SECOND(__VA_ARGS__)
#define ATTN_OPS_SECOND(first, second, ...) (second != 0)
#endif
