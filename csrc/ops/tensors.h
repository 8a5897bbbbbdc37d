// What every op needs at the torch boundary: errors that say which op, which argument, what was expected and what came,
// and views of tensors as the kernels want them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../api/backend.h"

namespace mnist_ext::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline constexpr int64_t kMaxDims = 64;  // PyTorch's own limit

// Throws Error (std::runtime_error becomes RuntimeError in Python, std::out_of_range IndexError, std::invalid_argument
// ValueError) with all parts in one message.
template <class Error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

template <class Error = std::runtime_error, class... Parts>
void check(bool condition, const Parts&... parts) {
  if (!condition) fail<Error>(parts...);
}

// Parts of messages that are put into words only when a message is written: every call passes them to check().
struct Sizes {  // "[64, 10]"
  const int64_t* sizes;
  int64_t dims;
  friend std::ostream& operator<<(std::ostream& out, const Sizes& s) {
    out << '[';
    for (int64_t i = 0; i < s.dims; ++i) out << (i ? ", " : "") << s.sizes[i];
    return out << ']';
  }
};

struct Shape {
  const Tensor& tensor;
  explicit Shape(const Tensor& t) : tensor(t) {}
  friend std::ostream& operator<<(std::ostream& out, const Shape& s) {
    return out << Sizes{s.tensor.sizes().data(), s.tensor.dim()};
  }
};

struct DtypeName {  // "float32"
  const Tensor& tensor;
  explicit DtypeName(const Tensor& t) : tensor(t) {}
  friend std::ostream& operator<<(std::ostream& out, const DtypeName& d) {
    switch (d.tensor.scalar_type()) {
      case ScalarType::Float: return out << "float32";
      case ScalarType::Double: return out << "float64";
      case ScalarType::Half: return out << "float16";
      case ScalarType::BFloat16: return out << "bfloat16";
      case ScalarType::Long: return out << "int64";
      case ScalarType::Int: return out << "int32";
      case ScalarType::Short: return out << "int16";
      case ScalarType::Char: return out << "int8";
      case ScalarType::Byte: return out << "uint8";
      case ScalarType::Bool: return out << "bool";
      default: return out << "a dtype without kernels";
    }
  }
};

inline bool has_sizes(const Tensor& t, const int64_t* sizes, int64_t dims) {
  return t.dim() == dims && std::equal(sizes, sizes + dims, t.sizes().begin());
}

inline bool same_sizes(const Tensor& a, const Tensor& b) { return has_sizes(a, b.sizes().begin(), b.dim()); }

inline bool is_floating(const Tensor& t) {  // of a dtype that kernels compute with
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

inline void check_floating(const char* op, const char* argument, const Tensor& t) {
  check(is_floating(t), op, ": ", argument, ": expected float32, float64, bfloat16 or float16, got ", DtypeName(t));
}

inline bool has_class_indices(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return dtype == ScalarType::Long || dtype == ScalarType::Int || dtype == ScalarType::Byte;
}

inline ClassIndices class_indices(const Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  return {t.const_data_ptr(), dtype == ScalarType::Long  ? ClassIndices::Type::int64
                              : dtype == ScalarType::Int ? ClassIndices::Type::int32
                                                         : ClassIndices::Type::uint8};
}

// Raises for the position of a target that a kernel found, if it found one (it is not -1).
inline void check_class(const char* op, const Tensor& target, int64_t bad_position, int64_t classes,
                        int64_t ignore_index) {
  if (bad_position < 0) return;
  int64_t index[kMaxDims], rest = bad_position;
  for (int64_t dim = target.dim() - 1; dim >= 0; --dim) {
    index[dim] = rest % target.size(dim);
    rest /= target.size(dim);
  }
  fail<std::out_of_range>(op, ": target: expected class indices in [0, ", classes, ") or ignore_index = ", ignore_index,
                          ", got ", class_indices(target)[bad_position], " at ", Sizes{index, target.dim()});
}

inline bool on_same_device(const Tensor& a, const Tensor& b) {
  if (a.is_cpu()) return b.is_cpu();
  return a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
}

struct DeviceName {  // "cuda:0"
  const Tensor& tensor;
  explicit DeviceName(const Tensor& t) : tensor(t) {}
  friend std::ostream& operator<<(std::ostream& out, const DeviceName& d) {
    if (d.tensor.is_cpu()) return out << "cpu";
    if (d.tensor.is_cuda()) return out << "cuda:" << d.tensor.get_device_index();
    return out << "another device";
  }
};

template <class Error = std::runtime_error>
void check_device(const char* op, const char* argument, const Tensor& t, const char* other_argument,
                  const Tensor& other) {
  check<Error>(on_same_device(t, other), op, ": ", argument, ": expected a tensor on the device of ", other_argument,
               ", ", DeviceName(other), ", got one on ", DeviceName(t));
}

template <class Error = std::runtime_error>
void check_like(const char* op, const char* argument, const Tensor& t, const char* other_argument,
                const Tensor& other) {
  check<Error>(t.scalar_type() == other.scalar_type(), op, ": ", argument, ": expected the dtype of ", other_argument,
               ", ", DtypeName(other), ", got ", DtypeName(t));
  check_device<Error>(op, argument, t, other_argument, other);
}

// The same, and that the shape fits: `expected` says in words which one would.
template <class Error = std::runtime_error, class... Parts>
void check_operand(const char* op, const char* argument, const Tensor& t, const char* other_argument,
                   const Tensor& other, bool fits, const Parts&... expected) {
  check_like<Error>(op, argument, t, other_argument, other);
  check<Error>(fits, op, ": ", argument, ": expected ", expected..., ", got ", Shape(t));
}

// Calls body with an element of the kernels' type for the tensor's dtype, which is float32 or float64.
template <class Body>
void dispatch_float_or_double(const Tensor& t, const Body& body) {
  t.scalar_type() == ScalarType::Float ? body(float{}) : body(double{});
}

// The same for all that is_floating() allows.
template <class Body>
void dispatch_floating(const Tensor& t, const Body& body) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return body(float{});
    case ScalarType::Double: return body(double{});
    case ScalarType::BFloat16: return body(BFloat16{});
    default: return body(Float16{});
  }
}

// torch::stable::contiguous, without the dispatcher where there is nothing to copy.
inline Tensor made_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline int32_t dtype_of(const Tensor& t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

inline bool have_same_layout(const Tensor& a, const Tensor& b) {
  if (dtype_of(a) != dtype_of(b) || !on_same_device(a, b) || !same_sizes(a, b)) return false;
  bool same = true;
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == 1 || a.stride(i) == b.stride(i);
  return same;
}

// The stride of dimensions [begin, end) taken as one, if there is one: each of them steps over exactly the whole of the
// next. Sizes of 1 step over nothing; if there are no others, the stride is 0.
inline std::optional<int64_t> merged_stride(const Tensor& t, int64_t begin, int64_t end) {
  const auto sizes = t.sizes();
  const auto strides = t.strides();
  int64_t stride = 0, inner = -1;
  for (int64_t i = end - 1; i >= begin; --i) {
    if (sizes[i] == 1) continue;
    if (inner == -1) {
      stride = strides[i];
    } else if (strides[i] != inner) {
      return std::nullopt;
    }
    inner = strides[i] * sizes[i];
  }
  return stride;
}

// A tensor [..., columns] as a matrix [rows, columns] with one stride for each.
struct Matrix {
  Tensor tensor;  // the tensor itself, or a contiguous copy where the kernels do not take its strides
  int64_t rows, columns, row_stride, column_stride = 1;

  template <class T>
  MatrixView<T> view() const {
    return {static_cast<const T*>(tensor.const_data_ptr()), row_stride, column_stride};
  }
};

enum class Strides { row_major, one_of_them_1 };

// At any strides where the kernels take them, else at those that they do.
inline Matrix as_matrix(const Tensor& t, Strides strides) {
  const int64_t dims = t.dim(), columns = t.size(dims - 1);
  int64_t rows = 1;
  for (int64_t i = 0; i < dims - 1; ++i) rows *= t.size(i);
  const bool unit_columns = columns <= 1 || t.stride(dims - 1) == 1;
  const std::optional<int64_t> stride = merged_stride(t, 0, dims - 1);
  if (rows == 0 || (unit_columns && stride)) return {t, rows, columns, stride.value_or(columns)};
  const bool column_major = rows == 1 || stride == 1;
  if ((strides == Strides::one_of_them_1 && column_major) || (stride && kernel_table().any_strides)) {
    return {t, rows, columns, rows == 1 ? 1 : *stride, t.stride(dims - 1)};
  }
  return {made_contiguous(t), rows, columns, columns};
}

// Of the kernels' ComputeType: float32 for bfloat16 and float16.
inline int32_t compute_dtype_of(const Tensor& t) {
  return t.element_size() == 2 ? aoti_torch_dtype_float32() : dtype_of(t);
}

template <class T>
T* data_of(const Tensor& t) {  // null for an undefined tensor: not wanted
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// What lies in [begin, end) of memory: what is updated in place needs memory of its own.
struct Extent {
  const char *begin, *end;
  int32_t number;  // the caller's, to know it by
  bool written;
};

inline Extent extent_of(const Tensor& t, int32_t number, bool written) {
  const char* begin = static_cast<const char*>(t.const_data_ptr());
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return {begin, begin, number, written};
    last += (t.size(i) - 1) * t.stride(i);
  }
  return {begin, begin + (last + 1) * static_cast<int64_t>(t.element_size()), number, written};
}

// Two that overlap, of which one at least is written, if there are such. Sorts the extents.
inline std::optional<std::pair<Extent, Extent>> overlapping(std::vector<Extent>& extents) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  const Extent* furthest = nullptr;  // of those before, which all begin before
  const Extent* furthest_written = nullptr;
  for (const Extent& e : extents) {
    if (e.begin == e.end) continue;
    const Extent* other = e.written ? furthest : furthest_written;
    if (other && other->end > e.begin) return std::pair(*other, e);
    if (!furthest || furthest->end < e.end) furthest = &e;
    if (e.written && (!furthest_written || furthest_written->end < e.end)) furthest_written = &e;
  }
  return std::nullopt;
}

}  // namespace mnist_ext::ops
