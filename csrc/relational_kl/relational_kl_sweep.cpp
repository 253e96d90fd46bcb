// SPDX-License-Identifier: Apache-2.0
// A task multiplies a block of rows with a block of keys, turns the tile of logits into softmax
// weights in place, and multiplies the weights at once with the same keys. The forward keeps a
// running maximum per row: what was summed before is rescaled where it grows. Pieces of the key
// axis have maxima of their own and are merged in order.
//
// Where both sides' sums are of one size, as they are when the student approaches the teacher, the
// teacher's weights are taken from the student's before the product: rounding errors are then as
// small as the difference.
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../common/cut.h"
#include "../common/gemm.h"
#include "../common/parallel.h"
#include "../common/rows_simd.h"
#include "../common/stable.h"
#include "relational_kl_cpu.h"
#include "relational_kl_math.h"
#include "relational_kl_simd.h"

namespace kdk::relational_kl {
namespace {

constexpr int64_t kRows = 256;  // of a tile
constexpr int64_t kKeys = 512;  // of a tile; both sides' tiles stay in a core's L2

constexpr double kNotANumber = std::numeric_limits<double>::quiet_NaN();

// Calls f(begin, count) for the one or two stretches that `exclude` leaves of the n keys from k0
// on.
template <typename F>
void each_stretch(int64_t exclude, int64_t k0, int64_t n, const F& f) {
  const int64_t at = exclude - k0;
  if (at < 0 || at >= n) return f(0, n);
  if (at > 0) f(0, at);
  if (at + 1 < n) f(at + 1, n - at - 1);
}

// One row's sums over the keys of a piece.
struct Running : SoftmaxSums<double> {
  double positive = kNotANumber;  // logit of the positive key
  bool difference = false;        // of weighted keys: the student's less the teacher's

  // Whether neither side's sum is more than twice that of the other.
  bool alike() const { return student.sum <= 2 * teacher.sum && teacher.sum <= 2 * student.sum; }
};

// Scratch memory of a thread: a tile of logits per side.
template <typename T>
class Tiles {
 public:
  explicit Tiles(const Problem<T>& problem)
      : size_(std::min(kRows, problem.rows()) * std::min(kKeys, problem.keys())),
        scratch_(thread_slots() * 2 * size_) {}
  T* student() const { return scratch_.data() + thread_index() * 2 * size_; }
  T* teacher() const { return student() + size_; }

 private:
  int64_t size_;
  Scratch<T> scratch_;
};

template <typename T>
Matrix<T> logits(const Side<T>& side, int64_t i0, int64_t rows, int64_t k0, int64_t n, T* memory) {
  const auto tile = Matrix<T>::contiguous(memory, rows, n);
  gemm<T>(side.rows.row_block(i0, rows), side.keys.row_block(k0, n).t(), tile);
  return tile;
}

template <typename T>
const T* from(const T* scale, int64_t k0) {
  return scale ? scale + k0 : nullptr;
}

// The forward sweep of one block of rows over one piece of the keys.
template <typename T>
class Sweep {
 public:
  Sweep(const Problem<T>& problem, int64_t i0, int64_t rows, Running* running)
      : problem_(problem), i0_(i0), rows_(rows), running_(running) {}

  // Sums over keys first ... end go to `running`, and weighted sums of the student's keys to
  // by_student and by_teacher [rows, D] unless null. Of a row with `difference`, that by the
  // teacher is taken from that by the student.
  void run(int64_t first, int64_t end, const Tiles<T>& tiles, const Matrix<T>* by_student,
           const Matrix<T>* by_teacher) const {
    for (int64_t k0 = first; k0 < end; k0 += kKeys) {
      const int64_t n = std::min(kKeys, end - k0);
      const auto a = logits(problem_.student, i0_, rows_, k0, n, tiles.student());
      auto b = Matrix<T>{};
      if (problem_.has_teacher) {
        b = logits(problem_.teacher, i0_, rows_, k0, n, tiles.teacher());
      }
      const bool rescale = by_student && k0 > first;
      for (int64_t i = 0; i < rows_; ++i) {
        Running& row = running_[i];
        const Running before = row;
        weigh(i, k0, n, a.row(i), b.data ? b.row(i) : nullptr, row);
        if (by_student && b.data) {
          row.difference = row.alike();
          if (row.difference) epilogues<T>().add_scaled(b.row(i), T(-1), a.row(i), n);
        }
        if (!rescale) continue;
        const double student = before.student.factor(row.student.max);
        shrink_row(*by_student, i, student);
        if (!b.data) continue;
        const double teacher = before.teacher.factor(row.teacher.max);
        // what was, and what is, taken from the sum by the student
        const double taken = (before.difference ? student : 0) - (row.difference ? teacher : 0);
        if (taken != 0) {
          epilogues<T>().add_scaled(by_teacher->row(i), static_cast<T>(taken), by_student->row(i),
                                    by_student->cols);
        }
        shrink_row(*by_teacher, i, teacher);
      }
      if (!by_student) continue;
      const auto keys = problem_.student.keys.row_block(k0, n);
      gemm<T>(a, keys, *by_student, k0 > first);
      if (b.data) gemm<T>(b, keys, *by_teacher, k0 > first);
    }
  }

 private:
  void shrink_row(const Matrix<T>& sums, int64_t i, double factor) const {
    if (factor == 1) return;
    rows::loops<T>().scale(sums.row(i), static_cast<T>(factor), sums.row(i), sums.cols);
  }

  // Row i of the tiles a and b, or a alone, becomes weights; `row` takes them in.
  void weigh(int64_t i, int64_t k0, int64_t n, T* a, T* b, Running& row) const {
    const auto& kernels = epilogues<T>();
    const int64_t exclude = problem_.exclude ? problem_.exclude[i0_ + i] : -1;
    const bool* masked = problem_.masked(i0_ + i, k0);
    if (masked && !mask_out(masked, a, n)) {
      std::fill_n(a, n, T(0));
      return;
    }
    double most_student = row.student.max, most_teacher = row.teacher.max;
    each_stretch(exclude, k0, n, [&](int64_t j, int64_t count) {
      const T* scale = from(problem_.student.scale, k0 + j);
      most_student = std::max<double>(most_student, kernels.maximum(a + j, scale, count));
      if (b == nullptr) return;
      scale = from(problem_.teacher.scale, k0 + j);
      most_teacher = std::max<double>(most_teacher, kernels.maximum(b + j, scale, count));
    });
    if (problem_.positives) {
      const int64_t at = problem_.positives[i0_ + i] - k0;
      if (at >= 0 && at < n) row.positive = a[at];
    }
    row.raise(most_student, most_teacher, problem_.subtract_entropy);
    each_stretch(exclude, k0, n, [&](int64_t j, int64_t count) {
      const T* scale = from(problem_.student.scale, k0 + j);
      if (b == nullptr) {
        row.student.sum += kernels.weights(a + j, scale, count, static_cast<T>(most_student));
        return;
      }
      const Sums sums =
          kernels.both_weights(a + j, b + j, scale, count, static_cast<T>(most_student),
                               static_cast<T>(most_teacher), problem_.subtract_entropy);
      row.student.sum += sums.student;
      row.teacher.sum += sums.teacher;
      row.mean += sums.mean;
    });
    if (exclude >= k0 && exclude < k0 + n) {
      a[exclude - k0] = 0;
      if (b) b[exclude - k0] = 0;
    }
  }

  // Makes the logits of masked keys minus infinity. Returns whether a key is left.
  static bool mask_out(const bool* masked, T* a, int64_t n) {
    int64_t left = n;
    for (int64_t j = 0; j < n; ++j) {
      if (!masked[j]) continue;
      a[j] = -std::numeric_limits<T>::infinity();
      --left;
    }
    return left > 0;
  }

  const Problem<T>& problem_;
  int64_t i0_, rows_;
  Running* running_;
};

// Sums over a row's own logits, if it has any.
template <typename T>
SoftmaxSums<double> start(const Problem<T>& problem, int64_t i) {
  SoftmaxSums<double> sums;
  if (problem.own_student) sums.student = {problem.own_student[i], 1};
  if (problem.own_teacher) sums.teacher = {problem.own_teacher[i], 1};
  return sums;
}

}  // namespace

template <typename T>
void forward(const Problem<T>& problem, const Residuals<T>& residuals, const Matrix<T>* gradient) {
  const int64_t B = problem.rows(), K = problem.keys(), D = problem.student.keys.cols;
  const bool has_teacher = problem.has_teacher;
  const Cut cut(ceil_div(B, kRows), ceil_div(K, kKeys));
  const auto& kernels = epilogues<T>();
  const Tiles<T> tiles(problem);
  std::vector<Running> running(cut.pieces * B);
  const int64_t sides = has_teacher ? 2 : 1;
  const Scratch<T> partials(gradient ? sides * cut.pieces * B * D : 0);
  const auto part = [&](int64_t side, int64_t piece) {
    return Matrix<T>::contiguous(partials.data() + (side * cut.pieces + piece) * B * D, B, D);
  };
  const double ops =
      2.0 * std::min(B, kRows) * std::min(K, cut.steps * kKeys) * D * sides * (gradient ? 2 : 1);
  parallel_each(cut.blocks * cut.pieces, ops, [&](int64_t task) {
    const int64_t piece = task % cut.pieces, i0 = task / cut.pieces * kRows,
                  rows = std::min(kRows, B - i0);
    const int64_t first = piece * cut.steps * kKeys, end = std::min(K, first + cut.steps * kKeys);
    const Sweep<T> sweep(problem, i0, rows, running.data() + piece * B + i0);
    if (gradient == nullptr) return sweep.run(first, end, tiles, nullptr, nullptr);
    const auto by_student = part(0, piece).row_block(i0, rows);
    const auto by_teacher = has_teacher ? part(1, piece).row_block(i0, rows) : Matrix<T>{};
    sweep.run(first, end, tiles, &by_student, &by_teacher);
  });
  parallel_each(B, gradient ? 2.0 * sides * cut.pieces * D : 100.0, [&](int64_t i) {
    SoftmaxSums<double> all = start(problem, i);
    double positive = problem.positives     ? kNotANumber
                      : problem.own_student ? problem.own_student[i]
                                            : 0;
    for (int64_t piece = 0; piece < cut.pieces; ++piece) {
      const Running& row = running[piece * B + i];
      all.add(row, problem.subtract_entropy);
      if (problem.positives && problem.positives[i] / (cut.steps * kKeys) == piece)
        positive = row.positive;
    }
    const bool no_key = problem.positives == nullptr && all.student.sum == 0;
    const auto result = has_teacher ? row_result(all, problem.subtract_entropy, no_key)
                                    : row_result(all.student, positive, no_key);
    residuals.loss[i] = static_cast<T>(result.loss);
    residuals.lse_student[i] = static_cast<T>(result.lse_student);
    residuals.lse_teacher[i] = static_cast<T>(result.lse_teacher);
    if (gradient == nullptr) return;
    T* to = gradient->row(i);
    std::fill_n(to, D, T(0));
    if (no_key) return;
    for (int64_t piece = 0; piece < cut.pieces; ++piece) {
      const Running& row = running[piece * B + i];
      const double q = row.student.factor(all.student.max) / all.student.sum;
      if (q != 0) kernels.add_scaled(part(0, piece).row(i), static_cast<T>(q), to, D);
      if (!has_teacher) continue;
      const double p = row.teacher.factor(all.teacher.max) / all.teacher.sum;
      const double by_teacher = (row.difference ? q : 0) - p;
      if (by_teacher != 0) {
        kernels.add_scaled(part(1, piece).row(i), static_cast<T>(by_teacher), to, D);
      }
    }
    if (problem.positives == nullptr) return;
    if (problem.names_no_key(i)) {
      std::fill_n(to, D, static_cast<T>(kNotANumber));
      return;
    }
    const int64_t k = problem.positives[i];
    const auto& keys = problem.student.keys;
    const T factor = problem.student.scale ? problem.student.scale[k] : T(1);
    for (int64_t d = 0; d < D; ++d) to[d] -= factor * keys.row(k)[d * keys.col_stride];
  });
}

namespace {

// Returns the tile of dout times the derivatives by the student's logits, and the tile of those by
// the teacher's logits, if there is a teacher.
template <typename T>
std::pair<Matrix<T>, Matrix<T>> derivatives(const Problem<T>& problem,
                                            const Residuals<const T>& residuals, const T* dout,
                                            int64_t dout_stride, int64_t i0, int64_t rows,
                                            int64_t k0, int64_t n, const Tiles<T>& tiles) {
  const auto& kernels = epilogues<T>();
  const auto a = logits(problem.student, i0, rows, k0, n, tiles.student());
  auto b = Matrix<T>{};
  if (problem.has_teacher) b = logits(problem.teacher, i0, rows, k0, n, tiles.teacher());
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = i0 + i;
    T factor = dout[row * dout_stride];
    if (problem.names_no_key(row)) factor = static_cast<T>(kNotANumber);
    const Row<T> of{residuals.lse_student[row], residuals.lse_teacher[row], residuals.loss[row],
                    factor, problem.subtract_entropy};
    if (problem.student.scale) kernels.multiply(a.row(i), problem.student.scale + k0, n);
    if (b.data && problem.teacher.scale) kernels.multiply(b.row(i), problem.teacher.scale + k0, n);
    if (b.data) {
      kernels.derivatives(a.row(i), b.row(i), n, of);
    } else {
      kernels.softmax(a.row(i), n, of.lse_student, factor);
      const int64_t at = problem.positives ? problem.positives[row] - k0 : -1;
      if (at >= 0 && at < n) a.row(i)[at] -= factor;
      const bool* masked = problem.masked(row, k0);
      for (int64_t j = 0; masked && j < n; ++j) {
        if (masked[j]) a.row(i)[j] = 0;
      }
    }
    const int64_t excluded = problem.exclude ? problem.exclude[row] - k0 : -1;
    if (excluded >= 0 && excluded < n) {
      a.row(i)[excluded] = 0;
      if (b.data) b.row(i)[excluded] = 0;
    }
  }
  return {a, b};
}

// to = the sum of `pieces` matrices in order; the first of them is `to` itself.
template <typename T, typename Part>
void add_pieces(const Matrix<T>& to, int64_t pieces, const Part& part) {
  parallel_each(to.rows, 1.0 * pieces * to.cols, [&](int64_t i) {
    for (int64_t piece = 1; piece < pieces; ++piece)
      epilogues<T>().add_scaled(part(piece).row(i), T(1), to.row(i), to.cols);
  });
}

// A result, and the pieces beyond the first that are added to it.
template <typename T>
class Pieces {
 public:
  Pieces(const Matrix<T>* to, int64_t pieces)
      : to_(to), pieces_(pieces), scratch_(to ? (pieces - 1) * to->rows * to->cols : 0) {}
  bool wanted() const { return to_ != nullptr; }
  Matrix<T> operator()(int64_t piece) const {
    if (piece == 0) return *to_;
    const int64_t size = to_->rows * to_->cols;
    return Matrix<T>::contiguous(scratch_.data() + (piece - 1) * size, to_->rows, to_->cols);
  }
  void add() const {
    if (wanted() && pieces_ > 1) add_pieces(*to_, pieces_, *this);
  }

 private:
  const Matrix<T>* to_;
  int64_t pieces_;
  Scratch<T> scratch_;
};

}  // namespace

template <typename T>
void backward(const Problem<T>& problem, const Residuals<const T>& residuals, const T* dout,
              int64_t dout_stride, const Gradients<T>& gradients) {
  const int64_t B = problem.rows(), K = problem.keys();
  const auto& kernels = epilogues<T>();
  const Tiles<T> tiles(problem);
  const double ops = 6.0 * std::min(B, kRows) * std::min(K, kKeys) *
                     (problem.student.keys.cols + problem.teacher.keys.cols);
  if (gradients.teacher && K == 0) fill_zero(*gradients.teacher);
  if (gradients.teacher && K > 0) {
    const Cut cut(ceil_div(B, kRows), ceil_div(K, kKeys));
    const Pieces<T> sums(gradients.teacher, cut.pieces);
    parallel_each(cut.blocks * cut.pieces, ops * cut.steps, [&](int64_t task) {
      const int64_t piece = task % cut.pieces, i0 = task / cut.pieces * kRows,
                    rows = std::min(kRows, B - i0);
      const int64_t first = piece * cut.steps * kKeys, end = std::min(K, first + cut.steps * kKeys);
      const auto out = sums(piece).row_block(i0, rows);
      for (int64_t k0 = first; k0 < end; k0 += kKeys) {
        const int64_t n = std::min(kKeys, end - k0);
        const auto b =
            derivatives(problem, residuals, dout, dout_stride, i0, rows, k0, n, tiles).second;
        for (int64_t i = 0; problem.teacher.scale && i < rows; ++i)
          kernels.multiply(b.row(i), problem.teacher.scale + k0, n);
        gemm<T>(b, problem.teacher.keys.row_block(k0, n), out, k0 > first);
      }
    });
    sums.add();
  }
  if (!gradients.keys && !gradients.teacher_keys) return;
  if (B == 0) {
    for (const auto* out : {gradients.keys, gradients.teacher_keys}) {
      if (out) fill_zero(*out);
    }
    return;
  }
  const Cut cut(ceil_div(K, kKeys), ceil_div(B, kRows));
  const Pieces<T> keys(gradients.keys, cut.pieces),
      teacher_keys(gradients.teacher_keys, cut.pieces);
  parallel_each(cut.blocks * cut.pieces, ops * cut.steps, [&](int64_t task) {
    const int64_t piece = task % cut.pieces, k0 = task / cut.pieces * kKeys,
                  n = std::min(kKeys, K - k0);
    const int64_t first = piece * cut.steps * kRows, end = std::min(B, first + cut.steps * kRows);
    for (int64_t i0 = first; i0 < end; i0 += kRows) {
      const int64_t rows = std::min(kRows, end - i0);
      const auto [a, b] =
          derivatives(problem, residuals, dout, dout_stride, i0, rows, k0, n, tiles);
      if (keys.wanted()) {
        const auto out = keys(piece).row_block(k0, n);
        gemm<T>(a.t(), problem.student.rows.row_block(i0, rows), out, i0 > first);
        if (b.data && problem.shared)
          gemm<T>(b.t(), problem.teacher.rows.row_block(i0, rows), out, 1);
      }
      if (teacher_keys.wanted()) {
        gemm<T>(b.t(), problem.teacher.rows.row_block(i0, rows),
                teacher_keys(piece).row_block(k0, n), i0 > first);
      }
    }
  });
  keys.add();
  teacher_keys.add();
}

#define KDK_INSTANTIATE(T)                                                                   \
  template void forward<T>(const Problem<T>&, const Residuals<T>&, const Matrix<T>*);        \
  template void backward<T>(const Problem<T>&, const Residuals<const T>&, const T*, int64_t, \
                            const Gradients<T>&);
KDK_INSTANTIATE(float)
KDK_INSTANTIATE(double)
#undef KDK_INSTANTIATE

}  // namespace kdk::relational_kl
