/* A TensorFlow of nothing but names, and an XLA that takes custom calls of FFI MAJOR.MINOR, or refuses them (REFUSES).
   Of XLA_FFI_Error_GetMessage it is as strict as XLA: without the room that its version needs there is no message. */
#include <stddef.h>

#include "xla/ffi/api/c_api.h"

static int registered;
int ffi_stub_registered(void) { return registered; }

const char* TF_Version(void) { return "2.99.0"; }

struct XLA_FFI_Error {
  int code;
};
static XLA_FFI_Error refusal = {9};

static XLA_FFI_Error* take(XLA_FFI_Handler_Register_Args* args) {
  if (REFUSES) return &refusal;
  registered += args->struct_size == XLA_FFI_Handler_Register_Args_STRUCT_SIZE && args->bundle.execute != NULL;
  return NULL;
}

/* As of FFI 0.4. */
struct Details {
  XLA_FFI_Error_GetMessage_Args args;
  int code;
};

static void tell(XLA_FFI_Error_GetMessage_Args* args) {
  if (MINOR < 4) {
    args->message = "not today";
  } else if (args->struct_size >= offsetof(struct Details, code) + sizeof(int)) {
    args->message = "not today";
    ((struct Details*)args)->code = args->error->code;
  }
}

static void destroy(XLA_FFI_Error_Destroy_Args* args) { args->error->code = 0; }

const XLA_FFI_Api* stub_api(void) __asm__("_ZN3xla3ffi12GetXlaFfiApiEv");
const XLA_FFI_Api* stub_api(void) {
  static XLA_FFI_Api api;
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version.major_version = MAJOR;
  api.api_version.minor_version = MINOR;
  api.XLA_FFI_Handler_Register = take;
  api.XLA_FFI_Error_GetMessage = tell;
  api.XLA_FFI_Error_Destroy = destroy;
  return &api;
}
