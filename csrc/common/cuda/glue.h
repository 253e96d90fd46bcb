// SPDX-License-Identifier: Apache-2.0
// Glue stands between tensors and launches: it knows the device and stream that a call runs on,
// allocates its memory, and describes tensors as kernels read them.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "../stable.h"
#include "centre.h"
#include "product.h"
#include "properties.h"
#include "scaled_rows.h"

#if defined(KDK_CUDA_HOST)
#define KDK_CUDA_DISPATCH_KEY CPU
#else
#define KDK_CUDA_DISPATCH_KEY CUDA
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace kdk::cuda {

#if defined(KDK_CUDA_HOST)
struct OnDevice {
  explicit OnDevice(int32_t) {}
};
inline cudaStream_t current_stream(int32_t) { return nullptr; }
#else
using OnDevice = torch::stable::accelerator::DeviceGuard;
inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

// The device of a tensor and its current stream. The device is the current one as long as this
// object lives.
class Device {
 public:
  explicit Device(const Tensor& like)
      : index_(like.get_device_index()), guard_(index_), stream_(current_stream(index_)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type_));
  }

  cudaStream_t stream() const { return stream_; }

  // Returns an uninitialised contiguous tensor.
  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    const Tensor x = kdk::empty(sizes, dtype, type_, index_);
#if defined(KDK_CUDA_HOST)
    // NaN, so that reading what was never written shows
    if (x.numel() > 0) std::memset(x.mutable_data_ptr(), 0xff, x.numel() * x.element_size());
#endif
    return x;
  }

  Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType dtype) const {
    Tensor x = empty(sizes, dtype);
    return torch::stable::zero_(x);
  }

 private:
  int32_t index_, type_ = 0;
  OnDevice guard_;
  cudaStream_t stream_;
};

template <typename T>
T* data_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Returns how features of this dtype are multiplied. With `ieee`, fp32 features are multiplied as
// they are.
inline Math math_of(const Tensor& x, bool ieee) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return Math::kBFloat16;
    case ScalarType::Half: return Math::kFloat16;
    default: return ieee ? Math::kIeee : Math::kTf32x3;
  }
}

inline ScalarType dtype_of(Math math) {
  return math == Math::kBFloat16  ? ScalarType::BFloat16
         : math == Math::kFloat16 ? ScalarType::Half
                                  : ScalarType::Float;
}

inline Dtype stored_as(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? Dtype::kBFloat16
         : dtype == ScalarType::Half   ? Dtype::kFloat16
                                       : Dtype::kFloat;
}

// Returns x with unit stride along the last axis: x itself where it is so already.
inline Tensor with_contiguous_rows(const Tensor& x) {
  return x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

// Describes a matrix, or groups of matrices, with contiguous rows. `sample_mask` says which rows
// are read.
inline Source source_of(const Tensor& x, const std::optional<Tensor>& sample_mask = {}) {
  const int64_t dim = x.dim(), size = x.element_size();
  Source source{};
  source.data = x.mutable_data_ptr();
  source.rows = x.size(dim - 2);
  source.cols = x.size(dim - 1);
  source.stride = x.stride(dim - 2);
  source.group = dim > 2 ? x.stride(0) : 0;
  source.aligned = reinterpret_cast<uintptr_t>(source.data) % kChunkBytes == 0 &&
                   (source.rows <= 1 || source.stride * size % kChunkBytes == 0) &&
                   (dim <= 2 || x.size(0) <= 1 || source.group * size % kChunkBytes == 0);
  if (sample_mask) {
    source.keep = data_of<const bool>(*sample_mask);
    source.keep_stride = sample_mask->stride(0);
  }
  return source;
}

// Returns a point [G, D] that the rows of x, [M, D] or [G, M, D], lie around, where products take
// them less that point. Rows of 16 bits are taken as they are, since their products are exact.
inline std::optional<Tensor> point_of(const Device& device, const Tensor& x) {
  if (x.scalar_type() != ScalarType::Float || x.numel() == 0) return std::nullopt;
  const int64_t G = x.dim() > 2 ? x.size(0) : 1;
  const Tensor point = device.empty({G, x.size(x.dim() - 1)}, ScalarType::Float);
  launch_centre({source_of(x), data_of<float>(point), G}, math_of(x, true), device.stream());
  return point;
}

// Multiplies row i of x [B, D] by factor i of `factors` [B], both fp32. The result has the dtype
// asked for.
inline Tensor scaled_rows(const Device& device, const Tensor& x, const Tensor& factors,
                          ScalarType dtype) {
  const Tensor rows = torch::stable::contiguous(x);
  const int64_t B = rows.size(0), D = rows.size(1);
  const Tensor out = device.empty({B, D}, dtype);
  if (out.numel() > 0)
    launch_scaled_rows({data_of<const float>(rows), data_of<const float>(factors),
                        factors.stride(0), out.mutable_data_ptr(), B, D},
                       math_of(out, true), device.stream());
  return out;
}

// Returns `count` rows of a source, from row `first` on.
inline Source rows_of(Source source, int64_t first, int64_t count, Math math) {
  source.data = static_cast<const char*>(source.data) +
                first * source.stride * static_cast<int64_t>(element_bytes(math));
  if (source.keep != nullptr) source.keep += first * source.keep_stride;
  source.rows = count;
  return source;
}

// Returns how many of `count` rows are made at a time: whole tiles of rows that stay in half of the
// L2 cache until the product that follows has read them.
inline int64_t rows_in_l2(int64_t count, int64_t row_bytes) {
  const int64_t fitting = l2_bytes() / 2 / std::max<int64_t>(row_bytes, 1) / kTile * kTile;
  return std::min(count, std::max<int64_t>(kTile, fitting));
}

// A product and the memory that its splits need; its result has the dtype of its operands unless
// params.out_dtype says otherwise. The launch before it, on the same stream, sets its
// semaphores to 0.
class Product {
 public:
  Product(const Device& device, int64_t groups, int64_t M, int64_t N, int64_t K, Math math)
      : groups_(groups), math_(math) {
    const int64_t tiles = ceil_div(M, kTile) * ceil_div(N, kTile);
    const Splits splits = split_contraction(groups * tiles, K, math);
    params.M = M;
    params.N = N;
    params.K = K;
    params.tiles = tiles;
    params.out_dtype = stored_as(dtype_of(math));
    params.splits = splits.count;
    params.split_length = splits.length;
    if (splits.count > 1) {
      partials_ = device.empty({splits.count * groups * tiles * kTile * kTile}, ScalarType::Float);
      semaphores_ = device.empty({semaphore_count()}, ScalarType::Int);
      params.partials = data_of<float>(*partials_);
      params.semaphores = data_of<unsigned>(*semaphores_);
    }
  }

  int64_t semaphore_count() const { return params.splits > 1 ? groups_ * params.tiles : 0; }

  // Sets the semaphores to 0 where no launch before the product does.
  void clear_semaphores() {
    if (semaphores_) torch::stable::zero_(*semaphores_);
  }

  void launch(Along a_along, const Device& device) const {
    launch_product(params, groups_, a_along, math_, device.stream());
  }

  ProductParams params{};

 private:
  int64_t groups_;
  Math math_;
  std::optional<Tensor> partials_, semaphores_;
};

}  // namespace kdk::cuda
