// SPDX-License-Identifier: Apache-2.0
#include "scaled_rows.h"

#include "launch.h"
#include "rows.h"

namespace kdk::cuda {
namespace {

// A warp has a row and so many of its columns.
constexpr int kColumns = 1024;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scaled_rows_kernel(const __grid_constant__ ScaledRowsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  if (row >= p.B) return;
  const float factor = p.factor[row * p.factor_stride];
  const float* from = p.rows + row * p.D;
  T* to = static_cast<T*>(p.out) + row * p.D;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kColumns;
  const int64_t end = first + kColumns < p.D ? first + kColumns : p.D;
  for (int64_t d = first + threadIdx.x % 32; d < end; d += 32)
    to[d] = from_float<T>(factor * from[d]);
}

}  // namespace

void launch_scaled_rows(const ScaledRowsParams& params, Math math, cudaStream_t stream) {
  const dim3 grid = grid_of(ceil_div(params.B, kRowsPerBlock), ceil_div(params.D, kColumns));
  const auto kernel = math == Math::kBFloat16  ? scaled_rows_kernel<bf16_t>
                      : math == Math::kFloat16 ? scaled_rows_kernel<fp16_t>
                                               : scaled_rows_kernel<float>;
  launch(kernel, grid, kThreads, 0, stream, params);
}

}  // namespace kdk::cuda
