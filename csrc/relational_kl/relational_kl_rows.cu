// SPDX-License-Identifier: Apache-2.0
// These kernels give a warp to each row: they make the scales of rows and keys before the sweeps,
// and take gradients through the scales after them. Inner products are fp64: a scale is rounded
// once, and the radial part that a gradient loses can be much larger than what remains.
#include <cmath>

#include "../common/cuda/launch.h"
#include "../common/cuda/rows.h"
#include "../common/rows_math.h"
#include "relational_kl_cuda.h"
#include "relational_kl_numbers.h"

namespace kdk::relational_kl {
namespace {

using namespace kdk::cuda;

constexpr double kLargest = 3.4028234663852886e38;  // of fp32

template <typename F>
void for_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kBFloat16: return f(bf16_t{});
    case Dtype::kFloat16: return f(fp16_t{});
    default: return f(float{});
  }
}

template <typename T>
__device__ __forceinline__ double inner_product(const T* x, const T* y, int64_t D) {
  double sum = 0;
  for (int64_t d = threadIdx.x % 32; d < D; d += 32)
    sum += static_cast<double>(to_float(x[d])) * static_cast<double>(to_float(y[d]));
  return warp_sum(sum);
}

// Returns the clamped norm of a row, and NaN where fp32 does not hold its square.
template <typename T>
__device__ __forceinline__ double norm_of(const T* x, int64_t D) {
  const double squared = inner_product(x, x, D);
  return squared <= kLargest ? clamp_min(std::sqrt(squared), kEps) : __builtin_nan("");
}

template <typename T>
__device__ double scale_of(const ScalesParams& p, const Source& x, int64_t i, double temperature,
                           const float* factor) {
  const double by = factor != nullptr ? temperature * *factor : temperature;
  return 1 / (p.normalize ? by * norm_of(row_of<T>(x, 0, i), x.cols) : by);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    relational_kl_scales_kernel(const __grid_constant__ ScalesParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  if (row >= p.B) {
    const int64_t bank = (row - p.B) / p.K, k = (row - p.B) % p.K;
    if (bank >= p.banks) return;
    const Source& keys = p.keys[bank];
    const double norm = norm_of(row_of<T>(keys, 0, k), keys.cols);
    if (threadIdx.x % 32 == 0) p.key_scales[bank * p.K + k] = static_cast<float>(1 / norm);
    return;
  }
  double numbers[kNumbers] = {};
  // an index that the compiler does not know would put the numbers into local memory
  KDK_UNROLL
  for (int side = 0; side < 2; ++side) {
    const Source& x = p.x[side];
    if (x.data == nullptr) continue;
    numbers[kStudentScale + side] = scale_of<T>(p, x, row, p.temperature[side], p.factor[side]);
    if (p.own.data == nullptr) continue;
    if (side == 0) numbers[kOwnScale] = scale_of<T>(p, p.own, row, 1, nullptr);
    const double product = inner_product(row_of<T>(x, 0, row), row_of<T>(p.own, 0, row), x.cols);
    numbers[kOwnStudent + side] = product * numbers[kStudentScale + side] * numbers[kOwnScale];
  }
  if (threadIdx.x % 32 != 0) return;
  KDK_UNROLL
  for (int place = 0; place < kNumbers; ++place) {
    p.numbers[place * p.B + row] = static_cast<float>(numbers[place]);
  }
}

// The derivatives of a row's loss times dout by the logits of its own key.
struct ByOwnLogits {
  double student, teacher;

  __device__ __forceinline__ ByOwnLogits(const RowGradientsParams& p, int64_t i, double dout) {
    const float* numbers = p.numbers + i;
    const auto below = [&](int logit, int lse) {
      return static_cast<double>(numbers[logit * p.B]) - numbers[lse * p.B];
    };
    const double log_q = below(kOwnStudent, kLseStudent);
    if (p.x[1].data == nullptr) {  // the own key is the positive one
      student = dout * std::expm1(log_q);
      teacher = 0;
      return;
    }
    const double log_p = below(kOwnTeacher, kLseTeacher), probability = std::exp(log_p);
    const double c = cost(log_p, log_q, p.subtract_entropy);
    student = dout * (std::exp(log_q) - probability);
    teacher = dout * by_teacher_logit(probability, c, static_cast<double>(p.loss[i]));
  }
};

// One row of v, or the row of x of one side, and the factor that it has in a derivative.
template <typename T>
struct Term {
  const T* row = nullptr;
  double factor = 0;

  __device__ __forceinline__ double operator[](int64_t d) const {
    return row == nullptr ? 0 : factor * static_cast<double>(to_float(row[d]));
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    relational_kl_bwd_rows_kernel(const __grid_constant__ RowGradientsParams p) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  const int64_t lane = threadIdx.x % 32;
  const Source& rows = p.of == Of::kOwnKeys ? p.own
                       : p.of == Of::kKeys  ? p.keys
                                            : p.x[p.of == Of::kTeacher];
  const int64_t D = rows.cols;
  if (row >= rows.rows) return;
  T* out = static_cast<T*>(p.out) + row * D;
  if (p.of == Of::kKeys && p.num_keys != nullptr && row >= *p.num_keys) {
    for (int64_t d = lane; d < D; d += 32) out[d] = from_float<T>(0);
    return;
  }
  const T* x = row_of<T>(rows, 0, row);
  double scale = 1;
  Term<float> v;
  Term<T> terms[2];
  if (p.v != nullptr) v = {p.v + row * D, 1};
  if (p.of == Of::kKeys) {
    if (p.key_scales != nullptr) scale = p.key_scales[row];
  } else {
    const auto number = [&](int place) { return p.numbers[place * p.B + row]; };
    const double dout = p.dout[row * p.dout_stride];
    if (p.of == Of::kStudent) v.factor = dout;
    scale = number(p.of == Of::kOwnKeys   ? kOwnScale
                   : p.of == Of::kTeacher ? kTeacherScale
                                          : kStudentScale);
    if (p.own.data != nullptr) {
      const ByOwnLogits by(p, row, dout);
      if (p.of == Of::kOwnKeys) {
        terms[0] = {row_of<T>(p.x[0], 0, row), by.student * number(kStudentScale)};
        if (p.x[1].data != nullptr)
          terms[1] = {row_of<T>(p.x[1], 0, row), by.teacher * number(kTeacherScale)};
      } else {
        const double derivative = p.of == Of::kTeacher ? by.teacher : by.student;
        terms[0] = {row_of<T>(p.own, 0, row), derivative * number(kOwnScale)};
      }
    }
  }
  double squared = 0, along = 0;
  for (int64_t d = lane; d < D; d += 32) {
    const double value = to_float(x[d]);
    squared += value * value;
    along += value * (v[d] + terms[0][d] + terms[1][d]);
  }
  squared = warp_sum(squared);
  along = warp_sum(along);
  if (p.dfactor != nullptr && lane == 0)
    p.dfactor[row] = static_cast<float>(-scale * along / static_cast<double>(*p.factor));
  if (p.out == nullptr) return;
  // a norm that the clamp holds does not depend on x
  const double radial = p.normalize && std::sqrt(squared) >= kEps ? along / squared : 0;
  for (int64_t d = lane; d < D; d += 32) {
    const double value = v[d] + terms[0][d] + terms[1][d] - radial * to_float(x[d]);
    out[d] = from_float<T>(static_cast<float>(scale * value));
  }
}

}  // namespace

void launch_relational_kl_scales(const ScalesParams& params, Dtype dtype, cudaStream_t stream) {
  const int64_t rows = params.B + params.banks * params.K;
  if (rows == 0) return;
  for_dtype(dtype, [&](auto element) {
    launch(relational_kl_scales_kernel<decltype(element)>, grid_of(ceil_div(rows, kRowsPerBlock)),
           kThreads, 0, stream, params);
  });
}

void launch_relational_kl_bwd_rows(const RowGradientsParams& params, int64_t rows, Dtype dtype,
                                   cudaStream_t stream) {
  if (rows == 0) return;
  for_dtype(dtype, [&](auto element) {
    launch(relational_kl_bwd_rows_kernel<decltype(element)>, grid_of(ceil_div(rows, kRowsPerBlock)),
           kThreads, 0, stream, params);
  });
}

}  // namespace kdk::relational_kl
