// Handlers of XLA's foreign function interface (FFI), API 0.1: taken by the XLA of every TensorFlow from 2.18 up, and by
// JAX's. They are written against the C interface: operands and attributes vary in number, and nothing but plain data
// crosses the border between compilers. Exceptions stay inside this file; XLA sees an error.
#include "xla.h"

#include <cstring>
#include <string>
#include <string_view>

#include "heap_workspace.h"
#include "op_call.h"
#include "worker_pool.h"

namespace attn_ops::xla {
namespace {

XLA_FFI_Error* error(const XLA_FFI_Api* api, XLA_FFI_Error_Code code, const std::string& message) {
  XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message.c_str(), code};
  return api->XLA_FFI_Error_Create(&args);
}

void destroy(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  api->XLA_FFI_Error_Destroy(&args);
}

DType dtype_of(XLA_FFI_DataType type, const char* name) {
  switch (type) {
    case XLA_FFI_DataType_F32: return DType::kFloat32;
    case XLA_FFI_DataType_F64: return DType::kFloat64;
    case XLA_FFI_DataType_F16: return DType::kFloat16;
    case XLA_FFI_DataType_BF16: return DType::kBFloat16;
    case XLA_FFI_DataType_PRED: return DType::kBool;
    default:
      throw std::invalid_argument(std::string(name) +
                                  " must be float32, float64, float16, bfloat16 or bool, got XLA's " + "type " +
                                  text(int64_t{type}));
  }
}

class Attributes {
 public:
  explicit Attributes(const XLA_FFI_Attrs& attributes) : attributes_(attributes) {}

  int64_t integer(const char* name) const { return scalar<int64_t>(name, XLA_FFI_DataType_S64); }
  bool boolean(const char* name) const { return scalar<bool>(name, XLA_FFI_DataType_PRED); }
  std::string string(const char* name) const {
    const auto* span = static_cast<const XLA_FFI_ByteSpan*>(find(name, XLA_FFI_AttrType_STRING));
    return std::string(span->ptr, span->len);
  }

 private:
  template <class T>
  T scalar(const char* name, XLA_FFI_DataType type) const {
    const auto* value = static_cast<const XLA_FFI_Scalar*>(find(name, XLA_FFI_AttrType_SCALAR));
    if (value->dtype != type) wrong(name);
    return *static_cast<const T*>(value->value);
  }

  const void* find(const char* name, XLA_FFI_AttrType type) const {
    for (int64_t i = 0; i < attributes_.size; ++i) {
      if (std::string_view(attributes_.names[i]->ptr, attributes_.names[i]->len) != name) continue;
      if (attributes_.types[i] != type) break;
      return attributes_.attrs[i];
    }
    wrong(name);
  }

  [[noreturn]] static void wrong(const char* name) {
    throw std::invalid_argument(std::string("the attribute '") + name + "' is missing, or of another type");
  }

  const XLA_FFI_Attrs& attributes_;
};

// The operands in their order.
class Operands {
 public:
  explicit Operands(const XLA_FFI_Args& args) : args_(args) {}

  Array next(const char* name, Element element) {
    if (count_ == args_.size) throw std::invalid_argument(std::string(name) + " is missing: too few operands");
    if (args_.types[count_] != XLA_FFI_ArgType_BUFFER) {
      throw std::invalid_argument(std::string(name) + " must be an array");
    }
    const auto& buffer = *static_cast<const XLA_FFI_Buffer*>(args_.args[count_++]);
    Array a;
    a.name = name;
    a.present = true;
    a.data = buffer.data;
    a.rank = static_cast<int>(buffer.rank);
    for (int i = 0; i < std::min(a.rank, 4); ++i) a.shape[i] = buffer.dims[i];
    if (a.rank == 4) a.stride = contiguous_strides(a.shape);
    switch (element) {
      case Element::kValue: a.dtype = dtype_of(buffer.dtype, name); break;
      case Element::kLength: require(buffer.dtype == XLA_FFI_DataType_S32, name, "int32"); break;
      case Element::kSeed:
        if (buffer.dtype == XLA_FFI_DataType_U32 && a.rank == 1 && a.shape[0] == 4) {
          a.shape[0] = 2;
        } else {
          require(buffer.dtype == XLA_FFI_DataType_S64, name, "int64 [2] or uint32 [4]");
        }
    }
    return a;
  }

  void finish() const {
    if (count_ != args_.size) {
      throw std::invalid_argument("there are " + text(args_.size) + " operands, of which the attributes announce " +
                                  text(count_));
    }
  }

 private:
  static void require(bool holds, const char* name, const char* wanted) {
    if (!holds) throw std::invalid_argument(std::string(name) + " must be " + wanted);
  }

  const XLA_FFI_Args& args_;
  int64_t count_ = 0;
};

// The results, whose shapes whoever wrote the custom call has stated: they must be the right ones.
class Results {
 public:
  explicit Results(const XLA_FFI_Rets& rets) : rets_(rets) {}

  void* next(const char* name, DType dtype, const int64_t* shape, int rank) {
    if (count_ == rets_.size) throw std::invalid_argument(std::string(name) + " is missing: too few results");
    const auto& buffer = *static_cast<const XLA_FFI_Buffer*>(rets_.rets[count_]);
    if (rets_.types[count_++] != XLA_FFI_RetType_BUFFER || buffer.rank != rank ||
        !std::equal(shape, shape + rank, buffer.dims)) {
      throw std::invalid_argument(std::string("the result ") + name + " must have the shape " + text(shape, rank));
    }
    if (dtype_of(buffer.dtype, name) != dtype) {
      throw std::invalid_argument(std::string("the result ") + name + " must be " + text(dtype));
    }
    return buffer.data;
  }

  StridedView next_view(const char* name, DType dtype, const Shape4& shape, Layout layout) {
    return output_view(next(name, dtype, shape.data(), 4), dtype, shape, layout);
  }

 private:
  const XLA_FFI_Rets& rets_;
  int64_t count_ = 0;
};

// XLA's intra-op threads, or our own where it has none.
class PoolThreads {
 public:
  explicit PoolThreads(const XLA_FFI_CallFrame& frame) : frame_(frame) {
    if (!count()) {
      count_ = available_cpus();
      scheduler_ = WorkerPool::with(count_ - 1).scheduler();
    }
  }
  Threads threads() { return lend(&scheduler_, count_); }

 private:
  // Whether there is a pool.
  bool count() {
    const XLA_FFI_Api& api = *frame_.api;
    // TensorFlow 2.18 and 2.19 do not tell how many threads there are: too many tasks only find nothing left to do.
    count_ = available_cpus();
    if (api.struct_size > offsetof(XLA_FFI_Api, XLA_FFI_ThreadPool_NumThreads)) {
      int64_t threads = 0;
      XLA_FFI_ThreadPool_NumThreads_Args args{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, frame_.ctx,
                                              &threads};
      if (XLA_FFI_Error* e = api.XLA_FFI_ThreadPool_NumThreads(&args)) {
        destroy(frame_.api, e);
        return false;
      }
      count_ = static_cast<int>(std::max<int64_t>(threads, 1));
    }
    scheduler_ = {this, [](void* self, Scheduler::Task task, void* arg) {
                    const XLA_FFI_CallFrame& frame = static_cast<PoolThreads*>(self)->frame_;
                    XLA_FFI_ThreadPool_Schedule_Args args{XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr,
                                                          frame.ctx, task, arg};
                    if (XLA_FFI_Error* e = frame.api->XLA_FFI_ThreadPool_Schedule(&args)) {
                      destroy(frame.api, e);
                      task(arg);
                    }
                  }};
    return true;
  }

  const XLA_FFI_CallFrame& frame_;
  int count_ = 1;
  Scheduler scheduler_;
};

void forward(const XLA_FFI_CallFrame& frame, const Call& call) {
  const Sizes n = sizes_of(call);
  const int64_t statistics[3] = {n.batch, n.num_heads, n.seqlen_q};
  Results results(frame.rets);
  AttentionParams params = to_params(call);
  params.out = results.next_view("out", params.dtype, n.output(call.layout), call.layout);
  params.lse = results.next("lse", accumulator_of(params.dtype), statistics, 3);
  PoolThreads pool(frame);
  const Threads threads = pool.threads();
  const HeapWorkspace workspace(cpu::forward_workspace_bytes(params, threads.count));
  if (!cpu::forward(params, threads, workspace.lend())) throw std::runtime_error("the kernel refused its workspace");
}

void backward(const XLA_FFI_CallFrame& frame, const Call& call, bool wants_d_bias) {
  Results results(frame.rets);
  BackwardParams params = to_backward_params(call);
  params.dq = results.next_view("dq", call.q.dtype, call.q.shape, call.layout);
  params.dk = results.next_view("dk", call.k.dtype, call.k.shape, call.layout);
  params.dv = results.next_view("dv", call.v.dtype, call.v.shape, call.layout);
  if (wants_d_bias) params.d_bias = results.next("d_bias", call.bias.dtype, call.bias.shape.data(), 4);
  PoolThreads pool(frame);
  const Threads threads = pool.threads();
  const HeapWorkspace workspace(cpu::backward_workspace_bytes(params, threads.count));
  if (!cpu::backward(params, threads, workspace.lend())) throw std::runtime_error("the kernel refused its workspace");
}

template <bool is_backward>
XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame) {
  // XLA asks once, without arrays, which version the handler was written for.
  if (frame->extension_start != nullptr && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    metadata->traits = 0;
    return nullptr;
  }
  const auto fail = [frame](XLA_FFI_Error_Code code, const char* message) {
    return error(frame->api, code, std::string(kHandlers[is_backward].name) + ": " + message);
  };
  try {
    const OpCall node(Attributes(frame->attrs), is_backward);
    Operands operands(frame->args);
    const Call call =
        node.with_arrays([&operands](const char* name, Element element) { return operands.next(name, element); });
    operands.finish();
    is_backward ? backward(*frame, call, node.wants_d_bias()) : forward(*frame, call);
    return nullptr;
  } catch (const std::invalid_argument& e) {
    return fail(XLA_FFI_Error_Code_INVALID_ARGUMENT, e.what());
  } catch (const std::bad_alloc&) {
    return fail(XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "out of memory");
  } catch (const std::exception& e) {
    return fail(XLA_FFI_Error_Code_INTERNAL, e.what());
  }
}

}  // namespace

const Handler kHandlers[kNumHandlers] = {{"attn_ops.forward", handle<false>}, {"attn_ops.backward", handle<true>}};

}  // namespace attn_ops::xla
