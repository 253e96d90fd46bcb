// SPDX-License-Identifier: Apache-2.0
// Distances are computed as |x|^2 + |y|^2 - 2 <x, y>. This header has the squared norms of rows,
// and the point that is subtracted from all rows so that the distances keep their digits.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../common/matrix.h"

namespace kdk::pairs {

// Returns the squared norm of a row with unit stride. It is NaN where the row is not finite
// (kNormLimit), which makes the row's distances NaN.
template <typename T>
T norm_or_nan(const T* x, int64_t n);

// Returns a point that the rows of x lie around. The result is empty where the point is 0 or cannot
// be subtracted safely from the rows of these norms. x: [n, D], columns contiguous.
//
// |x|^2 + |y|^2 - 2 <x, y> rounds relative to the squared norms, so rows that lie close together
// far from 0, as in a batch that has collapsed, would lose their distances; and distances do not
// change when a point is subtracted from all rows. With s the root mean square deviation of an
// element from its mean, the point is the mean in multiples of the power of two q in (2 s, 4 s].
// What is left of the mean is at most q / 2 <= 2 s per element, so squared norms are on average
// within 5 times the squared deviations. Rows around 0 (means below s) are not moved, and in rows
// of few bits, such as whole numbers, equal distances stay equal, since the products of multiples
// of q are exact. Where equal distances need not stay equal, q may be finer by a power of two, and
// less of the mean is left.
template <typename T>
std::vector<T> centre_of(Matrix<const T> x, const std::vector<T>& norm,
                         const std::vector<T>& other_norm, int finer_bits = 0);

}  // namespace kdk::pairs
