// From one fibre to another, on the same host thread: 6 (x86-64) or 20 (64-bit Arm) registers, and no system call.
//
// Written in assembly because of the processor's memory for return addresses: setjmp and longjmp leave it wrong, which
// triples the time.
#pragma once

#include <cstdint>

extern "C" {
// Keeps what a call must preserve on the stack, the stack's end in *from, and goes on where `to` was kept so.
void attn_ops_switch_fibre(void** from, void* to) __attribute__((visibility("hidden")));
}

namespace attn_ops {
namespace cuda {
namespace host_layer {

#if defined(__x86_64__)

asm(R"(
.text
.globl attn_ops_switch_fibre
.hidden attn_ops_switch_fibre
.type attn_ops_switch_fibre, @function
attn_ops_switch_fibre:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size attn_ops_switch_fibre, . - attn_ops_switch_fibre
)");

// What to switch to so that `entry`, which must not return, begins on the stack that ends at `end` (16-byte aligned).
static inline void* new_fibre(char* end, void (*entry)()) {
  void** top = reinterpret_cast<void**>(end);
  *--top = nullptr;  // as if entry had been called from nowhere
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

#elif defined(__aarch64__)

asm(R"(
.text
.globl attn_ops_switch_fibre
.hidden attn_ops_switch_fibre
.type attn_ops_switch_fibre, %function
attn_ops_switch_fibre:
  stp x29, x30, [sp, -160]!
  stp x19, x20, [sp, 16]
  stp x21, x22, [sp, 32]
  stp x23, x24, [sp, 48]
  stp x25, x26, [sp, 64]
  stp x27, x28, [sp, 80]
  stp d8, d9, [sp, 96]
  stp d10, d11, [sp, 112]
  stp d12, d13, [sp, 128]
  stp d14, d15, [sp, 144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, 16]
  ldp x21, x22, [sp, 32]
  ldp x23, x24, [sp, 48]
  ldp x25, x26, [sp, 64]
  ldp x27, x28, [sp, 80]
  ldp d8, d9, [sp, 96]
  ldp d10, d11, [sp, 112]
  ldp d12, d13, [sp, 128]
  ldp d14, d15, [sp, 144]
  ldp x29, x30, [sp], 160
  ret
.size attn_ops_switch_fibre, . - attn_ops_switch_fibre
)");

static inline void* new_fibre(char* end, void (*entry)()) {
  void** top = reinterpret_cast<void**>(end) - 20;
  for (int i = 0; i < 20; ++i) top[i] = nullptr;
  top[1] = reinterpret_cast<void*>(entry);  // x30
  return top;
}

#else
#error "fibres are written for x86-64 and 64-bit Arm"
#endif

}  // namespace host_layer
}  // namespace cuda
}  // namespace attn_ops
