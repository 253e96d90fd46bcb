// SPDX-License-Identifier: Apache-2.0
// There are two tiled algorithms: `resident` keeps both Grams, `streamed` sweeps their tiles on and
// above the diagonal and never holds more than two tiles a thread.
#include <algorithm>
#include <vector>

#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../pairs/tile_grid.h"
#include "gram_mse_cpu.h"
#include "gram_mse_simd.h"

namespace kdk::gram_mse {
namespace {

// Rows of a tile: both Gram tiles and a panel of features fit a 2 MiB L2.
constexpr int64_t kTile = 256;
constexpr int64_t kRowBlock = 64;       // rows of a resident Gram handled at a time
constexpr int64_t kColumnBlock = 1024;  // columns of the gradient that one task computes

// Adds up a Gram tile's part of the loss: row (and column) sums, or squared differences.
template <typename T>
struct Accumulator {
  const Options& options;
  const Epilogues<T>& kernels = epilogues<T>();
  Taylor<T> taylor{options.gamma, options.order};
  std::vector<double> sums;         // [B, kSums]
  std::vector<double> differences;  // one per task, added in order at the end

  Accumulator(const Options& options_, int64_t rows, int64_t tasks)
      : options(options_),
        sums(is_row_normalized(options_.normalize) ? rows * kSums : 0),
        differences(tasks) {}

  void finish(const Forward<T>& call) const {
    if (is_row_normalized(options.normalize)) {
      const bool l2 = options.normalize == Normalize::kRowL2;
      *call.loss = static_cast<T>(finish_rows(call.coef, sums.data(), l2));
      return;
    }
    double loss = 0;
    for (const double difference : differences) loss += difference;
    *call.loss = static_cast<T>(loss);
    uniform_coef(call.coef);
  }
};

template <typename T>
void resident_forward(const Forward<T>& call, const Options& options) {
  const auto &s = call.student, &t = call.teacher;
  const int64_t B = s.rows;
  grams<T>({{s, s, call.gram_student, true}, {t, t, call.gram_teacher, true}});
  const int64_t blocks = ceil_div(B, kRowBlock);
  Accumulator<T> total(options, B, blocks);
  parallel_each(blocks, 8.0 * kRowBlock * B, [&](int64_t block) {
    const int64_t i0 = block * kRowBlock, n = std::min(kRowBlock, B - i0);
    const auto of_student = call.gram_student.row_block(i0, n),
               of_teacher = call.gram_teacher.row_block(i0, n);
    if (is_row_normalized(options.normalize)) {
      const bool l1 = options.normalize == Normalize::kRowL1;
      total.kernels.row_sums(of_student, of_teacher, l1, total.sums.data() + i0 * kSums, nullptr);
    } else {
      total.differences[block] = total.kernels.squared_difference(
          of_student, of_teacher, options.taylor ? &total.taylor : nullptr);
    }
  });
  total.finish(call);
}

template <typename T>
void streamed_forward(const Forward<T>& call, const Options& options) {
  const int64_t B = call.student.rows, tile_size = kTile * kTile;
  const auto grid = pairs::TileGrid::square(B, B, true, kTile);
  const Scratch<T> scratch(thread_slots() * 2 * tile_size);
  Accumulator<T> total(options, B, grid.triangle());
  const bool l1 = options.normalize == Normalize::kRowL1;
  const double ops = 2.0 * tile_size * (call.student.cols + call.teacher.cols);
  grid.each(ops, [&](const pairs::Block& block) {
    const auto [i0, n_i, j0, n_j, diagonal] = block;
    T* memory = scratch.data() + thread_index() * 2 * tile_size;
    const auto of_student = Matrix<T>::contiguous(memory, n_i, n_j);
    const auto of_teacher = Matrix<T>::contiguous(memory + tile_size, n_i, n_j);
    gemm<T>(call.student.row_block(i0, n_i), call.student.row_block(j0, n_j).t(), of_student);
    gemm<T>(call.teacher.row_block(i0, n_i), call.teacher.row_block(j0, n_j).t(), of_teacher);
    if (!is_row_normalized(options.normalize)) {
      const double sum = total.kernels.squared_difference(of_student, of_teacher,
                                                          options.taylor ? &total.taylor : nullptr);
      total.differences[grid.triangle_index(block)] = diagonal ? sum : 2 * sum;
      return;
    }
    std::vector<double> columns(diagonal ? 0 : kSums * n_j);
    total.kernels.row_sums(of_student, of_teacher, l1, total.sums.data() + i0 * kSums,
                           diagonal ? nullptr : columns.data());
    for (int64_t j = 0; !diagonal && j < n_j; ++j) {
      for (int64_t k = 0; k < kSums; ++k) total.sums[(j0 + j) * kSums + k] += columns[k * n_j + j];
    }
  });
  total.finish(call);
}

// The weights of a tile of both Grams, which may take the place of one of them.
template <typename T>
void weigh(const Backward<T>& call, const Options& options, Matrix<const T> side,
           Matrix<const T> other, int64_t i0, int64_t j0, Matrix<T> weights) {
  const auto& kernels = epilogues<T>();
  if (options.taylor) {
    kernels.taylor_weights(side, other, Taylor<T>(options.gamma, options.order), call.dout,
                           weights);
  } else {
    kernels.linear_weights(side, other, call.a + i0, call.b + i0, call.c + i0, call.a + j0,
                           call.b + j0, call.c + j0, weights);
  }
}

template <typename T>
void resident_backward(const Backward<T>& call, const Options& options) {
  const int64_t B = call.side.rows, D = call.side.cols;
  const Scratch<T> scratch(B * B);
  const auto weights = Matrix<T>::contiguous(scratch.data(), B, B);
  parallel_each(ceil_div(B, kRowBlock), 8.0 * kRowBlock * B, [&](int64_t block) {
    const int64_t i0 = block * kRowBlock, n = std::min(kRowBlock, B - i0);
    weigh(call, options, call.gram_side.row_block(i0, n), call.gram_other.row_block(i0, n), i0, 0,
          weights.row_block(i0, n));
  });
  const int64_t row_blocks = ceil_div(B, kTile), col_blocks = ceil_div(D, kColumnBlock);
  parallel_each(row_blocks * col_blocks, 2.0 * kTile * kColumnBlock * B, [&](int64_t task) {
    const int64_t i0 = task % row_blocks * kTile, n = std::min(kTile, B - i0);
    const int64_t d0 = task / row_blocks * kColumnBlock, m = std::min(kColumnBlock, D - d0);
    gemm<T>(weights.row_block(i0, n), call.side.block(0, B, d0, m),
            call.gradient.block(i0, n, d0, m));
  });
}

template <typename T>
void streamed_backward(const Backward<T>& call, const Options& options) {
  const int64_t B = call.side.rows, tile_size = kTile * kTile;
  const auto grid = pairs::TileGrid::square(B, B, true, kTile);
  const Scratch<T> scratch(thread_slots() * 2 * tile_size);
  const double ops = 2.0 * tile_size * (3 * call.side.cols + call.other.cols);
  grid.each(ops, [&](const pairs::Block& block) {
    const auto [i0, n_i, j0, n_j, diagonal] = block;
    T* memory = scratch.data() + thread_index() * 2 * tile_size;
    const auto side = Matrix<T>::contiguous(memory, n_i, n_j);
    const auto other = Matrix<T>::contiguous(memory + tile_size, n_i, n_j);
    const auto side_i = call.side.row_block(i0, n_i), side_j = call.side.row_block(j0, n_j);
    gemm<T>(side_i, side_j.t(), side);
    gemm<T>(call.other.row_block(i0, n_i), call.other.row_block(j0, n_j).t(), other);
    weigh<T>(call, options, side, other, i0, j0, side);
    // The diagonal comes first for every block and starts its sum.
    gemm<T>(side, side_j, call.gradient.row_block(i0, n_i), diagonal ? 0 : 1);
    if (!diagonal) gemm<T>(side.t(), side_i, call.gradient.row_block(j0, n_j), 1);
  });
}

}  // namespace

double finish_rows(Matrix<double> coef, const double* sums, bool l2) {
  double loss = 0;
  for (int64_t i = 0; i < coef.cols; ++i) {
    const RowResult row = normalized_row(sums + i * kSums, l2);
    loss += row.loss;
    for (int k = 0; k < kCoefs; ++k) coef.row(k)[i] = row.coef[k];
  }
  return loss;
}

void uniform_coef(Matrix<double> coef) {
  for (int k = 0; k < kCoefs; ++k) std::fill_n(coef.row(k), coef.cols, kUniformCoef[k]);
}

template <typename T>
void tiled_forward(const Forward<T>& call, const Options& options) {
  if (options.algorithm == Algorithm::kResident) return resident_forward(call, options);
  streamed_forward(call, options);
}

template <typename T>
void tiled_backward(const Backward<T>& call, const Options& options) {
  if (options.algorithm == Algorithm::kResident) return resident_backward(call, options);
  streamed_backward(call, options);
}

#define KDK_INSTANTIATE(T)                                           \
  template void tiled_forward<T>(const Forward<T>&, const Options&); \
  template void tiled_backward<T>(const Backward<T>&, const Options&);
KDK_INSTANTIATE(float)
KDK_INSTANTIATE(double)
#undef KDK_INSTANTIATE

}  // namespace kdk::gram_mse
