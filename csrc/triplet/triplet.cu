// SPDX-License-Identifier: Apache-2.0
// Mining is done in the epilogue of the product of rows sorted by label. A tile whose labels do not
// meet has negatives only, and in batch a tile above the diagonal serves its rows and its columns.
// Winners are merged as integers, so the order does not matter.
#include "../common/cuda/centre_device.h"
#include "../common/cuda/launch.h"
#include "../common/cuda/main_loop.h"
#include "../common/cuda/rows.h"
#include "../common/cuda/triangle.h"
#include "../common/cuda/winner_device.h"
#include "triplet_cuda.h"
#include "triplet_math.h"

namespace kdk::triplet {
namespace {

using namespace kdk::cuda;

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int kPositive = 0, kNegative = 1;

// Returns what is added to the keys of a row's distances: the key of NaN if the row is not finite,
// else 0.
__device__ __forceinline__ float forced(float norm) {
  return norm < kNormLimit<float> ? 0.0f : kNanKey<float>;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    triplet_prepare_kernel(const __grid_constant__ PrepareParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  const int64_t lane = threadIdx.x % 32;
  const Source& x = p.rows.given;
  if (i >= x.rows) return;
  const bool paired = p.paired.data != nullptr;
  const int64_t row = p.rows.row[i];
  const T* from = row_of<T>(x, 0, i);
  const T* other = static_cast<const T*>(p.paired.data) + (paired ? row * p.paired.stride : 0);
  auto* to = static_cast<float*>(const_cast<void*>(p.rows.x.data)) + i * p.rows.x.stride;
  const auto norm = static_cast<float>(move_row(from, p.point, x.cols, to));
  double other_squared = 0, between = 0;
  for (int64_t d = lane; paired && d < x.cols; d += 32) {
    const double a = to_float(from[d]), b = to_float(other[d]);
    other_squared += b * b;
    between += (a - b) * (a - b);
  }
  const auto other_norm = static_cast<float>(warp_sum(other_squared));
  const auto d2 = static_cast<float>(warp_sum(between));
  if (lane != 0) return;
  p.rows.norm[i] = norm;
  if (p.winners[0] == nullptr) return;
  const bool finite = norm < kNormLimit<float> && other_norm < kNormLimit<float>;
  // a pair at a distance of NaN is a pair all the same
  p.winners[kPositive][i] = paired ? pack(finite ? -d2 : kNanKey<float>, row) : kNoWinner;
  p.winners[kNegative][i] = kNoWinner;
}

// The search of one row or column of a tile.
struct Search {
  Best<float> best;
  float sign, floor;

  __device__ __forceinline__ void see(float d2, float force, int64_t row) {
    float key = force + sign * d2;
    // what is NaN is beyond everything
    if (!(key > floor) && key != kNanKey<float>) return;
    if (better(key, row, best)) best = {key, row};
  }
  __device__ __forceinline__ Winner winner() const {
    return best.row < 0 ? kNoWinner : pack(best.key, best.row);
  }
};

// Returns the search of a sorted anchor. A floor of +infinity admits nothing but NaN, so `active`
// is false there.
__device__ __forceinline__ Search search_of(const MineParams& p, int side, int64_t anchor,
                                            bool& active) {
  Search search{{0, -1}, static_cast<float>(p.sign[side]), -kInfinity};
  active = p.sign[side] != 0 && anchor < p.anchors.x.rows;
  if (active && p.bound >= 0) {
    const float bound = key_of(p.winners[p.bound][anchor]);
    active = bound != kInfinity;
    // beside NaN everything is beyond
    search.floor = bound == kNanKey<float> ? bound : p.sign[side] * p.bound_sign * bound;
  }
  return search;
}

// A row that searches, or that is looked at.
struct Candidate {
  int64_t label, row;  // row is -1 if there is none
  float norm;
  int64_t left_out;  // of an anchor: the row that it is not compared with, or -1
};

__device__ __forceinline__ Candidate candidate(const SortedRows& rows, int64_t i) {
  if (i >= rows.x.rows) return {0, -1, 0, -1};
  return {rows.label[i], rows.row[i], rows.norm[i], -1};
}

__device__ __forceinline__ Candidate anchor_at(const MineParams& p, const SortedRows& rows,
                                               int64_t i) {
  Candidate anchor = candidate(rows, i);
  if (p.in_batch) anchor.left_out = anchor.row;
  if (p.exclude != nullptr) anchor.left_out = p.exclude[anchor.row];
  return anchor;
}

// Turns a warp's products of sorted anchor i with the references from j0 on, four to each lane,
// into squared distances. Those of close rows come from differences, which the lanes share:
// products would rank them by their rounding.
template <typename T>
__device__ __forceinline__ Float4 distances(const MineParams& p, const Candidate& anchor,
                                            const Candidate (&across)[4], Float4 products,
                                            int64_t i, int64_t j0) {
  const int lane = threadIdx.x % 32;
  const T* x = row_of<T>(p.anchors.given, 0, i);
  KDK_UNROLL
  for (int e = 0; e < 4; ++e) {
    const float size = anchor.norm + across[e].norm;
    float d2 = size - 2.0f * products.x[e];
    const bool pair = across[e].row >= 0 && across[e].row != anchor.left_out;
    unsigned close = __ballot_sync(kWarp, pair && d2 < size * p.close_share);
    for (; close != 0; close &= close - 1) {
      const int of = lowest_bit(close);
      const T* r = row_of<T>(p.references.given, 0, j0 + 4 * of + e);
      float sum = 0;
      for (int64_t d = lane; d < p.anchors.x.cols; d += 32) {
        const float difference = to_float(x[d]) - to_float(r[d]);
        sum += difference * difference;
      }
      sum = warp_sum(sum);
      if (lane != of) continue;
      d2 = sum;
      count_differences(1);
    }
    // no NaN: what is forced says it
    products.x[e] = d2 > 0 ? (d2 < kLargest ? d2 : kLargest) : 0;
  }
  return products;
}

// Looks at one squared distance from `anchor`.
__device__ __forceinline__ void look(Search& search, int side, const Candidate& anchor,
                                     const Candidate& other, float d2) {
  const bool same = anchor.label == other.label;
  if (other.row < 0 || same != (side == kPositive) || other.row == anchor.left_out) return;
  search.see(d2, forced(anchor.norm) + forced(other.norm), other.row);
}

// An integer's least is the same in any order. A stale value read first is never too small.
__device__ __forceinline__ void improve(Winner* winner, Winner found) {
  if (found < *winner) atomicMin(winner, found);
}

template <Math kMath>
__global__ void __launch_bounds__(kThreads, kBlocks<kMath>)
    triplet_mine_product_kernel(const __grid_constant__ MineParams p) {
  const SortedRows &x = p.anchors, &r = p.references;
  const int64_t B = x.x.rows, M = r.x.rows, down = ceil_div(B, kTile);
  const TriangleTile tile = p.in_batch ? triangle_tile(blockIdx.x, down)
                                       : TriangleTile{blockIdx.x % down, blockIdx.x / down};
  const int64_t i0 = tile.i * kTile, j0 = tile.j * kTile;
  const int64_t i_last = (i0 + kTile < B ? i0 + kTile : B) - 1;
  const int64_t j_last = (j0 + kTile < M ? j0 + kTile : M) - 1;
  const bool labels_meet = x.label[i0] <= r.label[j_last] && r.label[j0] <= x.label[i_last];
  if (!labels_meet && p.sign[kNegative] == 0) return;
  Accumulators acc;
  fill(acc, 0);
  multiply<kMath, Along::kContraction, Along::kContraction>(acc, shared_memory(), x.x, r.x, 0, i0,
                                                            j0, 0, x.x.cols);
  auto* shared = reinterpret_cast<float*>(shared_memory());
  stage(acc, shared);
  const int first_side = labels_meet ? kPositive : kNegative;
  // a warp has a row, four neighbouring columns a lane
  const int lane = threadIdx.x % 32;
  Candidate across[4];
  KDK_UNROLL
  for (int e = 0; e < 4; ++e) across[e] = candidate(r, j0 + 4 * lane + e);
  for (int row = threadIdx.x / 32; row < kTile && i0 + row < B; row += kRowsPerBlock) {
    const Candidate anchor = anchor_at(p, x, i0 + row);
    auto* four = reinterpret_cast<Float4*>(staged(shared, row, 4 * lane));
    const Float4 d2 = distances<Element<kMath>>(p, anchor, across, *four, i0 + row, j0);
    *four = d2;
    for (int side = first_side; side < 2; ++side) {
      bool active;
      Search search = search_of(p, side, i0 + row, active);
      if (!active) continue;
      KDK_UNROLL
      for (int e = 0; e < 4; ++e) look(search, side, anchor, across[e], d2.x[e]);
      const Winner found = lane_min<1, 16>(search.winner());
      if (lane == 0 && found != kNoWinner) improve(p.winners[side] + i0 + row, found);
    }
  }
  if (!p.in_batch || i0 == j0) return;
  __syncthreads();
  // above the diagonal every row is within the batch; two threads have a column, every other row
  const int column = threadIdx.x % kTile;
  if (j0 + column >= M) return;
  const Candidate anchor = anchor_at(p, r, j0 + column);
  for (int side = first_side; side < 2; ++side) {
    bool active;
    Search search = search_of(p, side, j0 + column, active);
    if (!active) continue;
    for (int row = threadIdx.x / kTile; row < kTile; row += kThreads / kTile)
      look(search, side, anchor, candidate(x, i0 + row), *staged(shared, row, column));
    const Winner found = search.winner();
    if (found != kNoWinner) improve(p.winners[side] + j0 + column, found);
  }
}

// Stores, for each anchor that has both winners, their rows, and their distances from differences.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    triplet_distances_kernel(const __grid_constant__ DistancesParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  const int64_t lane = threadIdx.x % 32, D = p.references.cols;
  if (i >= p.anchors.x.rows) return;
  const Winner winner[2] = {p.winners[kPositive][i], p.winners[kNegative][i]};
  const bool valid = winner[0] != kNoWinner && winner[1] != kNoWinner;
  const T* x = row_of<T>(p.anchors.given, 0, i);
  const int64_t row = p.anchors.row[i];
  KDK_UNROLL
  for (int side = 0; side < 2; ++side) {
    const T* other = static_cast<const T*>(p.references.data) +
                     (valid ? row_of(winner[side]) * p.references.stride : 0);
    double sum = 0;
    for (int64_t d = lane; valid && d < D; d += 32) {
      const double difference = static_cast<double>(to_float(x[d])) - to_float(other[d]);
      sum += difference * difference;
    }
    sum = warp_sum(sum);
    if (lane != 0) continue;
    if (valid && key_of(winner[side]) == kNanKey<float>) sum = kNaN;
    (side == kPositive ? p.positive : p.negative)[row] = valid ? row_of(winner[side]) : -1;
    (side == kPositive ? p.d_ap : p.d_an)[row] =
        static_cast<float>(pairs::from_squared(sum, p.distance));
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    triplet_gradient_kernel(const __grid_constant__ GradientParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
  const int64_t B = p.x.rows, D = p.x.cols;
  if (i >= p.N) return;
  const auto row = [&](const Source& from, int64_t at) {
    return static_cast<const T*>(from.data) + at * from.stride;
  };
  const auto gradient_weight = [&](int64_t entry) {
    return p.dd[entry] * pairs::slope<float>(p.d[entry], p.distance);
  };
  for (int64_t d = threadIdx.x % 32; d < D; d += 32) {
    float total = 0;
    for (int64_t entry = i; p.as_anchor && entry < 2 * B; entry += B) {
      if (p.chosen[entry] >= 0)
        total += gradient_weight(entry) *
                 (to_float(row(p.x, i)[d]) - to_float(row(p.r, p.chosen[entry])[d]));
    }
    for (int64_t k = p.as_chosen ? p.begin[i] : 0; p.as_chosen && k < p.begin[i + 1]; ++k) {
      const int64_t entry = p.order[k];
      total += gradient_weight(entry) *
               (to_float(row(p.r, i)[d]) - to_float(row(p.x, entry < B ? entry : entry - B)[d]));
    }
    static_cast<T*>(p.out)[i * D + d] = from_float<T>(total);
  }
}

}  // namespace

void launch_triplet_prepare(const PrepareParams& params, Math math, cudaStream_t stream) {
  const dim3 grid = grid_of(ceil_div(params.rows.x.rows, kRowsPerBlock));
  for_math(math, [&]<Math kMath>() {
    launch(triplet_prepare_kernel<Element<kMath>>, grid, kThreads, 0, stream, params);
  });
}

void launch_triplet_mine(const MineParams& params, Math math, cudaStream_t stream) {
  const int64_t down = ceil_div(params.anchors.x.rows, kTile);
  const dim3 grid = grid_of(params.in_batch ? triangle_tiles(down)
                                            : down * ceil_div(params.references.x.rows, kTile));
  for_math(math, [&]<Math kMath>() {
    launch(triplet_mine_product_kernel<kMath>, grid, kThreads, kSharedBytes, stream, params);
  });
}

void launch_triplet_distances(const DistancesParams& params, Math math, cudaStream_t stream) {
  const dim3 grid = grid_of(ceil_div(params.anchors.x.rows, kRowsPerBlock));
  for_math(math, [&]<Math kMath>() {
    launch(triplet_distances_kernel<Element<kMath>>, grid, kThreads, 0, stream, params);
  });
}

void launch_triplet_gradient(const GradientParams& params, Math math, cudaStream_t stream) {
  const dim3 grid = grid_of(ceil_div(params.N, kRowsPerBlock));
  for_math(math, [&]<Math kMath>() {
    launch(triplet_gradient_kernel<Element<kMath>>, grid, kThreads, 0, stream, params);
  });
}

}  // namespace kdk::triplet
