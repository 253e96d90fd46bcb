// SPDX-License-Identifier: Apache-2.0
// This file is compiled once per instruction set (see ../common/simd.h).
//
// With q the squared distances, r = 1 / distance and a_j = r_ij / 2, the cosine at vertex i is
//   psi_jk = (q_ij + q_ik - q_jk) a_j r_ik = (q_ij - q_jk) (a_j r_ik) + a_j / r_ik
// With g the derivative of its huber, m = g a_j r_ik and p = g psi, the derivatives of the sum are
//   by q_jk: -m
//   by q_ij: sum over k of m - p r_ij^2 / 2
//   by q_ik: sum over j of m - p r_ik^2 / 2
//
// fp-contract: fast, since both sides of a difference of products are sums.
#include "rkd_angle_simd.h"

#include "../common/lanes.h"
#include "rkd_math.h"

namespace kdk::rkd::KDK_SIMD_LEVEL {
namespace {

using kdk::KDK_SIMD_LEVEL::Lanes;

constexpr int64_t kFlush = 64;  // vertices whose sums are added up in T before they go to fp64

// A Vector as a template argument would lose that it need not be aligned.
template <typename T>
typename Lanes<T>::Vector load(const T* from) {
  return *reinterpret_cast<const typename Lanes<T>::Vector*>(from);
}

// One side of a vertex i: r_ik and q_ik r_ik for all k of the tile.
template <typename T>
struct Vertex {
  using V = typename Lanes<T>::Vector;
  static constexpr int64_t kCount = Lanes<T>::kCount;
  V inverse[kAngleBlock / kCount], distance[kAngleBlock / kCount];

  Vertex(const Sides<T>& side, int64_t at, int64_t cols) {
    for (int64_t v = 0; v < cols / kCount; ++v) {
      inverse[v] = load<T>(side.inverse + at + v * kCount);
      distance[v] = load<T>(side.square + at + v * kCount) * inverse[v];
    }
  }
};

// to_m = from_2m + from_2m+1
template <typename T>
void add_neighbours(const T* __restrict from, T* __restrict to, int64_t n) {
#pragma omp simd
  for (int64_t m = 0; m < n; ++m) to[m] = from[2 * m] + from[2 * m + 1];
}

// Returns the sum of each of n vectors. Both arrays are overwritten.
template <typename T>
const T* sum_lanes(typename Lanes<T>::Vector* vectors, typename Lanes<T>::Vector* spare,
                   int64_t n) {
  T *from = reinterpret_cast<T*>(vectors), *to = reinterpret_cast<T*>(spare);
  for (int64_t lanes = Lanes<T>::kCount / 2; lanes > 0; lanes /= 2) {
    add_neighbours(from, to, n * lanes);
    T* const last = from;
    from = to;
    to = last;
  }
  return from;
}

template <typename T, bool kDiagonal, bool kGradient>
double run(const AngleTile<T>& tile) {
  using V = typename Lanes<T>::Vector;
  constexpr int64_t kCount = Lanes<T>::kCount;
  const auto& [s, t, stride, vertices, n_vertices, j0, rows, k0, cols, derivative] = tile;
  const int64_t n = cols / kCount;
  // row j of the diagonal tile is weighted by half + kAngleBlock - j
  T half[2 * kAngleBlock];
  for (int64_t k = 0; kDiagonal && k < 2 * kAngleBlock; ++k) half[k] = k == kAngleBlock ? 0 : 0.5;
  // Squared distances within the tile, which lie far apart in memory; and sums of m over vertices.
  V between_s[kAngleBlock * kAngleBlock / kCount], between_t[kAngleBlock * kAngleBlock / kCount];
  V across[kAngleBlock * kAngleBlock / kCount];
  for (int64_t j = 0; j < rows; ++j) {
    for (int64_t v = 0; v < n; ++v) {
      const int64_t jk = (j0 + j) * stride + k0 + v * kCount;
      between_s[j * n + v] = load<T>(s.square + jk);
      between_t[j * n + v] = load<T>(t.square + jk);
    }
  }
  V by_row[kAngleBlock], spare[kAngleBlock / 2];
  double total = 0;
  for (int64_t first = 0; first < n_vertices; first += kFlush) {
    const int64_t last = first + kFlush < n_vertices ? first + kFlush : n_vertices;
    for (int64_t v = 0; kGradient && v < rows * n; ++v) across[v] = V{};
    for (int64_t at = first; at < last; ++at) {
      const int64_t i = vertices[at];
      const Vertex<T> of_s(s, i * stride + k0, cols), of_t(t, i * stride + k0, cols);
      V m_of_k[kAngleBlock / kCount] = {}, p_of_k[kAngleBlock / kCount] = {};
      V losses = {};
      for (int64_t j = 0; j < rows; ++j) {
        const int64_t ij = i * stride + j0 + j;
        const T q_s = s.square[ij], q_t = t.square[ij];
        const T a_s = s.inverse[ij] / 2, a_t = t.inverse[ij] / 2;
        V m_of_j = {}, p_of_j = {};
        for (int64_t v = 0; v < n; ++v) {
          const V b_s = a_s * of_s.inverse[v], b_t = a_t * of_t.inverse[v];
          const V psi_s = (q_s - between_s[j * n + v]) * b_s + a_s * of_s.distance[v];
          const V psi_t = (q_t - between_t[j * n + v]) * b_t + a_t * of_t.distance[v];
          const V e = psi_s - psi_t;
          V g = huber_slope(e);
          const V rest = e - g / 2;
          if constexpr (kDiagonal) g *= load<T>(half + kAngleBlock - j + v * kCount);
          losses += g * rest;
          if constexpr (kGradient) {
            const V m = g * b_s;
            across[j * n + v] += m;
            m_of_j += m;
            m_of_k[v] += m;
            p_of_j += g * psi_s;
            p_of_k[v] += g * psi_s;
          }
        }
        if constexpr (kGradient) {
          by_row[j] = m_of_j - p_of_j * (2 * a_s * a_s);
        }
      }
      for (int64_t lane = 0; lane < kCount; ++lane) total += static_cast<double>(losses[lane]);
      if constexpr (kGradient) {
        double* row = derivative + i * stride;
        const T* sums = sum_lanes<T>(by_row, spare, rows);
        for (int64_t j = 0; j < rows; ++j) row[j0 + j] += static_cast<double>(sums[j]);
        for (int64_t v = 0; v < n; ++v) {
          const V by_q = m_of_k[v] - p_of_k[v] * (of_s.inverse[v] * of_s.inverse[v] / 2);
          for (int64_t lane = 0; lane < kCount; ++lane)
            row[k0 + v * kCount + lane] += static_cast<double>(by_q[lane]);
        }
      }
    }
    for (int64_t j = 0; kGradient && j < rows; ++j) {
      double* row = derivative + (j0 + j) * stride + k0;
      const T* from = reinterpret_cast<const T*>(across + j * n);
      for (int64_t k = 0; k < cols; ++k) row[k] -= static_cast<double>(from[k]);
    }
  }
  return total;
}

}  // namespace

template <typename T>
double angles(const AngleTile<T>& tile) {
  const bool diagonal = tile.j0 == tile.k0;
  if (tile.derivative == nullptr)
    return diagonal ? run<T, true, false>(tile) : run<T, false, false>(tile);
  return diagonal ? run<T, true, true>(tile) : run<T, false, true>(tile);
}

template double angles<float>(const AngleTile<float>&);
template double angles<double>(const AngleTile<double>&);

}  // namespace kdk::rkd::KDK_SIMD_LEVEL
