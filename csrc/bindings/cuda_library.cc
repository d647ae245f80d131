#include "cuda_library.h"

#include <dlfcn.h>
#include <unistd.h>

#include <stdexcept>

namespace attn_ops {
namespace {

constexpr const char* kFile = "libattn_ops_cuda.so";

std::string path() {
  Dl_info own{};
  dladdr(reinterpret_cast<const void*>(&cuda_library), &own);
  const std::string file = own.dli_fname == nullptr ? "" : own.dli_fname;
  const size_t slash = file.rfind('/');
  return slash == std::string::npos ? kFile : file.substr(0, slash + 1) + kFile;
}

struct Opened {
  CudaLibrary functions{};
  std::string reason;  // "" when the functions are there
};

template <class Function>
void find(void* library, const char* symbol, Function* function, std::string* reason) {
  *function = reinterpret_cast<Function>(dlsym(library, symbol));
  if (*function == nullptr && reason->empty()) *reason = path() + " has no " + symbol + ": it is of another build";
}

Opened open_library() {
  Opened opened;
  std::string& reason = opened.reason;
  if (!cuda_library_exists()) {
    reason = path() + " does not exist: the package was built without the CUDA kernels";
    return opened;
  }
  void* library = dlopen(path().c_str(), RTLD_NOW | RTLD_LOCAL);  // for the life of the process
  if (library == nullptr) {
    const char* error = dlerror();
    reason = "the library of the CUDA kernels cannot be loaded: " + std::string(error ? error : path().c_str());
    return opened;
  }
  CudaLibrary& f = opened.functions;
  decltype(&attn_ops_cuda_abi) abi = nullptr;
  find(library, "attn_ops_cuda_abi", &abi, &reason);
  find(library, "attn_ops_cuda_unavailable_reason", &f.unavailable_reason, &reason);
  find(library, "attn_ops_cuda_unsupported_reason", &f.unsupported_reason, &reason);
  find(library, "attn_ops_cuda_forward_workspace_bytes", &f.forward_workspace_bytes, &reason);
  find(library, "attn_ops_cuda_backward_workspace_bytes", &f.backward_workspace_bytes, &reason);
  find(library, "attn_ops_cuda_forward", &f.forward, &reason);
  find(library, "attn_ops_cuda_backward", &f.backward, &reason);
  find(library, "attn_ops_cuda_error_text", &f.error_text, &reason);
  const uint64_t expected = uint64_t{sizeof(AttentionParams)} << 32 | sizeof(BackwardParams);
  if (reason.empty() && abi() != expected) reason = path() + " is of another version of attn_ops";
  return opened;
}

const Opened& opened() {
  static const Opened* result = new Opened(open_library());  // never destroyed: kernels may run until the very end
  return *result;
}

}  // namespace

const CudaLibrary& cuda_library() {
  if (!opened().reason.empty()) throw std::runtime_error(opened().reason);
  return opened().functions;
}

bool cuda_library_exists() { return access(path().c_str(), R_OK) == 0; }

std::string cuda_unavailable_reason(int device) {
  return opened().reason.empty() ? opened().functions.unavailable_reason(device) : opened().reason;
}

}  // namespace attn_ops
