// SPDX-License-Identifier: Apache-2.0
// The few things that the kernels need of LibTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "matrix.h"

namespace kdk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_zeros(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes), dtype);
}

template <typename T>
inline constexpr ScalarType scalar_type_of = ScalarType::Undefined;
template <>
inline constexpr ScalarType scalar_type_of<float> = ScalarType::Float;
template <>
inline constexpr ScalarType scalar_type_of<double> = ScalarType::Double;

// Scratch memory that comes from torch's allocator, so that its profiler sees it. Uninitialised.
template <typename T>
struct Scratch {
  Scratch(const Tensor& like, int64_t n) : tensor(empty(like, {n}, scalar_type_of<T>)) {}
  T* data() const { return static_cast<T*>(tensor.mutable_data_ptr()); }
  Tensor tensor;
};

// Group g of a [G, rows, cols] tensor.
template <typename T>
Matrix<T> group(const Tensor& x, int64_t g) {
  return {static_cast<T*>(x.mutable_data_ptr()) + g * x.stride(0), x.size(1), x.size(2),
          x.stride(1), x.stride(2)};
}

}  // namespace kdk
