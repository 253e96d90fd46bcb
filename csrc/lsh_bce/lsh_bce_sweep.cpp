// SPDX-License-Identifier: Apache-2.0
// A task projects a block of rows on a block of directions, turns the tile into losses and
// derivatives in place, and multiplies the derivatives at once with what the gradient needs. Blocks
// of one axis are tasks; blocks of the other follow one another within a task, or are cut into
// pieces where there are few tasks. The cut depends on the shapes alone, and what the pieces add is
// added in order.
#include <algorithm>

#include "../common/cut.h"
#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/rows_simd.h"
#include "lsh_bce_cpu.h"
#include "lsh_bce_simd.h"

namespace kdk::lsh_bce {
namespace {

constexpr int64_t kRows = 256;  // of a tile
constexpr int64_t kBits = 512;  // of a tile, a multiple of 8; the tile stays in a core's L2

// Rows i0 ... of those that count: where they lie, or copied into `memory` if some are left out.
template <typename T>
Matrix<const T> features_of(const Problem<T>& problem, int64_t i0, int64_t n, T* memory) {
  const auto& features = problem.projection.features;
  if (problem.rows == nullptr) return features.row_block(i0, n);
  const auto copy = Matrix<T>::contiguous(memory, n, features.cols);
  for (int64_t i = 0; i < n; ++i) {
    const T* from = features.row(problem.row(i0 + i));
    for (int64_t d = 0; d < features.cols; ++d) copy.row(i)[d] = from[d * features.col_stride];
  }
  return copy;
}

// Scratch memory of a thread: a tile of projections, and features where some rows are left out.
template <typename T>
class Tiles {
 public:
  explicit Tiles(const Problem<T>& problem)
      : rows_(std::min(kRows, problem.count())),
        bits_(std::min(kBits, problem.projection.weight.rows)),
        size_(rows_ * (bits_ + (problem.rows ? problem.projection.features.cols : 0))),
        scratch_(thread_slots() * size_) {}
  T* projections() const { return scratch_.data() + thread_index() * size_; }
  T* features() const { return projections() + rows_ * bits_; }

 private:
  int64_t rows_, bits_, size_;
  Scratch<T> scratch_;
};

}  // namespace

template <typename T>
void encode(const Projection<T>& projection, Matrix<uint8_t> codes) {
  const auto &x = projection.features, &w = projection.weight;
  const int64_t row_blocks = ceil_div(x.rows, kRows), bit_blocks = ceil_div(w.rows, kBits);
  const Scratch<T> scratch(thread_slots() * kRows * kBits);
  parallel_each(row_blocks * bit_blocks, 2.0 * kRows * kBits * x.cols, [&](int64_t task) {
    const int64_t i0 = task % row_blocks * kRows, rows = std::min(kRows, x.rows - i0);
    const int64_t n0 = task / row_blocks * kBits, bits = std::min(kBits, w.rows - n0);
    const auto z =
        Matrix<T>::contiguous(scratch.data() + thread_index() * kRows * kBits, rows, bits);
    gemm<T>(x.row_block(i0, rows), w.row_block(n0, bits).t(), z);
    for (int64_t i = 0; i < rows; ++i)
      epilogues<T>().pack(z.row(i), projection.bias + n0, bits, codes.row(i0 + i) + n0 / 8);
  });
}

template <typename T>
void forward(const Problem<T>& problem, T* loss, const Matrix<T>* gradient) {
  const auto& w = problem.projection.weight;
  const int64_t count = problem.count(), D = w.cols;
  const Cut cut(ceil_div(count, kRows), ceil_div(w.rows, kBits));
  const auto& kernels = epilogues<T>();
  const Tiles<T> tiles(problem);
  std::vector<double> losses(cut.pieces * count);
  // The first piece goes straight into the gradient, unless rows have to be spread out there.
  const int64_t in_place = problem.rows == nullptr ? 1 : 0;
  const Scratch<T> partials(gradient ? (cut.pieces - in_place) * count * D : 0);
  const auto part = [&](int64_t piece) {
    return piece < in_place
               ? *gradient
               : Matrix<T>::contiguous(partials.data() + (piece - in_place) * count * D, count, D);
  };
  const double ops =
      2.0 * std::min(count, kRows) * std::min(w.rows, cut.steps * kBits) * D * (gradient ? 2 : 1);
  parallel_each(cut.blocks * cut.pieces, ops, [&](int64_t task) {
    const int64_t piece = task % cut.pieces, i0 = task / cut.pieces * kRows,
                  rows = std::min(kRows, count - i0);
    const auto x = features_of(problem, i0, rows, tiles.features());
    const int64_t first = piece * cut.steps * kBits,
                  end = std::min(w.rows, first + cut.steps * kBits);
    if (gradient && first >= end) fill_zero(part(piece).row_block(i0, rows));
    for (int64_t n0 = first; n0 < end; n0 += kBits) {
      const int64_t bits = std::min(kBits, end - n0);
      const auto z = Matrix<T>::contiguous(tiles.projections(), rows, bits);
      gemm<T>(x, w.row_block(n0, bits).t(), z);
      for (int64_t i = 0; i < rows; ++i) {
        const uint8_t* codes = problem.codes.row(problem.row(i0 + i)) + n0 / 8;
        losses[piece * count + i0 + i] += kernels.cross_entropy(
            z.row(i), problem.projection.bias + n0, codes, bits, gradient != nullptr, T(1));
      }
      if (gradient) gemm<T>(z, w.row_block(n0, bits), part(piece).row_block(i0, rows), n0 > first);
    }
  });
  parallel_each(count, gradient ? 2.0 * cut.pieces * D : 1.0, [&](int64_t i) {
    double sum = 0;
    for (int64_t piece = 0; piece < cut.pieces; ++piece) sum += losses[piece * count + i];
    loss[problem.row(i)] = static_cast<T>(sum);
    if (gradient == nullptr) return;
    T* to = gradient->row(problem.row(i));
    if (in_place == 0) std::copy_n(part(0).row(i), D, to);
    for (int64_t piece = 1; piece < cut.pieces; ++piece)
      rows::loops<T>().add(part(piece).row(i), to, D);
  });
}

template <typename T>
void backward(const Problem<T>& problem, const T* dout, int64_t dout_stride,
              const Matrix<T>* dweight, T* dbias) {
  const auto& w = problem.projection.weight;
  const int64_t count = problem.count(), N = w.rows, D = w.cols;
  const Cut cut(ceil_div(N, kBits), ceil_div(count, kRows));
  const auto& kernels = epilogues<T>();
  const Tiles<T> tiles(problem);
  const Scratch<T> partials(dweight ? (cut.pieces - 1) * N * D : 0);
  const auto part = [&](int64_t piece) {
    return piece == 0 ? *dweight
                      : Matrix<T>::contiguous(partials.data() + (piece - 1) * N * D, N, D);
  };
  std::vector<double> columns(dbias ? cut.pieces * N : 0);
  const double ops =
      2.0 * std::min(N, kBits) * std::min(count, cut.steps * kRows) * D * (dweight ? 2 : 1);
  parallel_each(cut.blocks * cut.pieces, ops, [&](int64_t task) {
    const int64_t piece = task % cut.pieces, n0 = task / cut.pieces * kBits,
                  bits = std::min(kBits, N - n0);
    const auto directions = w.row_block(n0, bits);
    const int64_t first = piece * cut.steps * kRows,
                  end = std::min(count, first + cut.steps * kRows);
    if (dweight && first >= end) fill_zero(part(piece).row_block(n0, bits));
    for (int64_t i0 = first; i0 < end; i0 += kRows) {
      const int64_t rows = std::min(kRows, end - i0);
      const auto x = features_of(problem, i0, rows, tiles.features());
      const auto z = Matrix<T>::contiguous(tiles.projections(), rows, bits);
      gemm<T>(x, directions.t(), z);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = problem.row(i0 + i);
        kernels.cross_entropy(z.row(i), problem.projection.bias + n0,
                              problem.codes.row(row) + n0 / 8, bits, true, dout[row * dout_stride]);
        if (dbias) rows::loops<T>().add_wide(z.row(i), columns.data() + piece * N + n0, bits);
      }
      if (dweight) gemm<T>(z.t(), x, part(piece).row_block(n0, bits), i0 > first);
    }
  });
  parallel_each(N, dweight ? 1.0 * cut.pieces * D : 1.0, [&](int64_t n) {
    for (int64_t piece = 1; dweight && piece < cut.pieces; ++piece)
      rows::loops<T>().add(part(piece).row(n), dweight->row(n), D);
    double sum = 0;
    for (int64_t piece = 0; dbias && piece < cut.pieces; ++piece) sum += columns[piece * N + n];
    if (dbias) dbias[n] = static_cast<T>(sum);
  });
}

#define KDK_INSTANTIATE(T)                                           \
  template void encode<T>(const Projection<T>&, Matrix<uint8_t>);    \
  template void forward<T>(const Problem<T>&, T*, const Matrix<T>*); \
  template void backward<T>(const Problem<T>&, const T*, int64_t, const Matrix<T>*, T*);
KDK_INSTANTIATE(float)
KDK_INSTANTIATE(double)
#undef KDK_INSTANTIATE

}  // namespace kdk::lsh_bce
