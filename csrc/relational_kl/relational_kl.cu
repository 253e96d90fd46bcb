// SPDX-License-Identifier: Apache-2.0
// These kernels turn tiles of logits into softmax weights, relative to running maxima, and sum
// them; merge the sums; and turn logits into derivatives. Products read weights and derivatives
// from the L2 cache.
#include "../common/cuda/launch.h"
#include "../common/cuda/reduce.h"
#include "../common/cuda/semaphores.h"
#include "relational_kl_device.h"

namespace kdk::relational_kl {
namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kNaN = __builtin_nanf("");

// Stores a number as two pieces; the first piece is the nearest number of type T.
template <typename T>
__device__ __forceinline__ void store_pieces(T* to, float x, int64_t width) {
  to[0] = from_float<T>(x);
  if constexpr (sizeof(T) == 2) to[width] = from_float<T>(x - to_float(to[0]));
}

// X: the type of the rows, which are multiplied by their scales
template <Math kMath, typename X>
__global__ void __launch_bounds__(kThreads)
    relational_kl_prepare_kernel(const __grid_constant__ PrepareParams p) {
  using T = Element<kMath>;
  const Operand& operand = p.operand;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = at / operand.width, column = at % operand.width;
  if (row >= operand.rows) return;
  const int64_t width0 = operand.steps[0] * (kStepBytes / sizeof(T));
  const int side = p.teacher && row % (2 * kGroup) >= kGroup, bank = column >= width0;
  const int64_t query = query_of(row, p.teacher), d = bank ? column - width0 : column;
  // one bank meets both sides
  const bool meets = operand.steps[1] == 0 || bank == side;
  const Source& x = side == 0 ? p.x[0] : p.x[1];
  const bool there = meets && query < x.rows && d < x.cols;
  const float value =
      there ? p.scale[side][query] * to_float(static_cast<const X*>(x.data)[query * x.stride + d])
            : 0.0f;
  store_pieces(static_cast<T*>(operand.data) + row * pieces_of(kMath) * operand.width + column,
               value, operand.width);
}

// Behind the stages lie what the warps of a row tell one another, the maxima before and after a
// tile, and what each thread has summed.
struct SweepShared {
  float across[kWarpsAcross][kTile];
  float most[2][kTile];
  float sums[8][kThreads];
  float means[4][kThreads];
  Marks marks;
};

template <Math kMath, int kCount>
constexpr int kWeightsBytes = kCount * kStageBytes<kMath> + static_cast<int>(sizeof(SweepShared));
static_assert(2 * (kWeightsBytes<Math::kBFloat16, kStages> + 1024) <= 228 << 10,
              "two blocks have to fit a multiprocessor of sm_90");
// Where kStages of them do not fit. Rows of bf16 keys and 128 features stay in shared memory only
// with kStages.
constexpr int kFewStages = 3;
static_assert(kWeightsBytes<Math::kBFloat16, kFewStages> <= kEverywhereBytes);

// Marks the logits of keys that do not count, and leaves the largest logit that each warp has of a
// row in `shared.across`.
__device__ __forceinline__ void find_maxima(Accumulators& acc, SweepShared& shared,
                                            const Place& place, int tile) {
  KDK_UNROLL
  for (int h = 0; h < 8; ++h) {
    const Entries mine(tile);
    const int row = mine.row + 8 * h, out = shared.marks.out[row];
    float most = kLeast;
    KDK_UNROLL
    for (int e = 0; e < 8; ++e) {
      float& a = entry(acc, h, e);
      if (mine.key + e >= place.counting || mine.key + e == out) a = kLeast;
      most = a > most ? a : most;
    }
    KDK_UNROLL
    for (int mask = 1; mask <= 2; mask *= 2) {
      const float other = __shfl_xor_sync(kWarp, most, mask);
      most = other > most ? other : most;
    }
    if (mine.lane == 0) shared.across[mine.across][row] = most;
  }
}

// Returns the maximum of row `row` with this tile's logits; minus infinity where no key has counted
// yet.
__device__ __forceinline__ float maximum_now(const SweepShared& shared, float before, int row) {
  float most = before;
  KDK_UNROLL
  for (int w = 0; w < kWarpsAcross; ++w) {
    const float other = shared.across[w][row];
    if (other > kLeast && other > most) most = other;
  }
  return most;
}

__device__ __forceinline__ float finite(float max) { return max == -kInfinity ? 0.0f : max; }

template <Math kMath, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocks<kMath>)
    relational_kl_weights_product_kernel(const __grid_constant__ WeightsParams p) {
  const SweepParams& of = p.sweep;
  auto& shared = *reinterpret_cast<SweepShared*>(shared_memory() + kCount * kStageBytes<kMath>);
  const Place place(of);
  const int tiles = static_cast<int>(ceil_div(place.counting, kTile));
  KDK_UNROLL
  for (int h = 0; h < 8; ++h) shared.sums[h][threadIdx.x] = 0;
  KDK_UNROLL
  for (int i = 0; i < 4; ++i) shared.means[i][threadIdx.x] = 0;
  if (threadIdx.x < kTile) shared.most[0][threadIdx.x] = -kInfinity;
  shared.marks.fill(of, place);
  if (tiles == 0) __syncthreads();  // otherwise the sweep's barriers do
  sweep<kMath, kCount>(of, shared_memory(), place, tiles, [&](Accumulators& acc, int tile) {
    const int turn = tile % 2;
    scale_logits(acc, of, place, tile);
    if (!of.teacher) {
      KDK_UNROLL
      for (int h = 0; h < 8; ++h) {
        const Entries mine(tile);
        const int row = mine.row + 8 * h, positive = shared.marks.positive[row];
        KDK_UNROLL
        for (int e = 0; e < 8; ++e) {
          if (mine.key + e == positive) p.positive[place.row0() + row] = entry(acc, h, e);
        }
      }
    }
    find_maxima(acc, shared, place, tile);
    __syncthreads();
    KDK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Entries mine(tile);
      SoftmaxSums<float> sums;
      float most[2];
      KDK_UNROLL
      for (int side = 0; side < 2; ++side) {
        const int h = 2 * i + side, row = mine.row + 8 * h;
        auto& sum = side == 0 ? sums.student : sums.teacher;
        sum = {shared.most[turn][row], shared.sums[h][mine.thread]};
        most[side] = maximum_now(shared, sum.max, row);
        if (mine.lane == 0 && mine.across == 0) {
          shared.most[1 - turn][row] = most[side];
          if (p.maxima != nullptr)
            p.maxima[(static_cast<int64_t>(place.key_tile) + tile) * of.operand.rows +
                     place.row0() + row] = most[side];
        }
      }
      sums.mean = shared.means[i][mine.thread];
      sums.raise(most[0], most[1], of.subtract_entropy);
      KDK_UNROLL
      for (int e = 0; e < 8; ++e) {
        float &a = entry(acc, 2 * i, e), &b = entry(acc, 2 * i + 1, e);
        a -= finite(most[0]);
        b -= finite(most[1]);
        const float c = cost(b, a, of.subtract_entropy);
        a = softmax_exp(a);
        b = softmax_exp(b);
        sums.student.sum += a;
        sums.teacher.sum += b;
        sums.mean += b * c;
      }
      shared.sums[2 * i][mine.thread] = sums.student.sum;
      shared.sums[2 * i + 1][mine.thread] = sums.teacher.sum;
      shared.means[i][mine.thread] = sums.mean;
    }
    if (p.weights == nullptr) return;
    scale_entries<true>(acc, of.scale[0], place, tile);
    store_rows<Element<kMath>>(acc, of, place, tile, p.weights, p.stride, false);
  });
  // sums over the lanes, then the warps of a row, which left their stages
  float* parts = p.parts + static_cast<int64_t>(blockIdx.y) * 3 * of.operand.rows + place.row0();
  const Entries mine(0);
  auto& means = *reinterpret_cast<float (*)[kWarpsAcross][kTile]>(shared_memory());
  KDK_UNROLL
  for (int h = 0; h < 8; ++h) {
    const int row = mine.row + 8 * h;
    const float sum = lane_sum<1, 2>(shared.sums[h][threadIdx.x]);
    const float mean = lane_sum<1, 2>(shared.means[h / 2][threadIdx.x]);
    if (mine.lane == 0) {
      shared.across[mine.across][row] = sum;
      means[mine.across][row] = mean;
    }
  }
  __syncthreads();
  if (threadIdx.x >= kTile) return;
  float sum = 0, mean = 0;
  for (int w = 0; w < kWarpsAcross; ++w) {
    sum += shared.across[w][threadIdx.x];
    mean += means[w][threadIdx.x];
  }
  parts[threadIdx.x] = shared.most[tiles % 2][threadIdx.x];
  parts[of.operand.rows + threadIdx.x] = sum;
  parts[2 * of.operand.rows + threadIdx.x] = mean;
}

__device__ __forceinline__ SoftmaxSums<float> from_lane(const SoftmaxSums<float>& sums, int mask) {
  return {{__shfl_xor_sync(kWarp, sums.student.max, mask),
           __shfl_xor_sync(kWarp, sums.student.sum, mask)},
          {__shfl_xor_sync(kWarp, sums.teacher.max, mask),
           __shfl_xor_sync(kWarp, sums.teacher.sum, mask)},
          __shfl_xor_sync(kWarp, sums.mean, mask)};
}

__global__ void __launch_bounds__(kThreads)
    relational_kl_merge_kernel(const __grid_constant__ MergeParams p) {
  // a warp has a query, a lane some of the splits
  const int64_t query = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (query >= p.B) return;
  const int64_t row = p.teacher ? query / kGroup * 2 * kGroup + query % kGroup : query;
  SoftmaxSums<float> sums;
  for (int64_t split = lane; split < p.splits; split += 32) {
    const float* part = p.parts + split * 3 * p.rows + row;
    SoftmaxSums<float> other{{part[0], part[p.rows]}, {}, 0};
    if (p.teacher) {
      other.teacher = {part[kGroup], part[p.rows + kGroup]};
      other.mean = part[2 * p.rows];
    }
    sums.add(other, p.subtract_entropy);
  }
  for (int mask = 16; mask > 0; mask /= 2) sums.add(from_lane(sums, mask), p.subtract_entropy);
  if (lane != 0) return;
  const int64_t counting = counting_keys(p.num_keys, p.K);
  const bool own = p.own_student != nullptr;
  if (own) {
    SoftmaxSums<float> one;
    one.student = {p.own_student[query], 1};
    if (p.teacher) one.teacher = {p.own_teacher[query], 1};
    sums.add(one, p.subtract_entropy);
  }
  const bool no_key = !own && p.positives == nullptr &&
                      (counting <= 0 || (counting == 1 && p.exclude && p.exclude[query] == 0));
  RowResult<float> result;
  if (p.teacher) {
    result = row_result(sums, p.subtract_entropy, no_key);
  } else {
    float positive = own ? p.own_student[query] : 0.0f;
    if (p.positives != nullptr) {
      const bool counts = p.positives[query] >= 0 && p.positives[query] < counting;
      positive = counts ? p.positive[query] : kNaN;
    }
    result = row_result(sums.student, positive, no_key);
  }
  p.loss[query] = result.loss;
  p.lse_student[query] = result.lse_student;
  p.lse_teacher[query] = result.lse_teacher;
  if (p.softmax == nullptr) return;
  p.softmax[query] = no_key ? 0.0f : sums.student.max;
  p.softmax[p.B + query] = no_key ? 0.0f : 1 / sums.student.sum;
  p.softmax[2 * p.B + query] = no_key || !p.teacher ? 0.0f : sums.teacher.max;
  p.softmax[3 * p.B + query] = no_key || !p.teacher ? 0.0f : 1 / sums.teacher.sum;
}

// What the derivatives by a row's logits depend on. Rows without a query get zeros.
struct RowsShared {
  Marks marks;
  float dout[kTile], lse[kTile], loss[kTile];

  __device__ __forceinline__ void fill(const DerivativesParams& p, const Place& place) {
    marks.fill(p.sweep, place);
    if (threadIdx.x >= kTile) return;
    const SweepParams& of = p.sweep;
    const int64_t row = place.row0() + threadIdx.x, query = query_of(row, of.teacher);
    const bool there = query < of.B, student = !of.teacher || row % (2 * kGroup) < kGroup;
    const int64_t positive = there && of.positives ? of.positives[query] : 0;
    const bool counts = positive >= 0 && positive < counting_keys(of.num_keys, of.all);
    lse[threadIdx.x] = there ? (student ? p.lse_student : p.lse_teacher)[query] : 0.0f;
    loss[threadIdx.x] = there ? p.loss[query] : 0.0f;
    dout[threadIdx.x] = !there ? 0.0f : of.teacher || counts ? p.dout[query * p.dout_stride] : kNaN;
  }
};

template <Math kMath>
constexpr int kDerivativesBytes =
    kStages * kStageBytes<kMath> + static_cast<int>(sizeof(RowsShared));
static_assert(kDerivativesBytes<Math::kBFloat16> <= kEverywhereBytes);

template <Math kMath>
__global__ void __launch_bounds__(kThreads, kBlocks<kMath>)
    relational_kl_bwd_derivatives_product_kernel(const __grid_constant__ DerivativesParams p) {
  const SweepParams& of = p.sweep;
  clear_semaphores(p.semaphores, p.semaphore_count);
  auto& rows = *reinterpret_cast<RowsShared*>(shared_memory() + kStages * kStageBytes<kMath>);
  const Place place(of);
  rows.fill(p, place);
  sweep<kMath>(of, shared_memory(), place, place.tiles, [&](Accumulators& acc, int tile) {
    scale_logits(acc, of, place, tile);
    KDK_UNROLL
    for (int h = 0; h < 8; ++h) {
      if (of.teacher && h % 2 == 1) continue;
      const Entries mine(tile);
      const int row = mine.row + 8 * h, out = rows.marks.out[row];
      const float dout = rows.dout[row], lse = rows.lse[row];
      const auto counts = [&](int e) {
        return mine.key + e < place.counting && mine.key + e != out;
      };
      if (of.teacher) {
        const float lse_teacher = rows.lse[row + kGroup], loss = rows.loss[row];
        KDK_UNROLL
        for (int e = 0; e < 8; ++e) {
          float &a = entry(acc, h, e), &b = entry(acc, h | 1, e);
          const float log_q = a - lse, log_p = b - lse_teacher, p_k = softmax_exp(log_p);
          const float c = cost(log_p, log_q, of.subtract_entropy);
          a = counts(e) ? dout * (softmax_exp(log_q) - p_k) : 0.0f;
          b = counts(e) ? dout * by_teacher_logit(p_k, c, loss) : 0.0f;
        }
      } else {
        const int positive = rows.marks.positive[row];
        KDK_UNROLL
        for (int e = 0; e < 8; ++e) {
          float& a = entry(acc, h, e);
          const float p_k = mine.key + e == positive ? 1.0f : 0.0f;
          a = counts(e) ? dout * (softmax_exp(a - lse) - p_k) : 0.0f;
        }
      }
    }
    if (p.only_teacher) scale_entries<false>(acc, of.scale[1], place, tile, 1);
    store_rows<Element<kMath>>(acc, of, place, tile, p.out, p.stride, p.only_teacher);
  });
}

dim3 grid_of_sweep(const SweepParams& p) {
  return grid_of(p.operand.rows / kTile, ceil_div(ceil_div(p.K, kTile), p.tiles));
}

}  // namespace

void launch_relational_kl_prepare(const PrepareParams& params, Math math, cudaStream_t stream) {
  const dim3 grid = grid_of(ceil_div(params.operand.rows * params.operand.width, kThreads));
  for_wide_math(math, [&]<Math kMath>() {
    using Wide = Element<kMath>;  // of the operand: fp32 for rows of fp16
    const auto kernel = params.dtype == Dtype::kFloat16
                            ? relational_kl_prepare_kernel<kMath, fp16_t>
                            : relational_kl_prepare_kernel<kMath, Wide>;
    launch(kernel, grid, kThreads, 0, stream, params);
  });
}

void launch_relational_kl_weights(const WeightsParams& params, Math math, cudaStream_t stream) {
  for_wide_math(math, [&]<Math kMath>() {
    const auto with_stages = [&]<int kCount>() {
      launch(relational_kl_weights_product_kernel<kMath, kCount>, grid_of_sweep(params.sweep),
             kThreads, kWeightsBytes<kMath, kCount>, stream, params);
    };
    constexpr int kBytes = kWeightsBytes<kMath, kStages>;
    if constexpr (kBytes > kEverywhereBytes) {
      if (shared_bytes() < kBytes) return with_stages.template operator()<kFewStages>();
    }
    with_stages.template operator()<kStages>();
  });
}

void launch_relational_kl_merge(const MergeParams& params, cudaStream_t stream) {
  launch(relational_kl_merge_kernel, grid_of(ceil_div(params.B, kThreads / 32)), kThreads, 0,
         stream, params);
}

void launch_relational_kl_bwd_derivatives(const DerivativesParams& params, Math math,
                                          cudaStream_t stream) {
  for_wide_math(math, [&]<Math kMath>() {
    launch(relational_kl_bwd_derivatives_product_kernel<kMath>, grid_of_sweep(params.sweep),
           kThreads, kDerivativesBytes<kMath>, stream, params);
  });
}

}  // namespace kdk::relational_kl
