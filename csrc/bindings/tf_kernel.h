// TensorFlow's kernels of the operators of attention, the same for every device but for where
// they run (tf_devices.h). Exceptions stay inside; TensorFlow sees a status.
#pragma once

#include <string>

#include "cuda_kernels.h"
#include "op_call.h"
#include "run_call.h"
#include "tf_capi.h"

namespace attn_ops::tf {

constexpr const char* operator_name(Operator which) {
  return which == Operator::kBackward ? "AttnOps>Backward"
         : which == Operator::kDecode ? "AttnOps>Decode"
         : which == Operator::kPlain  ? "AttnOps>Plain"
                                      : "AttnOps>Forward";
}

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
    case TF_INT8: return DType::kInt8;
    default: return DType::kBool;
  }
}

inline TF_DataType type_of(DType dtype) {
  for (TF_DataType type : {TF_FLOAT, TF_DOUBLE, TF_HALF, TF_BFLOAT16}) {
    if (dtype_of(type) == dtype) return type;
  }
  return TF_BOOL;
}

// The inputs of one execution in their order, kept alive.
class Inputs {
 public:
  explicit Inputs(TF_OpKernelContext* context) : execution_(context) {}

  Array next(const char* name) {
    tensors_[count_] = execution_.input(count_);
    const TF_Tensor* tensor = tensors_[count_++].get();
    return contiguous_array(name, TF_TensorData(tensor), dtype_of(TF_TensorType(tensor)), TF_NumDims(tensor),
                            [tensor](int i) { return TF_Dim(tensor, i); });
  }

 private:
  Execution execution_;
  // q k v out statistics d_out d_lse bias masks lengths seed intervals offset segments blocks slopes relative sinks
  // table scales
  Tensor tensors_[23 + kMaxMasks];
  int count_ = 0;
};

// The outputs in their order.
class Results {
 public:
  explicit Results(TF_OpKernelContext* context) : execution_(context) {}

  void* next(const char*, DType dtype, const int64_t* shape, int rank) {
    tensors_[count_] = execution_.output(count_, type_of(dtype), shape, rank);
    return TF_TensorData(tensors_[count_++].get());
  }

  // The operator has a gradient for every bias: an empty one where it is not wanted.
  void skip(const char* name, DType dtype) {
    const int64_t none = 0;
    next(name, dtype, &none, 1);
  }
  void finish() {}

 private:
  Execution execution_;
  Tensor tensors_[6];
  int count_ = 0;
};

// One node of a graph: its attributes, checked once, and its executions.
template <class Device>
class Kernel {
 public:
  Kernel(const Attributes& attributes, Operator which) : node_(attributes, Device::kPlace, which) {
    if (dtype_of(attributes.type("Tlse")) != accumulator_of(dtype_of(attributes.type("T")))) {
      throw std::invalid_argument("Tlse must be double when T is double, else float");
    }
  }

  void compute(TF_OpKernelContext* context) const {
    Inputs inputs(context);
    const Call call = node_.with_arrays([&inputs](const char* name, Element) { return inputs.next(name); });
    Results results(context);
    Device device(context);
    run_call(call, results, device);
  }

 private:
  OpCall node_;
};

template <class Device, Operator which>
void* create(TF_OpKernelConstruction* construction) {
  Kernel<Device>* kernel = nullptr;
  guarded(
      operator_name(which), [&] { kernel = new Kernel<Device>(Attributes(construction), which); },
      [&](TF_Status* status) { TF_OpKernelConstruction_Failure(construction, status); });
  return kernel;
}

template <class Device, Operator which>
void compute(void* kernel, TF_OpKernelContext* context) {
  guarded(
      operator_name(which), [&] { static_cast<Kernel<Device>*>(kernel)->compute(context); },
      [&](TF_Status* status) { TF_OpKernelContext_Failure(context, status); });
}

template <class Device>
void destroy(void* kernel) {
  delete static_cast<Kernel<Device>*>(kernel);
}

// `kept`: of the keys of AttnOps>Decode, where the device has not all of them.
template <class Device, Operator which>
void register_kernel(TF_DataType type, const TF_DataType* kept = nullptr) {
  const char* name = operator_name(which);
  TF_KernelBuilder* kernel =
      TF_NewKernelBuilder(name, Device::kType, create<Device, which>, compute<Device, which>, destroy<Device>);
  Status status;
  TF_KernelBuilder_TypeConstraint(kernel, "T", type, status);
  status.check();
  if (kept != nullptr) {
    TF_KernelBuilder_TypeConstraint(kernel, "Tkv", *kept, status);
    status.check();
  }
  TF_RegisterKernelBuilder(name, kernel, status);
  status.check();
}

}  // namespace attn_ops::tf
