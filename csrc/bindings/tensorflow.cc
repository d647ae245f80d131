// The operators AttnOps>Forward and AttnOps>Backward for TensorFlow, through its C API: one binary for every
// TensorFlow from 2.16 up. Exceptions stay inside this file; whoever calls in sees a status.
#include "tensorflow/c/kernels.h"

#include <link.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "eigen_pool.h"
#include "op_call.h"
#include "tf_capi.h"
#include "tf_hint.h"
#include "tf_shapes.h"

namespace attn_ops::tf {
namespace {

constexpr const char* kForward = "AttnOps>Forward";
constexpr const char* kBackward = "AttnOps>Backward";

// Calls `body`; what it throws is reported to `fail` as a status that starts with the name of the operator.
template <class Body, class Fail>
void guarded(const char* name, Body body, Fail fail) {
  const auto report = [&](TF_Code code, const char* message) {
    Status status;
    TF_SetStatus(status, code, (std::string(name) + ": " + message).c_str());
    fail(static_cast<TF_Status*>(status));
  };
  try {
    body();
  } catch (const Error& e) {
    report(e.code, e.what());
  } catch (const std::invalid_argument& e) {
    report(TF_INVALID_ARGUMENT, e.what());
  } catch (const std::bad_alloc&) {
    report(TF_RESOURCE_EXHAUSTED, "out of memory");
  } catch (const std::exception& e) {
    report(TF_INTERNAL, e.what());
  }
}

DType dtype_of(TF_DataType type) {
  switch (type) {
    case TF_FLOAT: return DType::kFloat32;
    case TF_DOUBLE: return DType::kFloat64;
    case TF_HALF: return DType::kFloat16;
    case TF_BFLOAT16: return DType::kBFloat16;
    default: return DType::kBool;
  }
}

// One node of a graph: its attributes, checked once, and its executions.
class Kernel {
 public:
  Kernel(const Attributes& attributes, bool backward)
      : node_(attributes, backward), type_(attributes.type("T")), lse_type_(attributes.type("Tlse")) {
    if (dtype_of(lse_type_) != accumulator_of(dtype_of(type_))) {
      throw std::invalid_argument("Tlse must be double when T is double, else float");
    }
  }

  void compute(TF_OpKernelContext* context) const {
    Inputs inputs(context);
    const Call call = node_.with_arrays([&inputs](const char* name, Element) { return inputs.next(name); });
    KernelThreads pool(context);
    call.backward ? run_backward(Execution(context), call, pool.threads())
                  : run_forward(Execution(context), call, pool.threads());
  }

 private:
  // The inputs in their order, kept alive for the execution.
  class Inputs {
   public:
    explicit Inputs(TF_OpKernelContext* context) : execution_(context) {}

    Array next(const char* name) {
      tensors_[count_] = execution_.input(count_);
      const TF_Tensor* tensor = tensors_[count_++].get();
      Array a;
      a.name = name;
      a.present = true;
      a.data = TF_TensorData(tensor);
      a.dtype = dtype_of(TF_TensorType(tensor));
      a.rank = TF_NumDims(tensor);
      for (int i = 0; i < std::min(a.rank, 4); ++i) a.shape[i] = TF_Dim(tensor, i);
      if (a.rank == 4) a.stride = contiguous_strides(a.shape);
      return a;
    }

   private:
    Execution execution_;
    Tensor tensors_[11 + kMaxMasks];  // q k v out lse d_out d_lse bias masks lengths seed
    int count_ = 0;
  };

  void run_forward(const Execution& execution, const Call& call, Threads threads) const {
    const Sizes n = sizes_of(call);
    const Shape4 shape = n.output(call.layout);
    const int64_t statistics[3] = {n.batch, n.num_heads, n.seqlen_q};
    const Tensor out = execution.output(0, type_, shape.data(), 4);
    const Tensor lse = execution.output(1, lse_type_, statistics, 3);
    AttentionParams params = to_params(call);
    params.out = output_view(TF_TensorData(out.get()), params.dtype, shape, call.layout);
    params.lse = TF_TensorData(lse.get());
    const Scratch scratch(execution, cpu::forward_workspace_bytes(params, threads.count));
    if (!cpu::forward(params, threads, scratch.workspace())) refused();
  }

  void run_backward(const Execution& execution, const Call& call, Threads threads) const {
    const Tensor dq = execution.output(0, type_, call.q.shape.data(), 4);
    const Tensor dk = execution.output(1, type_, call.k.shape.data(), 4);
    const Tensor dv = execution.output(2, type_, call.v.shape.data(), 4);
    BackwardParams params = to_backward_params(call);
    params.dq = output_view(TF_TensorData(dq.get()), call.q.dtype, call.q.shape, call.layout);
    params.dk = output_view(TF_TensorData(dk.get()), call.k.dtype, call.k.shape, call.layout);
    params.dv = output_view(TF_TensorData(dv.get()), call.v.dtype, call.v.shape, call.layout);
    Tensor d_bias;
    if (node_.wants_d_bias()) {
      d_bias = execution.output(3, type_, call.bias.shape.data(), 4);
      params.d_bias = TF_TensorData(d_bias.get());
    } else if (node_.has_bias()) {
      const int64_t none = 0;
      d_bias = execution.output(3, type_, &none, 1);
    }
    const Scratch scratch(execution, cpu::backward_workspace_bytes(params, threads.count));
    if (!cpu::backward(params, threads, scratch.workspace())) refused();
  }

  [[noreturn]] static void refused() { throw Error(TF_INTERNAL, "the kernel refused its workspace"); }

  class Scratch {
   public:
    Scratch(const Execution& execution, size_t bytes) : bytes_(bytes) {
      if (bytes > 0) tensor_ = execution.temporary(bytes + kAlignment);
    }
    Workspace workspace() const {
      if (tensor_ == nullptr) return {};
      const uintptr_t address = reinterpret_cast<uintptr_t>(TF_TensorData(tensor_.get()));
      return {reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment), bytes_};
    }

   private:
    static constexpr size_t kAlignment = 64;
    size_t bytes_;
    Tensor tensor_;
  };

  OpCall node_;
  TF_DataType type_, lse_type_;
};

template <bool backward>
void* create(TF_OpKernelConstruction* construction) {
  Kernel* kernel = nullptr;
  guarded(
      backward ? kBackward : kForward, [&] { kernel = new Kernel(Attributes(construction), backward); },
      [&](TF_Status* status) { TF_OpKernelConstruction_Failure(construction, status); });
  return kernel;
}

template <bool backward>
void compute(void* kernel, TF_OpKernelContext* context) {
  guarded(
      backward ? kBackward : kForward, [&] { static_cast<Kernel*>(kernel)->compute(context); },
      [&](TF_Status* status) { TF_OpKernelContext_Failure(context, status); });
}

void destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

template <bool backward>
void infer_shapes(TF_ShapeInferenceContext* context, TF_Status* result) {
  guarded(
      backward ? kBackward : kForward,
      [&] {
        ShapeFunction shapes(context);
        backward ? shapes.backward() : shapes.forward();
      },
      [&](TF_Status* status) { TF_SetStatus(result, TF_GetCode(status), TF_Message(status)); });
}

template <bool backward>
void register_operator() {
  const char* name = backward ? kBackward : kForward;
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder(name);
  for (const char* attribute :
       {"T: {float, double, half, bfloat16}", "Tlse: {float, double} = DT_FLOAT", "num_bias: int >= 0",
        "num_masks: int >= 0", "num_query_lengths: int >= 0", "num_key_lengths: int >= 0", "num_seed: int >= 0",
        "scale: string = ''", "dropout_rate: string = '0'", "window_left: int = -1", "window_right: int = -1",
        "bottom_right: bool = false", "layout: {'BSHD', 'BHSD'} = 'BSHD'"}) {
    TF_OpDefinitionBuilderAddAttr(op, attribute);
  }
  for (const char* input : {"q: T", "k: T", "v: T"}) TF_OpDefinitionBuilderAddInput(op, input);
  if (backward) {
    TF_OpDefinitionBuilderAddAttr(op, "num_d_lse: int >= 0");
    TF_OpDefinitionBuilderAddAttr(op, "d_bias: bool = true");
    for (const char* input : {"out: T", "lse: Tlse", "d_out: T", "d_lse: num_d_lse * Tlse"}) {
      TF_OpDefinitionBuilderAddInput(op, input);
    }
  }
  for (const char* input : {"bias: num_bias * T", "masks: num_masks * bool", "query_lengths: num_query_lengths * int32",
                            "key_lengths: num_key_lengths * int32", "seed: num_seed * int64"}) {
    TF_OpDefinitionBuilderAddInput(op, input);
  }
  if (backward) {
    for (const char* output : {"dq: T", "dk: T", "dv: T", "grad_bias: num_bias * T"}) {
      TF_OpDefinitionBuilderAddOutput(op, output);
    }
  } else {
    for (const char* output : {"out: T", "lse: Tlse"}) TF_OpDefinitionBuilderAddOutput(op, output);
  }
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, infer_shapes<backward>);
  Status status;
  TF_RegisterOpDefinition(op, status);
  status.check();
  TF_KernelBuilder* kernel = TF_NewKernelBuilder(name, "CPU", create<backward>, compute<backward>, destroy);
  TF_RegisterKernelBuilder(name, kernel, status);
  status.check();
}

// The path of another copy of this library in the process, or "". Two copies would register every kernel twice, and
// then TensorFlow refuses to run either.
std::string other_copy() {
  struct Search {
    const void* here;
    std::string found;
  } search{reinterpret_cast<const void*>(&other_copy), ""};
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void* arg) {
        Search& search = *static_cast<Search*>(arg);
        const char* slash = std::strrchr(object->dlpi_name, '/');
        if (slash == nullptr || std::strcmp(slash + 1, "libattn_ops.so") != 0) return 0;
        const uintptr_t offset = reinterpret_cast<uintptr_t>(search.here) - object->dlpi_addr;
        for (int i = 0; i < object->dlpi_phnum; ++i) {
          const ElfW(Phdr) & part = object->dlpi_phdr[i];
          if (part.p_type == PT_LOAD && offset - part.p_vaddr < part.p_memsz) return 0;  // this copy
        }
        search.found = object->dlpi_name;
        return 1;
      },
      &search);
  return search.found;
}

__attribute__((constructor)) void register_operators() {
  try {
    const std::string other = other_copy();
    if (!other.empty()) {
      std::fprintf(stderr, "attn_ops: a copy of this library is already loaded from %s; this one stays unused\n",
                   other.c_str());
      return;
    }
    register_operator<false>();
    register_operator<true>();
    register_hint();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "attn_ops: the operators could not be registered: %s\n", e.what());
  }
}

}  // namespace
}  // namespace attn_ops::tf
