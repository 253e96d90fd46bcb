// SPDX-License-Identifier: Apache-2.0
#include "normalise.h"

#include <cmath>

#include "../rows_math.h"
#include "launch.h"
#include "rows.h"

namespace kdk::cuda {
namespace {

// dx = (v - u <u, v>) / |x| is computed in fp64, because the radial part u <u, v> can be much
// larger than what remains.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    normalise_kernel(const __grid_constant__ NormaliseParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  const int64_t lane = threadIdx.x % 32, D = p.x.cols;
  if (row >= p.G * p.B) return;
  const T* x = row_of<T>(p.x, row / p.B, row % p.B);
  const float* v = p.v + row * D;
  double squared = 0, radial = 0;
  for (int64_t d = lane; d < D; d += 32) {
    const double value = to_float(x[d]);
    squared += value * value;
    radial += value * v[d];
  }
  const double norm = std::sqrt(warp_sum(squared)), inverse = 1 / clamp_min(norm, kEps);
  const double factor = p.divided ? 1 : inverse;
  // a norm that the clamp holds does not depend on x
  radial = norm < kEps ? 0 : warp_sum(radial) * inverse * inverse;
  for (int64_t d = lane; d < D; d += 32)
    static_cast<T*>(p.dx)[row * D + d] = from_float<T>(
        static_cast<float>((v[d] - radial * static_cast<double>(to_float(x[d]))) * factor));
}

}  // namespace

void launch_normalise(const NormaliseParams& params, Math math, cudaStream_t stream) {
  for_math(math, [&]<Math kMath>() {
    launch(normalise_kernel<Element<kMath>>, grid_of(ceil_div(params.G * params.B, kRowsPerBlock)),
           kThreads, 0, stream, params);
  });
}

}  // namespace kdk::cuda
