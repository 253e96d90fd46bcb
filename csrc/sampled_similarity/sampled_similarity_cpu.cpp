// SPDX-License-Identifier: Apache-2.0
// CPU operators kdkernels_C::sampled_similarity_{fwd,bwd}. Arguments were checked by the public
// function, so every index names a row.
//
// Rows are gathered one by one, or, where a row of x names a large part of the bank, all products
// are made by BLAS and the named ones taken: a product costs a fraction of a gathered row.
#include <algorithm>

#include "../common/cut.h"
#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/rows_simd.h"
#include "../common/stable.h"
#include "sampled_similarity_simd.h"

namespace kdk::sampled_similarity {
namespace {

constexpr int64_t kPiece = 1024;          // rows of the bank that a task gathers
constexpr int64_t kDenseRows = 16;        // from this many on, a product of all rows runs at speed
constexpr int64_t kDenseBytes = 1 << 24;  // of products that are made at a time

template <typename T>
struct Problem {
  Matrix<const T> bank;           // [N, D], contiguous
  Matrix<const int64_t> indices;  // [B, K], contiguous
  int64_t B() const { return indices.rows; }
  int64_t K() const { return indices.cols; }
  int64_t N() const { return bank.rows; }
  int64_t D() const { return bank.cols; }

  // As measured, a gathered row costs as much as about this many products of a large batch.
  static constexpr int64_t kProductsPerRow = 6;
  bool dense() const { return B() >= kDenseRows && N() <= kProductsPerRow * K(); }

  // Rows of x whose products with the whole bank are made at a time.
  int64_t chunk() const {
    const int64_t fitting = kDenseBytes / (N() * static_cast<int64_t>(sizeof(T)));
    return std::clamp(fitting, kDenseRows, std::max(B(), kDenseRows));
  }
};

template <typename T>
void gather(const Problem<T>& problem, Matrix<const T> x, Matrix<T> scores) {
  const int64_t pieces = ceil_div(problem.K(), kPiece);
  parallel_each(problem.B() * pieces, 2.0 * kPiece * problem.D(), [&](int64_t task) {
    const int64_t i = task / pieces, k = task % pieces * kPiece;
    loops<T>().dots(x.row(i), problem.bank.data, problem.indices.row(i) + k,
                    std::min(kPiece, problem.K() - k), problem.D(), scores.row(i) + k);
  });
}

template <typename T>
void multiply_all(const Problem<T>& problem, Matrix<const T> x, Matrix<T> scores) {
  const int64_t step = problem.chunk(), N = problem.N();
  const Scratch<T> scratch(std::min(step, problem.B()) * N);
  for (int64_t i0 = 0; i0 < problem.B(); i0 += step) {
    const int64_t rows = std::min(step, problem.B() - i0);
    const auto products = Matrix<T>::contiguous(scratch.data(), rows, N);
    gemm<T>(x.row_block(i0, rows), problem.bank.t(), products);
    parallel_each(rows, problem.K(), [&](int64_t i) {
      const int64_t* index = problem.indices.row(i0 + i);
      for (int64_t k = 0; k < problem.K(); ++k) scores.row(i0 + i)[k] = products.row(i)[index[k]];
    });
  }
}

// Pieces are added in order.
template <typename T>
void gather_gradients(const Problem<T>& problem, Matrix<const T> dscores, Matrix<T> dx) {
  const int64_t pieces = ceil_div(problem.K(), kPiece), D = problem.D();
  const Scratch<T> scratch(problem.B() * pieces * D);
  parallel_each(problem.B() * pieces, 2.0 * kPiece * D, [&](int64_t task) {
    const int64_t i = task / pieces, k = task % pieces * kPiece;
    loops<T>().weighted_sum(dscores.row(i) + k, problem.bank.data, problem.indices.row(i) + k,
                            std::min(kPiece, problem.K() - k), D, scratch.data() + task * D);
  });
  parallel_each(problem.B(), pieces * D, [&](int64_t i) {
    std::fill_n(dx.row(i), D, T(0));
    for (int64_t piece = 0; piece < pieces; ++piece) {
      rows::loops<T>().add(scratch.data() + (i * pieces + piece) * D, dx.row(i), D);
    }
  });
}

template <typename T>
void multiply_gradients(const Problem<T>& problem, Matrix<const T> dscores, Matrix<T> dx) {
  const int64_t step = problem.chunk(), N = problem.N(), D = problem.D();
  const Scratch<T> scratch(std::min(step, problem.B()) * N);
  for (int64_t i0 = 0; i0 < problem.B(); i0 += step) {
    const int64_t rows = std::min(step, problem.B() - i0);
    const auto weights = Matrix<T>::contiguous(scratch.data(), rows, N);
    parallel_each(rows, N + problem.K(), [&](int64_t i) {
      T* of_row = weights.row(i);
      const int64_t* index = problem.indices.row(i0 + i);
      std::fill_n(of_row, N, T(0));
      for (int64_t k = 0; k < problem.K(); ++k) of_row[index[k]] += dscores.row(i0 + i)[k];
    });
    gemm<T>(weights, problem.bank, dx.row_block(i0, rows));
    // 0 times a row that is not finite, and that was not named, must not count
    for (int64_t i = i0; i < i0 + rows; ++i) {
      if (loops<T>().all_finite(dx.row(i), D)) continue;
      const Problem<T> one{problem.bank, problem.indices.row_block(i, 1)};
      gather_gradients<T>(one, dscores.row_block(i, 1), dx.row_block(i, 1));
    }
  }
}

template <typename T>
Tensor rows_of(const Tensor& x) {
  return torch::stable::contiguous(in_type<T>(x));
}

template <typename T>
Tensor fwd(const Tensor& x, const Tensor& bank, const Tensor& indices) {
  const Tensor features = rows_of<T>(x), rows = rows_of<T>(bank),
               places = torch::stable::contiguous(indices);
  const Problem<T> problem{matrix<const T>(rows), matrix<const int64_t>(places)};
  const Tensor scores = empty({problem.B(), problem.K()}, scalar_type_of<T>);
  const auto run = problem.dense() ? multiply_all<T> : gather<T>;
  run(problem, matrix<const T>(features), matrix<T>(scores));
  return scores;
}

template <typename T>
Tensor bwd(const Tensor& dscores, const Tensor& x, const Tensor& bank, const Tensor& indices) {
  const Tensor weights = rows_of<T>(dscores), rows = rows_of<T>(bank),
               places = torch::stable::contiguous(indices);
  const Problem<T> problem{matrix<const T>(rows), matrix<const int64_t>(places)};
  const Tensor dx = empty({problem.B(), problem.D()}, scalar_type_of<T>);
  const auto run = problem.dense() ? multiply_gradients<T> : gather_gradients<T>;
  run(problem, matrix<const T>(weights), matrix<T>(dx));
  return in_dtype(dx, x.scalar_type());
}

Tensor sampled_similarity_fwd(Tensor x, Tensor bank, Tensor indices) {
  const auto run = x.scalar_type() == ScalarType::Double ? fwd<double> : fwd<float>;
  return run(x, bank, indices);
}

Tensor sampled_similarity_bwd(Tensor dscores, Tensor x, Tensor bank, Tensor indices) {
  const auto run = x.scalar_type() == ScalarType::Double ? bwd<double> : bwd<float>;
  return run(dscores, x, bank, indices);
}

}  // namespace
}  // namespace kdk::sampled_similarity

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def("sampled_similarity_fwd(Tensor x, Tensor bank, Tensor indices) -> Tensor");
  m.def("sampled_similarity_bwd(Tensor dscores, Tensor x, Tensor bank, Tensor indices) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("sampled_similarity_fwd", TORCH_BOX(&kdk::sampled_similarity::sampled_similarity_fwd));
  m.impl("sampled_similarity_bwd", TORCH_BOX(&kdk::sampled_similarity::sampled_similarity_bwd));
}
