// The operators AttnOps>AppendToCache and AttnOps>AppendToInt8Cache for TensorFlow: new rows of keys and values, written
// into the memory that the cache has wherever nobody else can tell.
//
// Two ways tell that nobody can. One is TensorFlow's, that this is the last use of the memory
// (TF_ForwardInputOrAllocateOutput): so in loops; but what Python holds, or the caller of a function, is never free. The
// other is for those. A cache may bring `written`, how many rows of its memory were ever written. It is an array whose
// memory the cache and all that grew from it share. What is past the length of a cache is nobody's, so
// whoever finds `written` equal to its own lengths may go on in place, and counts its rows there. A second one that grows
// from the same cache finds other numbers, and copies first. Values so stay values, and a token costs a token.
#pragma once

#include <mutex>

#include "tf_tensors.h"

namespace attn_ops::tf {

// The second has keys, values and the scales of both as its caches, and rows of any dtype to be rounded.
template <bool int8>
inline constexpr const char* kAppend = int8 ? "AttnOps>AppendToInt8Cache" : "AttnOps>AppendToCache";

template <bool int8>
class AppendKernel {
 public:
  explicit AppendKernel(const Attributes& attributes)
      : layout_(cache_layout_named(attributes.string("layout"))),
        num_caches_(int8 ? 4 : attributes.integer("num_caches")),
        num_counts_(attributes.integer("num_counts")),
        num_dropped_(attributes.integer("num_dropped")),
        num_written_(attributes.integer("num_written")),
        type_(attributes.type("T")) {
    if (!int8 && num_caches_ != (layout_ == CacheLayout::kStacked ? 1 : 2)) {
      throw std::invalid_argument("num_caches (" + text(num_caches_) + ") must be 2, or 1 in layout B2SHD");
    }
    for (int64_t count : {num_counts_, num_dropped_, num_written_}) {
      if (count > 1) throw std::invalid_argument("num_counts, num_dropped and num_written must be 0 or 1");
    }
  }

  void compute(TF_OpKernelContext* context) const {
    const Execution execution(context);
    int next = 0;
    Tensor cache[4], added[2], positions, counts, dropped, written;
    for (int64_t i = 0; i < num_caches_; ++i) cache[i] = execution.input(next++);
    for (Tensor& tensor : added) tensor = execution.input(next++);
    positions = execution.input(next++);
    if (num_counts_) counts = execution.input(next++);
    if (num_dropped_) dropped = execution.input(next++);
    const int written_at = next;
    if (num_written_) written = execution.input(next++);

    Append append{};
    append.layout = layout_;
    append.int8 = int8;
    append.added_dtype = dtype_of(type_);
    const int64_t element = static_cast<int64_t>(TF_DataTypeSize(type_));
    for (int half = 0; half < 2; ++half) {
      const char* const name = half == 0 ? "k" : "v";
      const Extents shape = extents(cache[of(half)]), rows = extents(added[half]);
      check_append_shapes(name, shape, rows, layout_);
      append.cache[half] = position_rows(shape, layout_, int8 ? 1 : element);
      append.added[half] = position_rows(rows, layout_, element);
      if (!int8) continue;
      Extents scales = extents(cache[2 + half]);
      check_append_scales(name, shape, scales);
      scales.push_back(1);
      append.scales[half] = position_rows(scales, layout_, sizeof(float));
      append.dim[half] = shape.back();
    }
    for (const auto& [name, keys, values] :
         {std::tuple{"max_length", append.cache[0].length, append.cache[1].length},
          std::tuple{"number of new rows", append.added[0].length, append.added[1].length}}) {
      if (keys != values) throw std::invalid_argument(std::string("keys and values must have the same ") + name);
    }
    const int64_t batch = append.cache[0].batch;
    append.positions = integers("positions", positions, batch, true);
    append.position_stride = batch == 1 || TF_Dim(positions.get(), 0) == 1 ? 0 : 1;
    if (counts) append.counts = integers("counts", counts, batch, false);
    if (dropped) append.dropped = integers("dropped", dropped, batch, false);
    int32_t* const marks = written ? integers("written", written, batch, false) : nullptr;
    check_append_positions(append);  // nothing is written before

    if (claimed(append, cache, marks)) {
      for (int64_t i = 0; i < num_caches_; ++i) execution.share(static_cast<int>(i), cache[i]);
      execution.share(static_cast<int>(num_caches_), written);
    } else {
      for (int64_t i = 0; i < num_caches_; ++i) own_input(execution, static_cast<int>(i), static_cast<int>(i), &cache[i]);
      if (marks != nullptr) {
        own_input(execution, written_at, static_cast<int>(num_caches_), &written);
        int32_t* const mine = static_cast<int32_t*>(TF_TensorData(written.get()));
        for (int64_t b = 0; b < batch; ++b) {
          mine[b] = static_cast<int32_t>(append.position(b) - append.drop(b) + append.count(b));
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      write_rows(append, half, TF_TensorData(cache[of(half)].get()),
                 int8 ? TF_TensorData(cache[2 + half].get()) : nullptr, TF_TensorData(added[half].get()));
    }
  }

 private:
  // Which of the caches has keys (half 0), and which values.
  int of(int half) const { return num_caches_ > 1 ? half : 0; }

  // int32 [batch], or [1] with `one`.
  static int32_t* integers(const char* name, const Tensor& tensor, int64_t batch, bool one) {
    const Extents shape = extents(tensor);
    if (shape != Extents{batch} && !(one && shape == Extents{1})) {
      throw std::invalid_argument(std::string(name) + " must have the shape [" + text(batch) + "], got " +
                                  extents_text(shape));
    }
    return static_cast<int32_t*>(TF_TensorData(tensor.get()));
  }

  // Whether the rows may be written past those that the cache has, in its memory; if so, they count as written.
  bool claimed(const Append& append, const Tensor* cache, int32_t* marks) const {
    if (marks == nullptr || marks == append.positions || append.moves()) return false;
    const void* const keys = TF_TensorData(cache[0].get());
    if (num_caches_ > 1 && keys == TF_TensorData(cache[1].get()) && append.cache[0].batch_bytes > 0) return false;
    static std::mutex* const marking = new std::mutex;
    const std::lock_guard<std::mutex> lock(*marking);
    const int64_t batch = append.cache[0].batch;
    for (int64_t b = 0; b < batch; ++b) {
      if (marks[b] != append.position(b)) return false;
    }
    for (int64_t b = 0; b < batch; ++b) marks[b] += static_cast<int32_t>(append.count(b));
    return true;
  }

  CacheLayout layout_;
  int64_t num_caches_, num_counts_, num_dropped_, num_written_;
  TF_DataType type_;
};

// The results have the shapes of what they grow from. A stacked cache, of rank 5, is the only one there is.
template <bool int8>
void infer_append_shapes(TF_ShapeInferenceContext* context, TF_Status*) {
  const Inference inference(context);
  inference.set_all_outputs_unknown();
  const int64_t rank = inference.rank(inference.input(0));
  if (rank == -1) return;
  const int caches = int8 ? 4 : rank == 5 ? 1 : 2;
  for (int i = 0; i < caches; ++i) inference.set_output(i, inference.input(i));
  inference.set_output_if_there(caches, inference.slice(inference.input(0), 0, 1));
}

template <bool int8>
void register_append() {
  TF_OpDefinitionBuilder* op = TF_NewOpDefinitionBuilder(kAppend<int8>);
  if (int8) {
    for (const char* attribute : {"T: {float, half, bfloat16}", "layout: {'BSHD', 'BHSD'} = 'BSHD'"}) {
      TF_OpDefinitionBuilderAddAttr(op, attribute);
    }
    for (const char* input : {"k: int8", "v: int8", "k_scale: float", "v_scale: float"}) {
      TF_OpDefinitionBuilderAddInput(op, input);
    }
  } else {
    for (const char* attribute :
         {"T: {float, double, half, bfloat16}", "layout: {'BSHD', 'BHSD', 'B2SHD'} = 'BSHD'", "num_caches: int >= 1"}) {
      TF_OpDefinitionBuilderAddAttr(op, attribute);
    }
    TF_OpDefinitionBuilderAddInput(op, "caches: num_caches * T");
  }
  for (const char* attribute :
       {"num_counts: int >= 0 = 0", "num_dropped: int >= 0 = 0", "num_written: int >= 0 = 0"}) {
    TF_OpDefinitionBuilderAddAttr(op, attribute);
  }
  for (const char* input : {"k_new: T", "v_new: T", "positions: int32", "counts: num_counts * int32",
                            "dropped: num_dropped * int32", "written: num_written * int32"}) {
    TF_OpDefinitionBuilderAddInput(op, input);
  }
  if (int8) {
    for (const char* output : {"grown_k: int8", "grown_v: int8", "grown_k_scale: float", "grown_v_scale: float"}) {
      TF_OpDefinitionBuilderAddOutput(op, output);
    }
  } else {
    TF_OpDefinitionBuilderAddOutput(op, "grown: num_caches * T");
  }
  TF_OpDefinitionBuilderAddOutput(op, "now_written: num_written * int32");
  TF_OpDefinitionBuilderSetShapeInferenceFunction(op, [](TF_ShapeInferenceContext* context, TF_Status* result) {
    guarded(
        kAppend<int8>, [&] { infer_append_shapes<int8>(context, result); },
        [&](TF_Status* status) { TF_SetStatus(result, TF_GetCode(status), TF_Message(status)); });
  });
  Status status;
  TF_RegisterOpDefinition(op, status);
  status.check();

  register_cpu_kernel<AppendKernel<int8>, kAppend<int8>>();
}

}  // namespace attn_ops::tf
