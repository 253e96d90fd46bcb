// SPDX-License-Identifier: Apache-2.0
#include "centre.h"

#include <cmath>

#include "../quotient.h"
#include "launch.h"
#include "rows.h"

namespace kdk::cuda {
namespace {

constexpr int kSample = 256, kAcross = 16;  // rows; columns of a block
constexpr int kDown = kThreads / kAcross, kEach = kSample / kDown;
// Columns of larger numbers are not moved, so that a norm hardly grows beyond what it was.
constexpr float kMoved = 0x1p30f;
constexpr float kCoarse = 0x1p22f;  // units in a mean, beyond which they are finer than its digits

template <typename T>
__global__ void __launch_bounds__(kThreads) centre_kernel(const __grid_constant__ CentreParams p) {
  const int64_t M = p.x.rows, D = p.x.cols;
  const auto slabs = static_cast<unsigned>(ceil_div(D, kAcross));
  const int64_t g = blockIdx.x / slabs, step = M > kSample ? ceil_div(M, kSample) : 1;
  const int column = threadIdx.x % kAcross, lane = threadIdx.x / kAcross;
  const int64_t d = blockIdx.x % slabs * kAcross + column;
  auto* shared = reinterpret_cast<float*>(shared_memory());  // [kDown, kAcross]
  // merge(total, number) over the column, in the order of the threads
  const auto over_column = [&](float number, const auto& merge) {
    shared[threadIdx.x] = number;
    __syncthreads();
    float total = shared[column];
    for (int other = 1; other < kDown; ++other)
      total = merge(total, shared[other * kAcross + column]);
    __syncthreads();
    return total;
  };
  const auto add = [](float a, float b) { return a + b; };
  const auto larger = [](float a, float b) { return a > b ? a : b; };

  float x[kEach], count = 0, largest = -kMoved;
  bool usable[kEach];
  KDK_UNROLL
  for (int e = 0; e < kEach; ++e) {
    const int64_t row = (lane + e * kDown) * step;
    const bool inside = row < M && d < D;
    x[e] = inside ? to_float(row_of<T>(p.x, g, row)[d]) : 0.0f;
    usable[e] = inside && fabsf(x[e]) < kMoved;  // false for NaN
    count += usable[e];
    if (usable[e]) largest = larger(largest, x[e]);
  }
  count = larger(over_column(count, add), 1);
  // offsets from one of the numbers, so that equal ones have their exact mean
  const float origin = over_column(largest, larger);
  float sum = 0;
  KDK_UNROLL
  for (int e = 0; e < kEach; ++e) sum += usable[e] ? x[e] - origin : 0;
  const float offset = quotient(over_column(sum, add), count);
  float square = 0;
  KDK_UNROLL
  for (int e = 0; e < kEach; ++e) {
    const float deviation = usable[e] ? x[e] - origin - offset : 0;
    square += deviation * deviation;
  }
  const float twice = 2 * sqrtf(quotient(over_column(square, add), count));
  if (lane > 0 || d >= D) return;
  const float mean = origin == -kMoved ? 0 : origin + offset;
  // the exponent of 2 s alone is a power of two that is at most 2 s
  const float unit = 2 * float_of(bits_of(twice) & 0x7f800000u);
  const float units = unit > 0 ? quotient(mean, unit) : kCoarse;
  p.point[g * D + d] = fabsf(units) < kCoarse ? floorf(units + 0.5f) * unit : mean;
}

}  // namespace

void launch_centre(const CentreParams& params, Math math, cudaStream_t stream) {
  const auto kernel = math == Math::kBFloat16  ? centre_kernel<bf16_t>
                      : math == Math::kFloat16 ? centre_kernel<fp16_t>
                                               : centre_kernel<float>;
  launch(kernel, grid_of(params.G * ceil_div(params.x.cols, kAcross)), kThreads,
         kThreads * sizeof(float), stream, params);
}

}  // namespace kdk::cuda
