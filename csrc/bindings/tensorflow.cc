// The operators AttnOps>Forward, AttnOps>Plain, AttnOps>Decode, AttnOps>Backward, AttnOps>AppendToCache and
// AttnOps>AppendToPages for TensorFlow, through its C API: one binary for every TensorFlow from 2.16 up. Exceptions stay
// inside this file; whoever calls in sees a status.
#include "tensorflow/c/kernels.h"

#include <link.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "cuda_library.h"
#include "tf_append.h"
#include "tf_append_pages.h"
#include "tf_capi.h"
#include "tf_devices.h"
#include "tf_hint.h"
#include "tf_kernel.h"
#include "tf_shapes.h"
#include "tf_zeros.h"

namespace attn_ops::tf {
namespace {

template <Operator which>
void infer_shapes(TF_ShapeInferenceContext* context, TF_Status* result) {
  guarded(
      operator_name(which),
      [&] {
        ShapeFunction shapes(context);
        if (which == Operator::kBackward) shapes.backward();
        else if (which == Operator::kDecode) shapes.decode();
        else shapes.forward();
      },
      [&](TF_Status* status) { TF_SetStatus(result, TF_GetCode(status), TF_Message(status)); });
}

template <Operator which>
void finish_operator(TF_OpDefinitionBuilder* op) {
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, infer_shapes<which>);
  Status status;
  TF_RegisterOpDefinition(op, status);
  status.check();
}

constexpr const char* kPlainAttributes[] = {
    "T: {float, double, half, bfloat16}",
    "Tlse: {float, double} = DT_FLOAT",
    "scale: string = ''",
    "window_left: int = -1",
    "window_right: int = -1",
    "bottom_right: bool = false",
    "layout: {'BSHD', 'BHSD'} = 'BSHD'",
    "allow_tf32: bool = false",
};

template <Operator which>
void register_operator() {
  constexpr bool backward = which == Operator::kBackward, decode = which == Operator::kDecode;
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder(operator_name(which));
  for (const char* attribute : kPlainAttributes) TF_OpDefinitionBuilderAddAttr(op, attribute);
  for (const char* attribute :
       {"Tbias: {float, double, half, bfloat16} = DT_FLOAT", "Tterm: {float, double} = DT_FLOAT", "num_bias: int >= 0",
        "num_masks: int >= 0", "num_query_lengths: int >= 0", "num_key_lengths: int >= 0", "num_seed: int >= 0",
        "dropout_rate: string = '0'", "num_intervals: int >= 0 = 0", "num_query_offset: int >= 0 = 0", "num_segments: int >= 0 = 0",
        "num_blocks: int >= 0 = 0", "num_slopes: int >= 0 = 0", "num_relative_bias: int >= 0 = 0",
        "num_sinks: int >= 0 = 0", "soft_cap: string = ''", "block_q: int = 0", "block_k: int = 0",
        "halves: bool = false"}) {
    TF_OpDefinitionBuilderAddAttr(op, attribute);
  }
  if (decode) {
    for (const char* attribute : {"Tkv: {float, double, half, bfloat16, int8}", "num_block_table: int >= 0 = 0",
                                  "num_scales: int >= 0 = 0"}) {
      TF_OpDefinitionBuilderAddAttr(op, attribute);
    }
  }
  for (const char* input : {"q: T", decode ? "k: Tkv" : "k: T", decode ? "v: Tkv" : "v: T"}) {
    TF_OpDefinitionBuilderAddInput(op, input);
  }
  if (backward) {
    TF_OpDefinitionBuilderAddAttr(op, "num_d_lse: int >= 0");
    TF_OpDefinitionBuilderAddAttr(op, "d_bias: bool = true");
    for (const char* input : {"out: T", "statistics: Tlse", "d_out: T", "d_lse: num_d_lse * Tlse"}) {
      TF_OpDefinitionBuilderAddInput(op, input);
    }
  }
  for (const char* input :
       {"bias: num_bias * Tbias", "masks: num_masks * bool", "query_lengths: num_query_lengths * int32",
        "key_lengths: num_key_lengths * int32", "seed: num_seed * int64", "intervals: num_intervals * int32",
        "query_offset: num_query_offset * int32", "segments: num_segments * int32", "blocks: num_blocks * bool",
        "slopes: num_slopes * Tterm", "relative_bias: num_relative_bias * Tterm", "sinks: num_sinks * Tterm"}) {
    TF_OpDefinitionBuilderAddInput(op, input);
  }
  if (decode) {
    for (const char* input : {"block_table: num_block_table * int32", "scales: num_scales * float"}) {
      TF_OpDefinitionBuilderAddInput(op, input);
    }
  }
  if (backward) {
    for (const char* output : {"dq: T", "dk: T", "dv: T", "grad_bias: num_bias * Tbias",
                               "grad_relative_bias: num_relative_bias * Tterm", "grad_sinks: num_sinks * Tterm"}) {
      TF_OpDefinitionBuilderAddOutput(op, output);
    }
  } else {
    TF_OpDefinitionBuilderAddAttr(op, "num_lse: int >= 0 = 0");
    for (const char* output : {"out: T", "statistics: Tlse", "lse: num_lse * Tlse"}) {
      TF_OpDefinitionBuilderAddOutput(op, output);
    }
  }
  finish_operator<which>(op);
}

// On a GPU nothing that runs there may be registered without the library that does it: TensorFlow would put the
// operator there all the same. float64 stays with the CPU, and so do caches in int8 and those wider than queries.
template <Operator which>
void register_kernels() {
  for (TF_DataType type : {TF_FLOAT, TF_DOUBLE, TF_HALF, TF_BFLOAT16}) {
    register_kernel<CpuDevice, which>(type);
    if (type == TF_DOUBLE || !cuda_library_exists()) continue;
    if constexpr (which == Operator::kDecode) {
      for (TF_DataType kept : {TF_FLOAT, TF_HALF, TF_BFLOAT16}) {
        if (kept == type || type == TF_FLOAT) register_kernel<GpuDevice, which>(type, &kept);
      }
    } else {
      register_kernel<GpuDevice, which>(type);
    }
  }
}

void register_plain_operator() {
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder(operator_name(Operator::kPlain));
  for (const char* attribute : kPlainAttributes) TF_OpDefinitionBuilderAddAttr(op, attribute);
  for (const char* input : {"q: T", "k: T", "v: T"}) TF_OpDefinitionBuilderAddInput(op, input);
  for (const char* output : {"out: T", "statistics: Tlse"}) TF_OpDefinitionBuilderAddOutput(op, output);
  finish_operator<Operator::kPlain>(op);
}

template <Operator which>
void register_attention() {
  if constexpr (which == Operator::kPlain) register_plain_operator();
  else register_operator<which>();
  register_kernels<which>();
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
    register_attention<Operator::kForward>();
    register_attention<Operator::kPlain>();
    register_attention<Operator::kBackward>();
    register_attention<Operator::kDecode>();
    register_append<false>();
    register_append<true>();
    register_append_to_pages();
    register_zeros();
    register_hint();
  } catch (const std::exception& e) {
    std::fprintf(stderr, "attn_ops: the operators could not be registered: %s\n", e.what());
  }
}

}  // namespace
}  // namespace attn_ops::tf
