// Which of the features that kernels are compiled for this x86 processor and its system have.
#pragma once

#if defined(__x86_64__)

#include <cpuid.h>

namespace attn_ops {
namespace cpu {

struct CpuFeatures {
  bool avx2, fma, f16c, avx512f, avx512bw, avx512vl, avx512dq;

  CpuFeatures() {
    __builtin_cpu_init();
    avx2 = __builtin_cpu_supports("avx2");
    fma = __builtin_cpu_supports("fma");
    avx512f = __builtin_cpu_supports("avx512f");
    avx512bw = __builtin_cpu_supports("avx512bw");
    avx512vl = __builtin_cpu_supports("avx512vl");
    avx512dq = __builtin_cpu_supports("avx512dq");
    // gcc before 11 and clang before 19 do not know this name. Whether the system keeps the registers, AVX says.
    unsigned eax, ebx, ecx = 0, edx;
    f16c = __builtin_cpu_supports("avx") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
  }
};

}  // namespace cpu
}  // namespace attn_ops

#endif
