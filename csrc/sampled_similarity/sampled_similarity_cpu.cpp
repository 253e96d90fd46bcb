// SPDX-License-Identifier: Apache-2.0
// CPU operators kdkernels_C::sampled_similarity_{fwd,bwd}. Arguments were checked by the public
// function, so every index names a row.
//
// Rows are gathered one by one, or, where a row of x names a large part of the bank, all products
// are made by BLAS and the named ones taken: a product costs a fraction of a gathered row. A bank
// of another type than the sums' is widened number by number as its rows are read, and as a whole
// only for BLAS.
#include <algorithm>
#include <type_traits>

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

// E is the type of the bank's numbers. A bank is never converted where rows are gathered.
template <typename T, typename E>
struct Problem {
  Matrix<const E> bank;           // [N, D], columns contiguous
  Matrix<const int64_t> indices;  // [B, K], contiguous
  int64_t B() const { return indices.rows; }
  int64_t K() const { return indices.cols; }
  int64_t N() const { return bank.rows; }
  int64_t D() const { return bank.cols; }

  // As measured, a gathered row costs as much as about this many products of a large batch, and so
  // does a row that is converted for them.
  static constexpr int64_t kProductsPerRow = std::is_same_v<E, Half> ? 9 : 6;
  static constexpr int64_t kConversion = std::is_same_v<T, E> ? 0 : 6;
  bool dense() const {
    // N (B + conversion) <= kProductsPerRow B K
    return B() >= kDenseRows && N() + ceil_div(N() * kConversion, B()) <= kProductsPerRow * K();
  }

  // Rows of x whose products with the whole bank are made at a time.
  int64_t chunk() const {
    const int64_t fitting = kDenseBytes / (N() * static_cast<int64_t>(sizeof(T)));
    return std::clamp(fitting, kDenseRows, std::max(B(), kDenseRows));
  }

  Problem one(int64_t i) const { return {bank, indices.row_block(i, 1)}; }
};

template <typename T, typename E>
void gather(const Problem<T, E>& problem, Matrix<const T> x, Matrix<T> scores) {
  const int64_t pieces = ceil_div(problem.K(), kPiece);
  parallel_each(problem.B() * pieces, 2.0 * kPiece * problem.D(), [&](int64_t task) {
    const int64_t i = task / pieces, k = task % pieces * kPiece;
    loops<T, E>().dots(x.row(i), problem.bank.data, problem.bank.row_stride,
                       problem.indices.row(i) + k, std::min(kPiece, problem.K() - k), problem.D(),
                       scores.row(i) + k);
  });
}

template <typename T, typename E>
void multiply_all(const Problem<T, E>& problem, Matrix<const T> bank, Matrix<const T> x,
                  Matrix<T> scores) {
  const int64_t step = problem.chunk(), N = problem.N();
  const Scratch<T> scratch(std::min(step, problem.B()) * N);
  for (int64_t i0 = 0; i0 < problem.B(); i0 += step) {
    const int64_t rows = std::min(step, problem.B() - i0);
    const auto products = Matrix<T>::contiguous(scratch.data(), rows, N);
    gemm<T>(x.row_block(i0, rows), bank.t(), products);
    parallel_each(rows, problem.K(), [&](int64_t i) {
      const int64_t* index = problem.indices.row(i0 + i);
      for (int64_t k = 0; k < problem.K(); ++k) scores.row(i0 + i)[k] = products.row(i)[index[k]];
    });
  }
}

// Pieces are added in order.
template <typename T, typename E>
void gather_gradients(const Problem<T, E>& problem, Matrix<const T> dscores, Matrix<T> dx) {
  const int64_t pieces = ceil_div(problem.K(), kPiece), D = problem.D();
  const Scratch<T> scratch(problem.B() * pieces * D);
  parallel_each(problem.B() * pieces, 2.0 * kPiece * D, [&](int64_t task) {
    const int64_t i = task / pieces, k = task % pieces * kPiece;
    loops<T, E>().weighted_sum(dscores.row(i) + k, problem.bank.data, problem.bank.row_stride,
                               problem.indices.row(i) + k, std::min(kPiece, problem.K() - k), D,
                               scratch.data() + task * D);
  });
  parallel_each(problem.B(), pieces * D, [&](int64_t i) {
    std::fill_n(dx.row(i), D, T(0));
    for (int64_t piece = 0; piece < pieces; ++piece) {
      rows::loops<T>().add(scratch.data() + (i * pieces + piece) * D, dx.row(i), D);
    }
  });
}

template <typename T, typename E>
void multiply_gradients(const Problem<T, E>& problem, Matrix<const T> bank, Matrix<const T> dscores,
                        Matrix<T> dx) {
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
    gemm<T>(weights, bank, dx.row_block(i0, rows));
    // 0 times a row that is not finite, and that was not named, must not count
    for (int64_t i = i0; i < i0 + rows; ++i) {
      if (loops<T, E>().all_finite(dx.row(i), D)) continue;
      gather_gradients<T>(problem.one(i), dscores.row_block(i, 1), dx.row_block(i, 1));
    }
  }
}

// f(problem) with the bank as it lies, less strides of its columns.
template <typename T, typename F>
void with_problem(const Tensor& bank, const Tensor& indices, const F& f) {
  const Tensor places = torch::stable::contiguous(indices);
  const auto run = [&]<typename E>(E) {
    const Tensor rows = bank.stride(1) == 1 ? bank : torch::stable::contiguous(bank);
    f(Problem<T, E>{matrix<const E>(rows), matrix<const int64_t>(places)}, rows);
  };
  const ScalarType type = bank.scalar_type();
  if (type == ScalarType::Half) return run(Half{});
  if (type == ScalarType::BFloat16) return run(BFloat16{});
  if (type == ScalarType::Float) return run(float{});
  if constexpr (std::is_same_v<T, double>) return run(double{});
}

template <typename T>
Tensor fwd(const Tensor& x, const Tensor& bank, const Tensor& indices) {
  const Tensor features = contiguous_in_type<T>(x);
  const Tensor scores = empty({indices.size(0), indices.size(1)}, scalar_type_of<T>);
  const auto of_x = matrix<const T>(features);
  const auto to = matrix<T>(scores);
  with_problem<T>(bank, indices, [&](const auto& problem, const Tensor& rows) {
    if (!problem.dense()) return gather(problem, of_x, to);
    const Tensor wide = contiguous_in_type<T>(rows);
    multiply_all(problem, matrix<const T>(wide), of_x, to);
  });
  return scores;
}

template <typename T>
Tensor bwd(const Tensor& dscores, const Tensor& x, const Tensor& bank, const Tensor& indices) {
  const Tensor weights = contiguous_in_type<T>(dscores);
  const Tensor dx = empty({indices.size(0), bank.size(1)}, scalar_type_of<T>);
  const auto of_scores = matrix<const T>(weights);
  const auto to = matrix<T>(dx);
  with_problem<T>(bank, indices, [&](const auto& problem, const Tensor& rows) {
    if (!problem.dense()) return gather_gradients(problem, of_scores, to);
    const Tensor wide = contiguous_in_type<T>(rows);
    multiply_gradients(problem, matrix<const T>(wide), of_scores, to);
  });
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
