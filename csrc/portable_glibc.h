// Included in front of every source file by the build: asks glibc for the oldest versions of these functions, so that
// a binary built on a new Linux runs on one with glibc 2.28. What changed in the newer versions is how errno is set
// (libm, 2.29) and the library that holds the function (2.34).
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__)
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver exp2,exp2@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
__asm__(".symver log2,log2@GLIBC_2.2.5");
__asm__(".symver pow,pow@GLIBC_2.2.5");
__asm__(".symver pthread_once,pthread_once@GLIBC_2.2.5");
#endif
