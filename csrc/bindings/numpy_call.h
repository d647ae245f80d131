// From Python's arguments to a Call: NumPy arrays seen in place, keywords by name.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <string>
#include <vector>

#include "call.h"
#include "validate.h"

namespace attn_ops::numpy {

namespace py = pybind11;

template <class Exception>
[[noreturn]] void fail(const char* function, const std::string& reason) {
  throw Exception(std::string("attn_ops._core.") + function + ": " + reason);
}

inline std::string to_string(const py::handle& object) { return py::cast<std::string>(py::str(object)); }

inline DType dtype_named(const char* function, const char* argument, const std::string& type) {
  for (DType known : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16, DType::kBool,
                      DType::kInt8}) {
    if (type == text(known)) return known;
  }
  fail<py::type_error>(function,
                       std::string(argument) + " must hold float32, float64, float16, bfloat16, int8 or bool, got " + type);
}

// The keywords of one call, taken one by one; what is left at the end was not asked for.
class Keywords {
 public:
  Keywords(const char* function, const py::kwargs& given) : function_(function), left_(given) {}

  py::object take(const char* name) {
    return left_.contains(name) ? py::object(left_.attr("pop")(name)) : py::object(py::none());
  }

  int64_t integer(const char* name, int64_t absent) {
    const py::object value = index(name);
    if (value.is_none()) return absent;
    int overflow = 0;
    const int64_t result = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow != 0) out_of_64_bits(name, value);
    return result;
  }

  // 64 bits, signed or not.
  uint64_t word(const char* name) {
    const py::object value = index(name);
    if (value.is_none()) return 0;
    if (value < py::int_(std::numeric_limits<int64_t>::min()) ||
        value > py::int_(std::numeric_limits<uint64_t>::max())) {
      out_of_64_bits(name, value);
    }
    return PyLong_AsUnsignedLongLongMask(value.ptr());
  }

  double real(const char* name, const py::object& value) const {
    const double result = PyFloat_AsDouble(value.ptr());
    if (result == -1.0 && PyErr_Occurred()) wrong_type(name, value, "a number");
    return result;
  }

  std::string string(const char* name, const char* absent) {
    const py::object value = take(name);
    if (value.is_none()) return absent;
    if (!py::isinstance<py::str>(value)) wrong_type(name, value, "a string");
    return py::cast<std::string>(value);
  }

  std::vector<py::object> sequence(const char* name) {
    const py::object value = take(name);
    if (value.is_none()) return {};
    if (!py::isinstance<py::list>(value) && !py::isinstance<py::tuple>(value)) {
      wrong_type(name, py::type::of(value), "a list or tuple");
    }
    return py::cast<std::vector<py::object>>(value);
  }

  bool boolean(const char* name) {
    const py::object value = take(name);
    const int result = PyObject_IsTrue(value.ptr());
    if (result == -1) wrong_type(name, value, "a bool");
    return result == 1;
  }

  void finish() const {
    if (left_.empty()) return;
    fail<py::type_error>(function_, "unknown keyword '" + to_string((*left_.begin()).first) + "'");
  }

 private:
  py::object index(const char* name) {
    const py::object value = take(name);
    if (value.is_none()) return value;
    PyObject* result = PyNumber_Index(value.ptr());
    if (result == nullptr) wrong_type(name, value, "an integer");
    return py::reinterpret_steal<py::object>(result);
  }

  [[noreturn]] void wrong_type(const char* name, const py::handle& value, const char* wanted) const {
    PyErr_Clear();
    fail<py::type_error>(function_, std::string(name) + " (" + to_string(py::repr(value)) + ") must be " + wanted);
  }
  [[noreturn]] void out_of_64_bits(const char* name, const py::object& value) const {
    fail<py::value_error>(function_, std::string(name) + " (" + to_string(value) + ") must fit 64 bits");
  }

  const char* function_;
  py::dict left_;
};

// The NumPy arrays of one call, kept alive.
class Arrays {
 public:
  explicit Arrays(const char* function) : function_(function) {}

  // Floats or bools, in place where they are elements of this machine and their strides are whole elements.
  Array array(const char* name, const py::object& object) {
    const py::array a = as_array(name, object);
    bool in_place = readable(a);
    for (py::ssize_t i = 0; i < a.ndim(); ++i) in_place &= a.strides(i) % a.itemsize() == 0;
    return describe(name, in_place ? a : copy(a), dtype(name, a));
  }

  // The same for what kernels read without strides.
  Array contiguous(const char* name, const py::object& object) {
    const py::array a = as_array(name, object);
    const bool in_place = readable(a) && (a.flags() & py::array::c_style) != 0;
    return describe(name, in_place ? a : copy(a), dtype(name, a));
  }

  // Integers, checked against their limit before they become 32 bits wide.
  Array lengths(const char* name, const py::object& object, const char* limit_name, int64_t limit) {
    const py::array a = as_array(name, object);
    if (a.dtype().kind() != 'i' && a.dtype().kind() != 'u') {
      fail<py::type_error>(function_, std::string(name) + " must hold integers, got " + dtype_name(a));
    }
    const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast | kAligned>(a);
    const std::string reason = lengths_reason(name, wide.data(), wide.size(), limit_name, limit);
    if (!reason.empty()) fail<py::value_error>(function_, reason);
    return describe(name, py::array_t<int32_t, py::array::c_style | py::array::forcecast>(wide), DType::kFloat32);
  }

  // Any integers that 32 bits hold.
  Array integers(const char* name, const py::object& object) {
    const py::array a = as_array(name, object);
    if (a.dtype().kind() != 'i' && a.dtype().kind() != 'u') {
      fail<py::type_error>(function_, std::string(name) + " must hold integers, got " + dtype_name(a));
    }
    const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast | kAligned>(a);
    for (py::ssize_t i = 0; i < wide.size(); ++i) {
      if (wide.data()[i] != static_cast<int32_t>(wide.data()[i])) {
        fail<py::value_error>(function_, std::string(name) + " (" + text(wide.data()[i]) + ") must fit 32 bits");
      }
    }
    return describe(name, py::array_t<int32_t, py::array::c_style | py::array::forcecast>(wide), DType::kFloat32);
  }

  // The dtype of the first array, for the results.
  py::dtype result_dtype() const { return native_dtype(alive_.front()); }

 private:
  static constexpr int kAligned = py::detail::npy_api::NPY_ARRAY_ALIGNED_;

  // In this machine's byte order, and where a number of its type may lie: fields of structured arrays may lie anywhere.
  static bool readable(const py::array& a) {
    return py::cast<bool>(a.dtype().attr("isnative")) && (a.flags() & kAligned) != 0;
  }
  static std::string dtype_name(const py::array& a) { return to_string(a.dtype().attr("name")); }
  static py::array copy(const py::array& a) { return a.attr("astype")(native_dtype(a), py::arg("order") = "C"); }
  static py::dtype native_dtype(const py::array& a) { return a.dtype().attr("newbyteorder")("="); }

  DType dtype(const char* name, const py::array& a) const { return dtype_named(function_, name, dtype_name(a)); }

  py::array as_array(const char* name, const py::object& object) const {
    const py::array a = py::array::ensure(object);
    if (!a)
      fail<py::type_error>(function_, std::string(name) + " must be an array, got " + to_string(py::type::of(object)));
    return a;
  }

  Array describe(const char* name, const py::array& a, DType type) {
    Array result;
    result.name = name;
    result.present = true;
    result.data = const_cast<void*>(a.data());
    result.dtype = type;
    result.rank = static_cast<int>(a.ndim());
    for (int i = 0; i < std::min(result.rank, 4); ++i) {
      result.shape[i] = a.shape(i);
      result.stride[i] = a.strides(i) / a.itemsize();
    }
    alive_.push_back(a);
    return result;
  }

  const char* function_;
  std::vector<py::array> alive_;
};

}  // namespace attn_ops::numpy
