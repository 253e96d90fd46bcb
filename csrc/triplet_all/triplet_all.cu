// SPDX-License-Identifier: Apache-2.0
// These kernels make losses and weights from rows of distances. A block has an anchor. It ranks the
// distances to the anchor's positives, as many at a time as it has threads, and finds by bisection
// where each distance to a negative lies among them. Counts and the winners of a search are merged
// as integers, so the order does not matter.
#include "../common/cuda/launch.h"
#include "../common/cuda/semaphores.h"
#include "../common/cuda/tile.h"
#include "../common/cuda/winner_device.h"
#include "../pairs/margin_math.h"
#include "triplet_all_cuda.h"

namespace kdk::triplet_all {
namespace {

using namespace kdk::cuda;
using pairs::hinge, pairs::softplus, pairs::Term;

constexpr int kWarps = kThreads / 32;  // at most: fewer for short rows

__device__ __forceinline__ int threads() { return static_cast<int>(blockDim.x); }

struct Shared {
  union {
    double sums[kWarps];
    int64_t counts[kWarps];
    Winner winners[kWarps];
    unsigned scan[kWarps];
  };
  float given[kThreads];   // distances to positives, in the order of the references
  float sorted[kThreads];  // and descending
  union {
    unsigned below[kThreads];         // hinge: negatives below a positive
    double slopes[kWarps][kThreads];  // softplus: derivatives by the positives
    struct {
      Winner nearest[kThreads];  // semi-hard negatives of `sorted`
      double slope[kThreads];    // derivatives by those
    } chosen;
  };
};

// An anchor with its row of distances. Its positives are numbered, without one that it leaves out.
struct Anchor {
  float *d, *w;  // [stride]; w is null where no gradient is needed
  int64_t begin, end, M;
  int64_t self;  // the column of the positive that it leaves out; -1 if there is none

  __device__ __forceinline__ int64_t positives() const { return end - begin - (self >= 0); }
  __device__ __forceinline__ int64_t column(int64_t positive) const {
    const int64_t j = begin + positive;
    return j + (self >= 0 && j >= self);
  }

  // Loads four distances from column j on, with +infinity for rows that are no negatives.
  __device__ __forceinline__ Float4 load_negatives(int64_t j) const {
    Float4 four;
    if (j < M) four = *reinterpret_cast<const Float4*>(d + j);
    KDK_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (j + e >= M || (j + e >= begin && j + e < end)) four.x[e] = kInfinity;
    }
    return four;
  }

  // Loads four weights from column j on. `before` says that no positive has been weighed yet, so
  // that they are 0.
  __device__ __forceinline__ Float4 load_weights(int64_t j, bool before) const {
    return before || w == nullptr ? Float4{} : *reinterpret_cast<const Float4*>(w + j);
  }
  __device__ __forceinline__ void store_weights(int64_t j, const Float4& weights) const {
    if (w != nullptr) *reinterpret_cast<Float4*>(w + j) = weights;
  }

  // Calls f(column, distance) for this thread's share of the negatives. f returns what to take off
  // the weight.
  template <typename F>
  __device__ __forceinline__ void each_negative(bool before, const F& f) const {
    for (int64_t j = 4 * threadIdx.x; j < M; j += 4 * threads()) {
      const Float4 four = load_negatives(j);
      Float4 weights = load_weights(j, before);
      KDK_UNROLL
      for (int e = 0; e < 4; ++e) {
        if (four.x[e] != kInfinity) weights.x[e] -= f(j + e, four.x[e]);
      }
      store_weights(j, weights);
    }
  }
};

// What a thread has found of the losses of an anchor. The total is NaN if a distance is.
struct Found {
  double total = 0;
  int64_t nonzero = 0;
};

// Some positives of an anchor. This thread has positive `first + threadIdx.x`, if threadIdx.x is
// below n.
struct Piece {
  int64_t first;
  int n;
  int rank;  // of this thread's among them
  float d;   // its distance
};

__device__ Piece rank(const Anchor& anchor, int64_t first, Shared& shared) {
  const int64_t left = anchor.positives() - first;
  const int n = left < threads() ? static_cast<int>(left) : threads(), t = threadIdx.x;
  Piece piece{first, n, 0, 0};
  if (t < n) {
    piece.d = anchor.d[anchor.column(first + t)];
    shared.given[t] = piece.d == piece.d ? piece.d : -kInfinity;
  }
  __syncthreads();
  if (t < n) {
    const float mine = shared.given[t];
    for (int other = 0; other < n; ++other) {
      const float theirs = shared.given[other];
      piece.rank += theirs > mine || (theirs == mine && other < t);
    }
    shared.sorted[piece.rank] = mine;
  }
  return piece;
}

// Returns how many of n descending thresholds are above x, or not below it.
template <bool kAbove>
__device__ __forceinline__ int count_thresholds(const float* thresholds, int n, float x) {
  int at = 0;
  while (n > 0) {
    const int half = (n + 1) / 2;
    const float threshold = thresholds[at + half - 1];
    at += (kAbove ? threshold > x : threshold >= x) ? half : 0;
    n -= half;
  }
  return at;
}

// Returns the inclusive scan over the threads of the block, by an operation that may be done in any
// order.
template <typename T, typename Op>
__device__ __forceinline__ T block_scan(T x, T* shared, const Op& op) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  KDK_UNROLL
  for (int distance = 1; distance < 32; distance *= 2) {
    const T before = __shfl_sync(kWarp, x, lane < distance ? lane : lane - distance);
    if (lane >= distance) x = op(x, before);
  }
  if (lane == 31) shared[warp] = x;
  __syncthreads();
  for (int other = 0; other < warp; ++other) x = op(x, shared[other]);
  __syncthreads();
  return x;
}

// With k_n = #{p : d_p > e_n} and w_p = #{n : e_n < d_p}, e_n = d_n - margin, the losses add up to
// sum_p w_p d_p - sum_n k_n e_n. The products are exact in fp64.
__device__ void weigh_hinge(const WeighParams& p, const Anchor& anchor, const Piece& piece,
                            Shared& shared, Found& found) {
  const int t = threadIdx.x, n = piece.n;
  shared.below[t] = 0;  // first: negatives with t + 1 thresholds above them
  __syncthreads();
  anchor.each_negative(piece.first == 0, [&](int64_t, float d) {
    const float e = d - p.margin;
    const int above = count_thresholds<true>(shared.sorted, n, e);
    if (d != d) found.total = d;
    if (above > 0) {
      atomicAdd(&shared.below[above - 1], 1u);
      found.total -= above * static_cast<double>(e);
    }
    return static_cast<float>(above);
  });
  __syncthreads();
  const auto sum = [](unsigned a, unsigned b) { return a + b; };
  const unsigned count = block_scan(t < n ? shared.below[n - 1 - t] : 0u, shared.scan, sum);
  if (t < n) shared.below[n - 1 - t] = count;
  __syncthreads();
  if (t >= n) return;
  const unsigned weight = shared.below[piece.rank];
  found.total += weight * static_cast<double>(piece.d);
  found.nonzero += weight;
  if (anchor.w != nullptr) anchor.w[anchor.column(piece.first + t)] = static_cast<float>(weight);
}

// Weighs each triplet by itself.
__device__ void weigh_softplus(const WeighParams& p, const Anchor& anchor, const Piece& piece,
                               Shared& shared, Found& found) {
  constexpr int kTogether = 32;  // positives whose derivatives are added up apart, for precision
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double* slopes = shared.slopes[warp];
  for (int k = lane; k < piece.n; k += 32) slopes[k] = 0;
  __syncthreads();
  for (int64_t j0 = 128 * warp; j0 < anchor.M; j0 += 4 * threads()) {
    const int64_t j = j0 + 4 * lane;
    const Float4 d = anchor.load_negatives(j);
    Float4 weights{};
    if (j < anchor.M) weights = anchor.load_weights(j, piece.first == 0);
    for (int k0 = 0; k0 < piece.n; k0 += kTogether) {
      Float4 part{};
      for (int k = k0; k < piece.n && k < k0 + kTogether; ++k) {
        Term<float> sum{0, 0};
        KDK_UNROLL
        for (int e = 0; e < 4; ++e) {
          const Term<float> term = softplus((shared.sorted[k] - d.x[e]) + p.margin);
          sum.loss += term.loss;
          sum.slope += term.slope;
          part.x[e] += term.slope;
          found.nonzero += term.loss > 0;
        }
        found.total += sum.loss;
        sum.slope = warp_sum(sum.slope);
        if (lane == 0) slopes[k] += sum.slope;
      }
      KDK_UNROLL
      for (int e = 0; e < 4; ++e) weights.x[e] -= part.x[e];
    }
    if (j < anchor.M) anchor.store_weights(j, weights);
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= piece.n) return;
  double weight = 0;
  for (int w = 0; w < threads() / 32; ++w) weight += shared.slopes[w][piece.rank];
  if (piece.d != piece.d) found.total = piece.d;
  if (anchor.w != nullptr)
    anchor.w[anchor.column(piece.first + threadIdx.x)] = static_cast<float>(weight);
}

// Each negative is offered to the farthest positive that it is beyond, since it is beyond all
// nearer ones too: the nearest of a positive is the best offered to it or to one before.
__device__ void weigh_semihard(const WeighParams& p, const Anchor& anchor, const Piece& piece,
                               Shared& shared, Found& found) {
  const int t = threadIdx.x, n = piece.n;
  const int64_t* row = p.chunk.references.order;
  shared.chosen.nearest[t] = kNoWinner;
  __syncthreads();
  Winner farthest = kNoWinner;
  anchor.each_negative(piece.first == 0, [&](int64_t j, float d) {
    if (d != d) found.total = d;  // it is beyond every positive, and would be taken
    const Winner far = pack(-d, row[j]);
    farthest = far < farthest ? far : farthest;
    const int before = count_thresholds<false>(shared.sorted, n, d);
    if (before < n) atomicMin(&shared.chosen.nearest[before], pack(d, row[j]));
    return 0.0f;
  });
  farthest = lane_min<1, 16>(farthest);
  if (t % 32 == 0) shared.winners[t / 32] = farthest;
  __syncthreads();
  for (int warp = 0; warp < threads() / 32; ++warp)
    farthest = shared.winners[warp] < farthest ? shared.winners[warp] : farthest;
  __syncthreads();
  const auto least = [](Winner a, Winner b) { return b < a ? b : a; };
  const Winner near = block_scan(shared.chosen.nearest[t], shared.winners, least);
  shared.chosen.nearest[t] = near == kNoWinner ? farthest : near;
  __syncthreads();
  if (t < n) {
    const Winner winner = shared.chosen.nearest[piece.rank];
    const float d_an = fabsf(key_of(winner)), u = (piece.d - d_an) + p.margin;
    const Term<float> term = p.form == Form::kSoftSemihard ? softplus(u) : hinge(u);
    found.total += term.loss;
    found.nonzero += term.loss > 0;
    shared.chosen.slope[piece.rank] = term.slope;
    if (anchor.w != nullptr) anchor.w[anchor.column(piece.first + t)] = term.slope;
  }
  __syncthreads();
  if (anchor.w == nullptr || t >= n) return;
  // positives that share a negative follow one another
  const auto chosen = [&](int k) { return row_of(shared.chosen.nearest[k]); };
  if (t > 0 && chosen(t - 1) == chosen(t)) return;
  double slope = 0;
  for (int k = t; k < n && chosen(k) == chosen(t); ++k) slope += shared.chosen.slope[k];
  anchor.w[p.place[chosen(t)]] -= static_cast<float>(slope);
}

// Derivatives by distances become weights, those of flagged tiles where the distances were. Returns
// this thread's sum of the others. A total of NaN makes all of them NaN.
__device__ double settle(const WeighParams& p, const Anchor& anchor, bool weighed, double total) {
  const int64_t i = blockIdx.x;
  const int* close = p.chunk.close + i / kTile * ceil_div(anchor.M, kTile);
  double sum = 0;
  for (int64_t j = 4 * threadIdx.x; j < anchor.M; j += 4 * threads()) {
    Float4 w = anchor.load_weights(j, !weighed), d = *reinterpret_cast<const Float4*>(anchor.d + j);
    const bool flagged = close[j / kTile];
    KDK_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (w.x[e] != 0) w.x[e] *= pairs::slope<float>(d.x[e], p.chunk.distance);
      if (total != total && j + e < anchor.M) w.x[e] = static_cast<float>(total);
      if (flagged) {
        d.x[e] = w.x[e];
        w.x[e] = 0;
      }
      sum += w.x[e];
    }
    anchor.store_weights(j, w);
    if (flagged) *reinterpret_cast<Float4*>(anchor.d + j) = d;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads, 4)
    triplet_all_weigh_kernel(const __grid_constant__ WeighParams p) {
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  const DistancesParams& chunk = p.chunk;
  const int64_t i = blockIdx.x, t = threadIdx.x, row = chunk.first + i;
  KDK_UNROLL
  for (int side = 0; side < 2; ++side)
    clear_semaphores(p.semaphores[side], p.semaphore_count[side]);
  const int64_t begin = p.begin[row], end = p.end[row], M = chunk.references.x.rows;
  // The reference that is left out is one of the positives, or a negative, the distance to which
  // becomes +infinity: comparing columns wherever distances are loaded would take registers that
  // there are none of. The barrier before the first use is that of the loop.
  const int64_t left_out = chunk.in_batch ? row : p.exclude != nullptr ? p.exclude[row] : -1;
  const bool positive = left_out >= begin && left_out < end, negative = left_out >= 0 && !positive;
  float* const d = chunk.d + i * chunk.stride;
  if (negative && t == 0) d[left_out] = kInfinity;
  const Anchor anchor{d,     p.weights == nullptr ? nullptr : p.weights + i * chunk.stride,
                      begin, end,
                      M,     positive ? left_out : -1};
  const int64_t P = anchor.positives(), N = M - (end - begin) - negative;
  const bool any = P > 0 && N > 0;
  Found found;
  for (int64_t first = 0; any && first < P; first += threads()) {
    __syncthreads();  // all is done with the positives before
    const Piece piece = rank(anchor, first, shared);
    if (p.form == Form::kHinge) {
      weigh_hinge(p, anchor, piece, shared, found);
    } else if (p.form == Form::kSoftplus) {
      weigh_softplus(p, anchor, piece, shared, found);
    } else {
      weigh_semihard(p, anchor, piece, shared, found);
    }
  }
  __syncthreads();
  const double total = block_sum(found.total, shared.sums);
  const int64_t nonzero = block_sum(found.nonzero, shared.counts);
  if (anchor.w != nullptr) {
    const double sum = block_sum(settle(p, anchor, any, total), shared.sums);
    if (t == 0 && chunk.anchors.sums != nullptr) chunk.anchors.sums[i] += sum;
  }
  if (t != 0) return;
  const bool semihard = p.form == Form::kSemihard || p.form == Form::kSoftSemihard;
  p.losses[row] = total;
  p.nonzero[row] = nonzero;
  p.triplets[row] = any ? (semihard ? P : P * N) : 0;
}

__global__ void __launch_bounds__(kThreads)
    triplet_all_totals_kernel(const __grid_constant__ TotalsParams p) {
  auto* shared = shared_memory();
  double total = 0;
  int64_t nonzero = 0, triplets = 0;
  for (int64_t i = threadIdx.x; i < p.B; i += kThreads) {
    total += p.losses[i];
    nonzero += p.nonzero[i];
    triplets += p.triplets[i];
  }
  total = block_sum(total, reinterpret_cast<double*>(shared));
  nonzero = block_sum(nonzero, reinterpret_cast<int64_t*>(shared));
  triplets = block_sum(triplets, reinterpret_cast<int64_t*>(shared));
  if (threadIdx.x != 0) return;
  *p.total = static_cast<float>(total);
  *p.nonzero_total = nonzero;
  *p.triplets_total = triplets;
}

}  // namespace

void launch_triplet_all_weigh(const WeighParams& params, cudaStream_t stream) {
  // so many that each has 16 bytes of a row
  const int64_t warps = ceil_div(params.chunk.references.x.rows, 4 * 32);
  launch(triplet_all_weigh_kernel, grid_of(params.chunk.anchors.x.rows),
         32 * static_cast<int>(warps < kWarps ? warps : kWarps), sizeof(Shared), stream, params);
}

void launch_triplet_all_totals(const TotalsParams& params, cudaStream_t stream) {
  launch(triplet_all_totals_kernel, grid_of(1), kThreads, kWarps * sizeof(double), stream, params);
}

}  // namespace kdk::triplet_all
