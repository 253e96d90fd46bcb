// SPDX-License-Identifier: Apache-2.0
// The kernels need only these few things of LibTorch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "matrix.h"

namespace kdk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// The number of a dtype in the C shim.
inline int32_t shim_dtype(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

// Bytes of an element of what the kernels allocate.
inline size_t itemsize(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Half:
    case ScalarType::BFloat16: return 2;
    default: return 1;
  }
}

// Says how much memory is not there. kdkernels/_allocation.py adds which operator asked, and for
// what.
[[noreturn]] inline void refuse_allocation(std::initializer_list<int64_t> sizes, size_t element) {
  double bytes = static_cast<double>(element);  // may pass the range of integers
  std::string shape;
  for (const int64_t size : sizes) {
    bytes *= static_cast<double>(size);
    shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  }
  char number[64];
  std::snprintf(number, sizeof number, "%.0f", bytes);
  throw std::runtime_error("cannot allocate " + std::string(number) + " bytes, shape [" + shape +
                           "]");
}

// Returns an uninitialised contiguous tensor, by default on the CPU. It calls the C shim itself:
// torch::stable::new_empty looks its operator up by name in every call, which shows at small batch.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype,
                    int32_t device_type = aoti_torch_device_type_cpu(), int32_t device = 0) {
  int64_t strides[8], stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes.begin()[i], 1))
    strides[i] = stride;
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                               shim_dtype(dtype), device_type, device, &handle) != TORCH_SUCCESS)
    refuse_allocation(sizes, itemsize(dtype));
  return Tensor(handle);
}

template <typename T>
inline constexpr ScalarType scalar_type_of = ScalarType::Undefined;
template <>
inline constexpr ScalarType scalar_type_of<float> = ScalarType::Float;
template <>
inline constexpr ScalarType scalar_type_of<double> = ScalarType::Double;

// Owns a tensor handle over memory that somebody else owns.
class View {
 public:
  template <typename T>
  explicit View(const Matrix<T>& m)
      : View(m.data, m, shim_dtype(scalar_type_of<std::remove_const_t<T>>)) {}

  // Views a block of a matrix of any type, whose first element is `data`.
  template <typename T>
  View(const void* data, const Matrix<T>& form, int32_t dtype) {
    const int64_t sizes[] = {form.rows, form.cols}, strides[] = {form.row_stride, form.col_stride};
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_create_tensor_from_blob(const_cast<void*>(data), 2, sizes, strides, 0, dtype,
                                           aoti_torch_device_type_cpu(), 0, &handle_));
  }
  ~View() { aoti_torch_delete_tensor_object(handle_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  AtenTensorHandle get() const { return handle_; }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// Uninitialised scratch memory. It comes from torch's allocator, so that torch's profiler sees it.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t n) {
    if (n > 0) tensor_ = empty({n}, scalar_type_of<T>);
  }
  T* data() const { return tensor_ ? static_cast<T*>(tensor_->mutable_data_ptr()) : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

// Returns x in a dtype: x itself where it has that dtype.
inline Tensor in_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// Returns x in fp32 or fp64.
template <typename T>
Tensor in_type(const Tensor& x) {
  return in_dtype(x, scalar_type_of<T>);
}

// Returns x in fp32 or fp64 and contiguous, without a call through the dispatcher where it is so
// already.
template <typename T>
Tensor contiguous_in_type(const Tensor& x) {
  const Tensor wide = in_type<T>(x);
  return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
}

// Whether BLAS takes rows of `cols` elements with these strides as they lie.
inline bool blas_takes(int64_t cols, int64_t row_stride, int64_t col_stride) {
  return col_stride == 1 && row_stride >= cols;
}

// Returns a matrix in fp32 or fp64 that BLAS takes by its rows or by its columns: x itself where it
// is so already.
template <typename T>
Tensor for_blas(const Tensor& x) {
  const Tensor wide = in_type<T>(x);
  const int64_t row = wide.stride(0), column = wide.stride(1);
  const bool fits = blas_takes(wide.size(1), row, column) || blas_takes(wide.size(0), column, row);
  return fits ? wide : torch::stable::contiguous(wide);
}

// Returns groups of matrices in fp32 or fp64 that BLAS takes by their rows: x itself where it is so
// already.
template <typename T>
Tensor groups_for_blas(const Tensor& x) {
  const Tensor wide = in_type<T>(x);
  const bool fits = blas_takes(wide.size(2), wide.stride(1), wide.stride(2));
  return fits ? wide : torch::stable::contiguous(wide);
}

inline Optional contiguous(const Optional& x) {
  return x ? Optional(torch::stable::contiguous(*x)) : std::nullopt;
}

template <typename T>
Matrix<T> matrix(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

// Returns group g of a [G, rows, cols] tensor.
template <typename T>
Matrix<T> group(const Tensor& x, int64_t g) {
  return {static_cast<T*>(x.mutable_data_ptr()) + g * x.stride(0), x.size(1), x.size(2),
          x.stride(1), x.stride(2)};
}

}  // namespace kdk
