// Registers the custom calls of xla.cc with the XLA inside the running TensorFlow, when this library is loaded.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "xla.h"

namespace attn_ops::xla {
namespace {

// TensorFlow's main library, under the names it has in Python's wheels and in the C distribution.
void* find(const char* symbol) {
  if (void* found = dlsym(RTLD_DEFAULT, symbol)) return found;
  for (const char* name : {"libtensorflow_cc.so.2", "libtensorflow.so.2"}) {
    // Never loads it: Python keeps it to itself (RTLD_LOCAL), and the handle is how to look inside all the same.
    void* library = dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    void* found = dlsym(library, symbol);
    dlclose(library);
    if (found != nullptr) return found;
  }
  return nullptr;
}

XLA_FFI_ByteSpan span(const char* text) { return {text, std::char_traits<char>::length(text)}; }

std::string text(const XLA_FFI_Api_Version& version) {
  return std::to_string(version.major_version) + "." + std::to_string(version.minor_version);
}

// What an error says, which ends with this. FFI 0.4 writes the error's code behind the message, and asks for the room.
std::string message_of(const XLA_FFI_Api& api, XLA_FFI_Error* error) {
  struct {
    XLA_FFI_Error_GetMessage_Args args;
    int64_t room[8];
  } message{};
  message.args.struct_size = sizeof(message);
  message.args.error = error;
  api.XLA_FFI_Error_GetMessage(&message.args);
  const std::string result = message.args.message == nullptr ? "it does not say why" : message.args.message;
  XLA_FFI_Error_Destroy_Args destroy{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  api.XLA_FFI_Error_Destroy(&destroy);
  return result;
}

// Why XLA does not know the custom calls; empty when it does.
std::string register_handlers() {
  const char* disabled = std::getenv("ATTN_OPS_DISABLE_XLA_FFI");
  if (disabled != nullptr && *disabled != '\0' && std::string(disabled) != "0") {
    return "the environment variable ATTN_OPS_DISABLE_XLA_FFI switches the XLA custom call off";
  }
  const auto version = reinterpret_cast<const char* (*)()>(find("TF_Version"));
  const auto get_api = reinterpret_cast<const XLA_FFI_Api* (*)()>(find("_ZN3xla3ffi12GetXlaFfiApiEv"));
  int major = 0, minor = 0;
  if (version == nullptr || std::sscanf(version(), "%d.%d", &major, &minor) != 2) {
    return "TensorFlow's version cannot be read (TF_Version)";
  }
  // 2.17 has the function, and crashes in the registration.
  if (major < 2 || (major == 2 && minor < 18)) {
    return std::string("TensorFlow ") + version() +
           " is older than 2.18, the oldest whose XLA takes custom calls of FFI";
  }
  const XLA_FFI_Api* api = get_api == nullptr ? nullptr : get_api();
  if (api == nullptr) return std::string("TensorFlow ") + version() + " has no XLA (no GetXlaFfiApi)";
  // Later minor versions take what is written for ours; what another major one takes, nobody has said.
  const XLA_FFI_Api_Version& there = api->api_version;
  if (there.major_version != XLA_FFI_API_MAJOR || there.minor_version < XLA_FFI_API_MINOR) {
    return "XLA of TensorFlow " + std::string(version()) + " takes custom calls of FFI " + text(there) +
           ", and ours are of FFI " + text({0, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR});
  }

  for (const Handler& handler : kHandlers) {
    XLA_FFI_Handler_Register_Args args{};
    args.struct_size = XLA_FFI_Handler_Register_Args_STRUCT_SIZE;
    args.name = span(handler.name);
    args.platform = span(handler.platform);
    args.bundle.execute = handler.run;
    XLA_FFI_Error* error = api->XLA_FFI_Handler_Register(&args);
    if (error == nullptr) continue;
    return std::string("XLA of TensorFlow ") + version() + " (FFI " + text(there) +
           ") refuses the custom call: " + message_of(*api, error);
  }
  return "";
}

const std::string& reason() {
  static const std::string* result = new std::string(register_handlers());
  return *result;
}

__attribute__((constructor)) void at_load() {
  try {
    reason();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "attn_ops: the XLA custom calls could not be registered: %s\n", e.what());
  }
}

}  // namespace
}  // namespace attn_ops::xla

// For attn_ops/kernels: why functions compiled by XLA cannot call the kernels; "" when they can.
extern "C" __attribute__((visibility("default"))) const char* attn_ops_xla_unavailable_reason() {
  return attn_ops::xla::reason().c_str();
}
