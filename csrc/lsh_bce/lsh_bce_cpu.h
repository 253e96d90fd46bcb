// SPDX-License-Identifier: Apache-2.0
// lsh_bce sweeps over tiles of projections, in fp32 or fp64. The residuals are described in
// kdkernels/ops/lsh_bce.py.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/matrix.h"
#include "../common/stable.h"

namespace kdk::lsh_bce {

template <typename T>
struct Projection {
  Matrix<const T> features;  // [B, D]
  Matrix<const T> weight;    // [N, D]
  const T* bias;             // [N]
};

template <typename T>
struct Problem {
  Projection<T> projection;
  Matrix<const uint8_t> codes;       // [B, ceil(N / 8)]
  const std::vector<int64_t>* rows;  // those that count, ascending; null for all
  int64_t count() const { return rows ? rows->size() : projection.features.rows; }
  int64_t row(int64_t i) const { return rows ? (*rows)[i] : i; }
};

template <typename T>
void encode(const Projection<T>& projection, Matrix<uint8_t> codes);

// Computes the loss [B] and, unless null, the gradient [B, D] of each row. Only rows that count are
// written.
template <typename T>
void forward(const Problem<T>& problem, T* loss, const Matrix<T>* gradient);

// Computes dweight [N, D] and dbias [N], each unless null, for the losses times dout [B].
template <typename T>
void backward(const Problem<T>& problem, const T* dout, int64_t dout_stride,
              const Matrix<T>* dweight, T* dbias);

}  // namespace kdk::lsh_bce
