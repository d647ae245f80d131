// The operator AttnOps>Zeros: the memory of a new cache, in large pages and its own. Of equal constants TensorFlow makes one,
// so the operator counts as one with state.
#pragma once

#include <cstring>

#include "large_pages.h"
#include "tf_tensors.h"

namespace attn_ops::tf {

inline constexpr const char* kZeros = "AttnOps>Zeros";

class ZerosKernel {
 public:
  explicit ZerosKernel(const Attributes& attributes) : type_(attributes.type("T")) {}

  void compute(TF_OpKernelContext* context) const {
    const Execution execution(context);
    const Tensor shape = execution.input(0);
    const Extents of_shape = extents(shape);
    if (of_shape.size() != 1) throw std::invalid_argument("shape must be a vector, got " + extents_text(of_shape));
    const int32_t* const data = static_cast<const int32_t*>(TF_TensorData(shape.get()));
    const Extents wanted(data, data + of_shape[0]);
    int64_t bytes = static_cast<int64_t>(TF_DataTypeSize(type_));
    for (int64_t extent : wanted) {
      if (extent < 0 || __builtin_mul_overflow(bytes, extent, &bytes)) {
        throw std::invalid_argument("there is no tensor of shape " + extents_text(wanted));
      }
    }
    const Tensor zeros = execution.output(0, type_, wanted.data(), static_cast<int>(wanted.size()));
    if (bytes == 0) return;
    ask_for_large_pages(TF_TensorData(zeros.get()), static_cast<size_t>(bytes));
    std::memset(TF_TensorData(zeros.get()), 0, static_cast<size_t>(bytes));
  }

 private:
  TF_DataType type_;
};

inline void register_zeros() {
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder(kZeros);
  TF_OpDefinitionBuilderAddAttr(op, "T: {float, double, half, bfloat16, int8}");
  TF_OpDefinitionBuilderAddInput(op, "shape: int32");
  TF_OpDefinitionBuilderAddOutput(op, "zeros: T");
  TF_OpDefinitionBuilderSetIsStateful(op, true);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, [](TF_ShapeInferenceContext* context, TF_Status* status) {
    TF_ShapeInferenceContextSetUnknownShape(context, status);
  });
  Status status;
  TF_RegisterOpDefinition(op, status);
  status.check();
  register_cpu_kernel<ZerosKernel, kZeros>();
}

}  // namespace attn_ops::tf
