// AttnOps>LibraryIsMissing...: an operator that does nothing, whose name says what to do where this library is missing.
//
// Of a graph that holds an unknown operator TensorFlow prints the operator's name and nothing else that the author of
// the graph has a say in. `attn_ops.export` puts this operator before the others, so that it is the one that is not
// found. Nothing depends on it, so it is pruned before anything runs.
#pragma once

#include "tf_capi.h"

namespace attn_ops::tf {

constexpr const char* kHint =
    "AttnOps>LibraryIsMissing__import_attn_ops_and_call_attn_ops_load_library__or_tf_load_library";

inline void register_hint() {
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder(kHint);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, [](TF_ShapeInferenceContext*, TF_Status*) {});
  Status status;
  TF_RegisterOpDefinition(op, status);
  status.check();
  TF_KernelBuilder* kernel = TF_NewKernelBuilder(kHint, "CPU", nullptr, [](void*, TF_OpKernelContext*) {}, nullptr);
  TF_RegisterKernelBuilder(kHint, kernel, status);
  status.check();
}

}  // namespace attn_ops::tf
