// What operators that write into their inputs share: shapes of tensors, the memory of an input taken over, registration.
#pragma once

#include <cstring>

#include "append.h"
#include "large_pages.h"
#include "tf_kernel.h"

namespace attn_ops::tf {

inline Extents extents(const Tensor& tensor) {
  Extents shape(static_cast<size_t>(TF_NumDims(tensor.get())));
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = TF_Dim(tensor.get(), static_cast<int>(i));
  return shape;
}

// An input as an output that may be written: its memory where this is the last use of it, else a copy.
inline void own_input(const Execution& execution, int input, int output, Tensor* tensor) {
  const TF_DataType type = TF_TensorType(tensor->get());
  const Extents shape = extents(*tensor);
  const void* const data = TF_TensorData(tensor->get());
  tensor->reset();  // which would count as a use
  Tensor result = execution.forward_or_output(input, output, shape.data(), static_cast<int>(shape.size()));
  if (TF_TensorData(result.get()) != data) {
    int64_t bytes = static_cast<int64_t>(TF_DataTypeSize(type));
    for (int64_t extent : shape) bytes *= extent;
    const Tensor source = execution.input(input);
    if (bytes > 0) {
      ask_for_large_pages(TF_TensorData(result.get()), static_cast<size_t>(bytes));
      std::memcpy(TF_TensorData(result.get()), TF_TensorData(source.get()), static_cast<size_t>(bytes));
    }
  }
  *tensor = std::move(result);
}

// Registers Kernel(Attributes) and its compute(TF_OpKernelContext*) as the CPU's kernel of an operator.
template <class Kernel, const char* const& name>
void register_cpu_kernel() {
  const auto create = [](TF_OpKernelConstruction* construction) -> void* {
    Kernel* kernel = nullptr;
    guarded(
        name, [&] { kernel = new Kernel(Attributes(construction)); },
        [&](TF_Status* status) { TF_OpKernelConstruction_Failure(construction, status); });
    return kernel;
  };
  const auto compute = [](void* kernel, TF_OpKernelContext* context) {
    guarded(
        name, [&] { static_cast<Kernel*>(kernel)->compute(context); },
        [&](TF_Status* status) { TF_OpKernelContext_Failure(context, status); });
  };
  const auto destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  Status status;
  TF_RegisterKernelBuilder(name, TF_NewKernelBuilder(name, "CPU", create, compute, destroy), status);
  status.check();
}

}  // namespace attn_ops::tf
