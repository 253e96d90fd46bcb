// SPDX-License-Identifier: Apache-2.0
#include "scaled_rows.h"

#include "element.h"
#include "launch.h"

namespace kdk::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scaled_rows_kernel(const __grid_constant__ ScaledRowsParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.B * p.D) return;
  static_cast<T*>(p.out)[i] = from_float<T>(p.factor[i / p.D * p.factor_stride] * p.rows[i]);
}

}  // namespace

void launch_scaled_rows(const ScaledRowsParams& params, Math math, cudaStream_t stream) {
  const dim3 grid = grid_of(ceil_div(params.B * params.D, kThreads));
  const auto kernel = math == Math::kBFloat16  ? scaled_rows_kernel<bf16_t>
                      : math == Math::kFloat16 ? scaled_rows_kernel<fp16_t>
                                               : scaled_rows_kernel<float>;
  launch(kernel, grid, kThreads, 0, stream, params);
}

}  // namespace kdk::cuda
