// SPDX-License-Identifier: Apache-2.0
// The inner loops of rkd_angle on the CPU run over all triples of a vertex and a pair of a tile.
#pragma once

#include <cstdint>

#include "../common/simd.h"

namespace kdk::rkd {

inline constexpr int64_t kAngleBlock = 64;  // most rows or columns of a tile
inline constexpr int64_t kMostLanes = 16;   // of a vector; columns of a tile are a multiple of it

// The distances of one side, [B, stride]: their squares, and their inverses, which are 0 where the
// distance is 0 and in the columns beyond B.
template <typename T>
struct Sides {
  const T *square, *inverse;
};

// The pairs (j, k) of a tile as seen from some vertices i. On the diagonal of tiles, where each
// pair comes twice, both count half.
template <typename T>
struct AngleTile {
  Sides<T> student, teacher;
  int64_t stride;
  const int64_t* vertices;
  int64_t n_vertices;
  int64_t j0, rows, k0, cols;
  // [B, stride], or null: the derivative of the sum by the student's squared distances is added
  double* derivative;
};

// Returns the sum of huber(psi_student - psi_teacher) over the triples of a tile.
KDK_SIMD_DECLARE(template <typename T> double angles(const AngleTile<T>& tile);)

template <typename T>
double angles(const AngleTile<T>& tile) {
  return KDK_SIMD_CALL(angles<T>)(tile);
}

}  // namespace kdk::rkd
