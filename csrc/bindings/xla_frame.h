// What XLA hands to a custom call: attributes, operands and results in order, checked while they are read. Throws
// std::invalid_argument.
#pragma once

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "op_call.h"
#include "xla/ffi/api/c_api.h"

namespace attn_ops::xla {

inline XLA_FFI_Error* error(const XLA_FFI_Api* api, XLA_FFI_Error_Code code, const std::string& message) {
  XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, message.c_str(), code};
  return api->XLA_FFI_Error_Create(&args);
}

inline void destroy(const XLA_FFI_Api* api, XLA_FFI_Error* error) {
  XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
  api->XLA_FFI_Error_Destroy(&args);
}

inline DType dtype_of(XLA_FFI_DataType type, const char* name) {
  switch (type) {
    case XLA_FFI_DataType_F32: return DType::kFloat32;
    case XLA_FFI_DataType_F64: return DType::kFloat64;
    case XLA_FFI_DataType_F16: return DType::kFloat16;
    case XLA_FFI_DataType_BF16: return DType::kBFloat16;
    case XLA_FFI_DataType_PRED: return DType::kBool;
    case XLA_FFI_DataType_S8: return DType::kInt8;
    default:
      throw std::invalid_argument(std::string(name) +
                                  " must be float32, float64, float16, bfloat16, int8 or bool, got XLA's " + "type " +
                                  text(int64_t{type}));
  }
}

class Attributes {
 public:
  explicit Attributes(const XLA_FFI_Attrs& attributes) : attributes_(attributes) {}

  int64_t integer(const char* name) const { return scalar<int64_t>(name, XLA_FFI_DataType_S64); }
  int64_t integer(const char* name, int64_t absent) const { return index(name) < 0 ? absent : integer(name); }
  bool boolean(const char* name) const { return scalar<bool>(name, XLA_FFI_DataType_PRED); }
  bool boolean(const char* name, bool absent) const { return index(name) < 0 ? absent : boolean(name); }
  std::string string(const char* name) const {
    const auto* span = static_cast<const XLA_FFI_ByteSpan*>(find(name, XLA_FFI_AttrType_STRING));
    return std::string(span->ptr, span->len);
  }
  std::string string(const char* name, const char* absent) const { return index(name) < 0 ? absent : string(name); }

 private:
  template <class T>
  T scalar(const char* name, XLA_FFI_DataType type) const {
    const auto* value = static_cast<const XLA_FFI_Scalar*>(find(name, XLA_FFI_AttrType_SCALAR));
    if (value->dtype != type) wrong(name);
    return *static_cast<const T*>(value->value);
  }

  const void* find(const char* name, XLA_FFI_AttrType type) const {
    const int64_t i = index(name);
    if (i < 0 || attributes_.types[i] != type) wrong(name);
    return attributes_.attrs[i];
  }

  // -1: there is none.
  int64_t index(const char* name) const {
    for (int64_t i = 0; i < attributes_.size; ++i) {
      if (std::string_view(attributes_.names[i]->ptr, attributes_.names[i]->len) == name) return i;
    }
    return -1;
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
    const XLA_FFI_Buffer& buffer = this->buffer(count_++);
    Array a = contiguous_array(name, buffer.data, DType::kFloat32, static_cast<int>(buffer.rank),
                               [&buffer](int i) { return buffer.dims[i]; });
    switch (element) {
      case Element::kValue: a.dtype = dtype_of(buffer.dtype, name); break;
      case Element::kInteger: require(buffer.dtype == XLA_FFI_DataType_S32, name, "int32"); break;
      case Element::kSeed:
        if (buffer.dtype == XLA_FFI_DataType_U32 && a.rank == 1 && a.shape[0] % 2 == 0) {
          a.shape[0] /= 2;
        } else {
          require(buffer.dtype == XLA_FFI_DataType_S64, name, "int64 [2] or uint32 [4], or twice as many");
        }
    }
    return a;
  }

  // As XLA has it, of any rank.
  const XLA_FFI_Buffer& buffer(int64_t i) const { return *static_cast<const XLA_FFI_Buffer*>(args_.args[i]); }

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

// Where the workspace of a call comes from: whoever wrote the custom call has it as the last result, or XLA is asked.
enum class Memory { kAsked, kLent };

// The results, whose shapes whoever wrote the custom call has stated: they must be the right ones.
class Results {
 public:
  Results(const XLA_FFI_Rets& rets, Memory memory) : rets_(rets), size_(rets.size) {
    if (memory == Memory::kAsked) return;
    if (size_ == 0 || rets.types[--size_] != XLA_FFI_RetType_BUFFER) {
      throw std::invalid_argument("the result workspace is missing");
    }
    const auto& buffer = *static_cast<const XLA_FFI_Buffer*>(rets.rets[size_]);
    if (buffer.dtype != XLA_FFI_DataType_U8 || buffer.rank != 1) {
      throw std::invalid_argument("the result workspace must be uint8 [bytes]");
    }
    workspace_ = Workspace{buffer.data, static_cast<size_t>(buffer.dims[0])};
  }

  // Where it is lent.
  const std::optional<Workspace>& workspace() const { return workspace_; }

  void* next(const char* name, DType dtype, const int64_t* shape, int rank) {
    if (count_ == size_) throw std::invalid_argument(std::string(name) + " is missing: too few results");
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

  // What is not wanted is no result.
  void skip(const char*, DType) {}

  // A result that is not ours would be handed on as it is: memory that nobody wrote.
  void finish() const {
    if (count_ != size_) {
      throw std::invalid_argument("there are " + text(size_) + " results, of which the attributes announce " +
                                  text(count_));
    }
  }

 private:
  const XLA_FFI_Rets& rets_;
  int64_t size_, count_ = 0;
  std::optional<Workspace> workspace_;
};

}  // namespace attn_ops::xla
