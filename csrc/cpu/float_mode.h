// How a processor rounds, for as long as kernels run on a thread: to the nearest, and numbers below the smallest normal one are
// kept. Frameworks and hosts set other modes in some of their threads (TensorFlow flushes to zero in its executors, not in
// Python's thread), and the bits of a result may hang neither on which thread computed it nor on who called.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace attn_ops::cpu {
namespace {

class FloatMode {
 public:
  FloatMode() : FloatMode(kDefault) {}
  // As it was found, with the flags of exceptions that somebody may be waiting for.
  ~FloatMode() { set(found_); }
  FloatMode(const FloatMode&) = delete;

 private:
#if defined(__x86_64__)
  using Word = unsigned;
  static constexpr Word kDefault = 0x1F80;  // all exceptions masked; MXCSR
  static constexpr Word kFlags = 0x003F;
  static Word get() { return _mm_getcsr(); }
  static void set(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kDefault = 0, kFlags = 0;  // FPCR; its flags are in another register, which nothing here clears
  static Word get() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void set(Word word) { asm volatile("msr fpcr, %0" ::"r"(word)); }
#else
  using Word = int;
  static constexpr Word kDefault = 0, kFlags = 0;
  static Word get() { return 0; }
  static void set(Word) {}
#endif

 protected:
#if defined(__x86_64__)
  static constexpr Word kFlushing = kDefault | 0x8040;  // subnormal factors and results are 0
#endif
  explicit FloatMode(Word wanted) : found_(get()) {
    if ((found_ & ~kFlags) != wanted) set(wanted);
  }

 private:
  const Word found_;
};

}  // namespace
}  // namespace attn_ops::cpu
