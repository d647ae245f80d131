// TensorFlow's kernels of AttnOps>Forward and AttnOps>Backward, the same for every device but for where they run
// (tf_devices.h). Exceptions stay inside; TensorFlow sees a status.
#pragma once

#include <string>

#include "cuda_kernels.h"
#include "op_call.h"
#include "tf_capi.h"

namespace attn_ops::tf {

constexpr const char* operator_name(bool backward) { return backward ? "AttnOps>Backward" : "AttnOps>Forward"; }

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
  } catch (const Unsupported& e) {
    report(TF_UNIMPLEMENTED, e.what());
  } catch (const std::invalid_argument& e) {
    report(TF_INVALID_ARGUMENT, e.what());
  } catch (const std::bad_alloc&) {
    report(TF_RESOURCE_EXHAUSTED, "out of memory");
  } catch (const std::exception& e) {
    report(TF_INTERNAL, e.what());
  }
}

inline DType dtype_of(TF_DataType type) {
  switch (type) {
    case TF_FLOAT: return DType::kFloat32;
    case TF_DOUBLE: return DType::kFloat64;
    case TF_HALF: return DType::kFloat16;
    case TF_BFLOAT16: return DType::kBFloat16;
    default: return DType::kBool;
  }
}

// One node of a graph: its attributes, checked once, and its executions.
template <class Device>
class Kernel {
 public:
  Kernel(const Attributes& attributes, bool backward)
      : node_(attributes, Device::kPlace, backward),
        type_(attributes.type("T")),
        bias_type_(attributes.type("Tbias")),
        lse_type_(attributes.type("Tlse")) {
    if (dtype_of(lse_type_) != accumulator_of(dtype_of(type_))) {
      throw std::invalid_argument("Tlse must be double when T is double, else float");
    }
  }

  void compute(TF_OpKernelContext* context) const {
    Inputs inputs(context);
    const Call call = node_.with_arrays([&inputs](const char* name, Element) { return inputs.next(name); });
    Device device(context);
    call.backward ? run_backward(Execution(context), call, device.kernels())
                  : run_forward(Execution(context), call, device.kernels());
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
    Tensor tensors_[11 + kMaxMasks];  // q k v out statistics d_out d_lse bias masks lengths seed
    int count_ = 0;
  };

  template <class Kernels>
  void run_forward(const Execution& execution, const Call& call, const Kernels& kernels) const {
    const Sizes n = sizes_of(call);
    const Shape4 shape = n.output(call.layout);
    const Tensor out = execution.output(0, type_, shape.data(), 4);
    const Tensor statistics = execution.output(1, lse_type_, n.statistics().data(), 4);
    AttentionParams params = to_params(call);
    params.out = output_view(TF_TensorData(out.get()), params.dtype, shape, call.layout);
    params.statistics = TF_TensorData(statistics.get());
    Tensor lse;
    if (node_.wants_lse()) {
      lse = execution.output(2, lse_type_, n.lse().data(), 3);
      params.lse = TF_TensorData(lse.get());
    }
    const Scratch scratch(execution, kernels.workspace_bytes(params));
    kernels.run(params, scratch.workspace());
  }

  template <class Kernels>
  void run_backward(const Execution& execution, const Call& call, const Kernels& kernels) const {
    const Tensor dq = execution.output(0, type_, call.q.shape.data(), 4);
    const Tensor dk = execution.output(1, type_, call.k.shape.data(), 4);
    const Tensor dv = execution.output(2, type_, call.v.shape.data(), 4);
    BackwardParams params = to_backward_params(call);
    params.dq = output_view(TF_TensorData(dq.get()), call.q.dtype, call.q.shape, call.layout);
    params.dk = output_view(TF_TensorData(dk.get()), call.k.dtype, call.k.shape, call.layout);
    params.dv = output_view(TF_TensorData(dv.get()), call.v.dtype, call.v.shape, call.layout);
    Tensor d_bias;
    if (node_.wants_d_bias()) {
      d_bias = execution.output(3, bias_type_, call.bias.shape.data(), 4);
      params.d_bias = TF_TensorData(d_bias.get());
    } else if (node_.has_bias()) {
      const int64_t none = 0;
      d_bias = execution.output(3, bias_type_, &none, 1);
    }
    const Scratch scratch(execution, kernels.workspace_bytes(params));
    kernels.run(params, scratch.workspace());
  }

  class Scratch {
   public:
    Scratch(const Execution& execution, size_t bytes) : bytes_(bytes) {
      if (bytes > 0) tensor_ = execution.temporary(bytes + kAlignment, Device::kPlace == Place::kCpu);
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
  TF_DataType type_, bias_type_, lse_type_;
};

template <class Device, bool backward>
void* create(TF_OpKernelConstruction* construction) {
  Kernel<Device>* kernel = nullptr;
  guarded(
      operator_name(backward), [&] { kernel = new Kernel<Device>(Attributes(construction), backward); },
      [&](TF_Status* status) { TF_OpKernelConstruction_Failure(construction, status); });
  return kernel;
}

template <class Device, bool backward>
void compute(void* kernel, TF_OpKernelContext* context) {
  guarded(
      operator_name(backward), [&] { static_cast<Kernel<Device>*>(kernel)->compute(context); },
      [&](TF_Status* status) { TF_OpKernelContext_Failure(context, status); });
}

template <class Device>
void destroy(void* kernel) {
  delete static_cast<Kernel<Device>*>(kernel);
}

template <class Device, bool backward>
void register_kernel(TF_DataType type) {
  const char* name = operator_name(backward);
  TF_KernelBuilder* kernel =
      TF_NewKernelBuilder(name, Device::kType, create<Device, backward>, compute<Device, backward>, destroy<Device>);
  Status status;
  TF_KernelBuilder_TypeConstraint(kernel, "T", type, status);
  status.check();
  TF_RegisterKernelBuilder(name, kernel, status);
  status.check();
}

}  // namespace attn_ops::tf
