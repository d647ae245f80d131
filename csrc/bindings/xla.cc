// Handlers of XLA's foreign function interface (FFI), API 0.1: taken by the XLA of every TensorFlow from 2.18 up, and
// by JAX's. They are written against the C interface: operands and attributes vary in number, and nothing but plain
// data crosses the border between compilers. Exceptions stay inside this file; XLA sees an error.
#include "xla.h"

#include <string>

#include "op_call.h"
#include "run_call.h"
#include "xla_append.h"
#include "xla_devices.h"
#include "xla_frame.h"

namespace attn_ops::xla {
namespace {

// The forward call takes what AttnOps>Decode does.
constexpr const char* target(Operator which, Memory memory) {
  const bool lent = memory == Memory::kLent;
  if (which == Operator::kBackward) return lent ? "attn_ops.backward.lent" : "attn_ops.backward";
  return lent ? "attn_ops.forward.lent" : "attn_ops.forward";
}

// XLA asks once, without arrays, which version the handler was written for: where to answer. Null in a call.
XLA_FFI_Metadata* metadata_wanted(const XLA_FFI_CallFrame& frame) {
  for (XLA_FFI_Extension_Base* e = frame.extension_start; e != nullptr; e = e->next) {
    if (e->type == XLA_FFI_Extension_Metadata) return reinterpret_cast<XLA_FFI_Metadata_Extension*>(e)->metadata;
  }
  return nullptr;
}

// What XLA asks first, or else the call itself; exceptions become errors of this name.
template <class Run>
XLA_FFI_Error* answer(XLA_FFI_CallFrame* frame, const char* name, bool replayable, const Run& run) {
  if (XLA_FFI_Metadata* metadata = metadata_wanted(*frame)) {
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = replayable ? XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE : 0;
    return nullptr;
  }
  const auto fail = [frame, name](XLA_FFI_Error_Code code, const char* message) {
    return error(frame->api, code, std::string(name) + ": " + message);
  };
  try {
    run();
    return nullptr;
  } catch (const Unsupported& e) {
    return fail(XLA_FFI_Error_Code_UNIMPLEMENTED, e.what());
  } catch (const std::invalid_argument& e) {
    return fail(XLA_FFI_Error_Code_INVALID_ARGUMENT, e.what());
  } catch (const std::bad_alloc&) {
    return fail(XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "out of memory");
  } catch (const std::exception& e) {
    return fail(XLA_FFI_Error_Code_INTERNAL, e.what());
  }
}

template <class Device, Operator which, Memory memory>
XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame) {
  // Fit for CUDA graphs only with memory of its own: XLA's would be given back before a captured graph runs.
  constexpr bool replayable = Device::kPlace == Place::kGpu && memory == Memory::kLent;
  return answer(frame, target(which, memory), replayable, [frame] {
    const OpCall node(Attributes(frame->attrs), Device::kPlace, which);
    Operands operands(frame->args);
    const Call call =
        node.with_arrays([&operands](const char* name, Element element) { return operands.next(name, element); });
    operands.finish();
    Results results(frame->rets, memory);
    Device device(*frame, results.workspace());
    run_call(call, results, device);
  });
}

constexpr const char* kAppend = "attn_ops.append";

XLA_FFI_Error* append(XLA_FFI_CallFrame* frame) {
  return answer(frame, kAppend, false, [frame] { append_rows(Attributes(frame->attrs), frame->args, frame->rets); });
}

template <class Device, Operator which, Memory memory>
constexpr Handler handler(const char* platform) {
  return {platform, target(which, memory), handle<Device, which, memory>};
}

}  // namespace

const Handler kHandlers[kNumHandlers] = {
    handler<HostDevice, Operator::kDecode, Memory::kAsked>("Host"),
    handler<HostDevice, Operator::kBackward, Memory::kAsked>("Host"),
    handler<HostDevice, Operator::kDecode, Memory::kLent>("Host"),
    handler<HostDevice, Operator::kBackward, Memory::kLent>("Host"),
    {"Host", kAppend, append},
    handler<CudaDevice, Operator::kDecode, Memory::kAsked>("CUDA"),
    handler<CudaDevice, Operator::kBackward, Memory::kAsked>("CUDA"),
    handler<CudaDevice, Operator::kDecode, Memory::kLent>("CUDA"),
    handler<CudaDevice, Operator::kBackward, Memory::kLent>("CUDA"),
};

}  // namespace attn_ops::xla
