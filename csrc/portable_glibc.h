// Included in front of every source file by the build: asks glibc for the oldest versions of these functions, so that
// a binary built on a new Linux runs on one with glibc 2.28. What changed in the newer versions is how errno is set
// (libm, 2.29) and the library that holds the function (2.34).
#pragma once

#if defined(__gnu_linux__) && (defined(__x86_64__) || defined(__aarch64__))
#if defined(__x86_64__)
#define ATTN_OPS_FIRST_GLIBC "GLIBC_2.2.5"  // the first that the processor had
#else
#define ATTN_OPS_FIRST_GLIBC "GLIBC_2.17"
#endif
__asm__(".symver log,log@" ATTN_OPS_FIRST_GLIBC);
__asm__(".symver pthread_once,pthread_once@" ATTN_OPS_FIRST_GLIBC);
__asm__(".symver dlopen,dlopen@" ATTN_OPS_FIRST_GLIBC);
__asm__(".symver dlsym,dlsym@" ATTN_OPS_FIRST_GLIBC);
__asm__(".symver dlclose,dlclose@" ATTN_OPS_FIRST_GLIBC);
__asm__(".symver dladdr,dladdr@" ATTN_OPS_FIRST_GLIBC);
__asm__(".symver dlerror,dlerror@" ATTN_OPS_FIRST_GLIBC);
#undef ATTN_OPS_FIRST_GLIBC
#endif
