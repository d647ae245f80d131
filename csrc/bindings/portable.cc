// Stand-ins for what inline code of a newer libstdc++ or glibc expects from the shared library, so that the binary
// runs where that is older (the floor is checked in tests/package/). They stay inside our libraries: the
// version scripts hide them.
#include <new>

namespace std {
[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }  // GLIBCXX_3.4.29
}  // namespace std

extern "C" {

// GLIBC_2.32. "There may be other threads" is always right.
char __libc_single_threaded = 0;

// CXXABI_1.3.13: the reference count of std::exception_ptr (one pointer), which pybind11 passes about. Older
// libraries count in the constructor and destructor, and newer ones still export those.
#define ATTN_OPS_EXCEPTION_PTR "_ZNSt15__exception_ptr13exception_ptr"
void attn_ops_copy(void* to, const void* from);
void attn_ops_destroy(void* self);
__asm__(".symver attn_ops_copy," ATTN_OPS_EXCEPTION_PTR "C1ERKS0_@CXXABI_1.3.3");
__asm__(".symver attn_ops_destroy," ATTN_OPS_EXCEPTION_PTR "D1Ev@CXXABI_1.3.3");

void attn_ops_add_reference(void* self) __asm__(ATTN_OPS_EXCEPTION_PTR "9_M_addrefEv");
void attn_ops_add_reference(void* self) {
  void* never_destroyed;
  attn_ops_copy(&never_destroyed, self);
}

void attn_ops_release(void** self) __asm__(ATTN_OPS_EXCEPTION_PTR "10_M_releaseEv");
void attn_ops_release(void** self) {
  attn_ops_destroy(self);
  *self = nullptr;
}

}  // extern "C"
