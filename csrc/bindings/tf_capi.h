// TensorFlow's C API behind owning types and exceptions. The entry points in tensorflow.cc and tf_kernel.h catch what
// is thrown here.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "tensorflow/c/kernels.h"
#include "tensorflow/c/ops.h"

namespace attn_ops::tf {

struct Error : std::runtime_error {
  Error(TF_Code c, const std::string& message) : std::runtime_error(message), code(c) {}
  TF_Code code;
};

class Status {
 public:
  Status() : status_(TF_NewStatus()) {}
  ~Status() { TF_DeleteStatus(status_); }
  Status(const Status&) = delete;
  Status& operator=(const Status&) = delete;

  operator TF_Status*() const { return status_; }
  void check() const {
    if (TF_GetCode(status_) != TF_OK) throw Error(TF_GetCode(status_), TF_Message(status_));
  }

 private:
  TF_Status* status_;
};

template <class T, void (*destroy)(T*)>
struct Deleter {
  void operator()(T* p) const { destroy(p); }
};
using Tensor = std::unique_ptr<TF_Tensor, Deleter<TF_Tensor, TF_DeleteTensor>>;
using ShapeHandle = std::unique_ptr<TF_ShapeHandle, Deleter<TF_ShapeHandle, TF_DeleteShapeHandle>>;
using DimensionHandle = std::unique_ptr<TF_DimensionHandle, Deleter<TF_DimensionHandle, TF_DeleteDimensionHandle>>;

// The attributes of an operator while its kernel is made.
class Attributes {
 public:
  explicit Attributes(TF_OpKernelConstruction* construction) : construction_(construction) {}

  TF_DataType type(const char* name) const { return read<TF_DataType>(name, TF_OpKernelConstruction_GetAttrType); }
  int64_t integer(const char* name) const { return read<int64_t>(name, TF_OpKernelConstruction_GetAttrInt64); }
  bool boolean(const char* name) const { return read<TF_Bool>(name, TF_OpKernelConstruction_GetAttrBool) != 0; }
  // Absent ones have the operator's default.
  int64_t integer(const char* name, int64_t) const { return integer(name); }
  bool boolean(const char* name, bool) const { return boolean(name); }
  std::string string(const char* name, const char*) const { return string(name); }
  std::string string(const char* name) const {
    Status status;
    int32_t list_size = 0, bytes = 0;
    TF_OpKernelConstruction_GetAttrSize(construction_, name, &list_size, &bytes, status);
    status.check();
    std::string value(static_cast<size_t>(bytes), '\0');
    TF_OpKernelConstruction_GetAttrString(construction_, name, value.data(), value.size(), status);
    status.check();
    return value;
  }

 private:
  template <class T, class Getter>
  T read(const char* name, Getter getter) const {
    Status status;
    T value{};
    getter(construction_, name, &value, status);
    status.check();
    return value;
  }

  TF_OpKernelConstruction* construction_;
};

// One execution of a kernel.
class Execution {
 public:
  explicit Execution(TF_OpKernelContext* context) : context_(context) {}

  Tensor input(int index) const {
    Status status;
    TF_Tensor* tensor = nullptr;
    TF_GetInput(context_, index, &tensor, status);
    status.check();
    return Tensor(tensor);
  }

  Tensor output(int index, TF_DataType type, const int64_t* shape, int rank) const {
    int64_t bytes = static_cast<int64_t>(TF_DataTypeSize(type));
    for (int i = 0; i < rank; ++i) bytes *= shape[i];
    Status status;
    Tensor tensor(TF_AllocateOutput(context_, index, type, shape, rank, static_cast<size_t>(bytes), status));
    status.check();
    return tensor;
  }

  // An output in the memory of this input, where nobody else uses that any more; else in its own.
  Tensor forward_or_output(int input, int output, const int64_t* shape, int rank) const {
    Status status;
    int forwarded = -1;
    Tensor tensor(TF_ForwardInputOrAllocateOutput(context_, &input, 1, output, shape, rank, &forwarded, status));
    status.check();
    return tensor;
  }

  // An output in the memory of this tensor.
  void share(int output, const Tensor& tensor) const {
    Status status;
    TF_SetOutput(context_, output, tensor.get(), status);
    status.check();
  }

  // On the device of the kernel, or in the memory of the host.
  Tensor temporary(size_t bytes, bool on_host) const {
    Status status;
    TF_AllocatorAttributes memory{TF_ALLOCATOR_ATTRIBUTES_STRUCT_SIZE, on_host};
    const int64_t shape[1] = {static_cast<int64_t>(bytes)};
    Tensor tensor(TF_AllocateTemp(context_, TF_UINT8, shape, 1, &memory, status));
    status.check();
    return tensor;
  }

 private:
  TF_OpKernelContext* context_;
};

// A shape function at work.
class Inference {
 public:
  explicit Inference(TF_ShapeInferenceContext* context) : context_(context) {}

  int num_inputs() const { return static_cast<int>(TF_ShapeInferenceContextNumInputs(context_)); }

  ShapeHandle input(int index) const {
    Status status;
    ShapeHandle shape(TF_NewShapeHandle());
    TF_ShapeInferenceContextGetInput(context_, index, shape.get(), status);
    status.check();
    return shape;
  }

  // -1: unknown.
  int64_t rank(const ShapeHandle& shape) const {
    return TF_ShapeInferenceContextRankKnown(context_, shape.get())
               ? TF_ShapeInferenceContextRank(context_, shape.get())
               : -1;
  }

  // -1: unknown.
  int64_t extent(const ShapeHandle& shape, int axis) const {
    DimensionHandle dimension(TF_NewDimensionHandle());
    TF_ShapeInferenceContextDim(context_, shape.get(), axis, dimension.get());
    return TF_DimensionHandleValueKnown(dimension.get()) ? TF_DimensionHandleValue(dimension.get()) : -1;
  }

  ShapeHandle slice(const ShapeHandle& shape, int begin, int end) const {
    Status status;
    ShapeHandle part(TF_NewShapeHandle());
    TF_ShapeInferenceContextSubshape(context_, shape.get(), begin, end, part.get(), status);
    status.check();
    return part;
  }

  ShapeHandle concatenate(const ShapeHandle& first, const ShapeHandle& second) const {
    Status status;
    ShapeHandle whole(TF_NewShapeHandle());
    TF_ShapeInferenceContextConcatenateShapes(context_, first.get(), second.get(), whole.get(), status);
    status.check();
    return whole;
  }

  // One axis; -1: of unknown extent.
  ShapeHandle axis(int64_t extent) const {
    return ShapeHandle(TF_ShapeInferenceContextVectorFromSize(context_, static_cast<size_t>(extent)));
  }

  void set_output(int index, const ShapeHandle& shape) const {
    Status status;
    TF_ShapeInferenceContextSetOutput(context_, index, shape.get(), status);
    status.check();
  }

  // How many outputs a list has is an attribute, and attributes are not to be seen here.
  void set_output_if_there(int index, const ShapeHandle& shape) const {
    Status ignored;
    TF_ShapeInferenceContextSetOutput(context_, index, shape.get(), ignored);
  }

  void set_all_outputs_unknown() const {
    Status status;
    TF_ShapeInferenceContextSetUnknownShape(context_, status);
    status.check();
  }

 private:
  TF_ShapeInferenceContext* context_;
};

}  // namespace attn_ops::tf
