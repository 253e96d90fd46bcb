// SPDX-License-Identifier: Apache-2.0
// CPU operator kdkernels_C::pkt_fwd. Arguments were checked by the public function. The sweeps
// visit the tiles on and above the diagonal; each tile serves its rows and, off the diagonal, its
// columns.
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "../common/cut.h"
#include "../common/gemm.h"
#include "../common/named.h"
#include "../common/parallel.h"
#include "../common/rows_math.h"
#include "../common/rows_simd.h"
#include "../common/stable.h"
#include "../pairs/pair_sweep_simd.h"
#include "../pairs/tile_grid.h"
#include "pkt_simd.h"

namespace kdk::pkt {
namespace {

constexpr Named<Kernel> kKernels[] = {{"cosine", Kernel::kCosine},
                                      {"student_t", Kernel::kStudentT}};
constexpr Named<Divergence> kDivergences[] = {{"kl", Divergence::kKl},
                                              {"jeffreys", Divergence::kJeffreys}};

constexpr int64_t kColumns = 64;  // of a task that sums rows

// Returns sum_j weight_j x_j in fp64. All weights are 1 if `weight` is null.
template <typename T>
std::vector<double> summed_rows(Matrix<const T> x, const double* weight) {
  std::vector<double> sums(x.cols);
  parallel_each(ceil_div(x.cols, kColumns), 2.0 * kColumns * x.rows, [&](int64_t block) {
    const int64_t first = block * kColumns, last = std::min(first + kColumns, x.cols);
    for (int64_t j = 0; j < x.rows; ++j) {
      const T* row = x.row(j);
      const double w = weight ? weight[j] : 1;
#pragma omp simd
      for (int64_t d = first; d < last; ++d) sums[d] += w * static_cast<double>(row[d]);
    }
  });
  return sums;
}

template <typename T, typename U>
double dot(const T* x, const U* y, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < n; ++d) sum += static_cast<double>(x[d]) * static_cast<double>(y[d]);
  return sum;
}

// The student or the teacher, as products need them.
template <typename T>
struct Side {
  Tensor source;              // contiguous, in T
  Tensor rows;                // u (cosine), or x less its mean (student_t), [B, D]
  std::vector<double> norm;   // [B] |x|, cosine
  std::vector<double> total;  // [D] sum of u, cosine
  std::vector<T> self;        // [B] 1 - |u|, or squared norms
  std::vector<double> z;      // [B] sums of K
  std::vector<T> inverse;     // [B] of z

  Side(const Tensor& x, Kernel kernel, double eps)
      : source(torch::stable::contiguous(in_type<T>(x))),
        rows(empty({x.size(0), x.size(1)}, scalar_type_of<T>)),
        self(x.size(0)),
        z(x.size(0)),
        inverse(x.size(0)) {
    const auto from = matrix<const T>(source);
    const auto to = matrix<T>(rows);
    const int64_t B = from.rows, D = from.cols;
    if (kernel == Kernel::kStudentT) {
      std::vector<double> mean = summed_rows<T>(from, nullptr);
      for (double& m : mean) m /= static_cast<double>(B);
      parallel_each(B, 4.0 * D, [&](int64_t i) {
        for (int64_t d = 0; d < D; ++d) to.row(i)[d] = static_cast<T>(from.row(i)[d] - mean[d]);
        self[i] = static_cast<T>(dot(to.row(i), to.row(i), D));
      });
      return;
    }
    norm.resize(B);
    parallel_each(B, 4.0 * D, [&](int64_t i) {
      norm[i] = no_infinity(std::sqrt(dot(from.row(i), from.row(i), D)));
      self[i] = static_cast<T>(eps / (norm[i] + eps));
      const T scale = static_cast<T>(1 / (norm[i] + eps));
      for (int64_t d = 0; d < D; ++d) to.row(i)[d] = scale * from.row(i)[d];
    });
    total = summed_rows<T>(to, nullptr);
    for (int64_t i = 0; i < B; ++i) {
      z[i] = (dot(to.row(i), total.data(), D) + static_cast<double>(B)) / 2;
    }
    invert();
  }

  void invert() {
    for (size_t i = 0; i < z.size(); ++i) inverse[i] = static_cast<T>(1 / z[i]);
  }

  Matrix<const T> view() const { return matrix<const T>(rows); }
};

template <typename T>
struct Sweep {
  Side<T> student, teacher;
  Kernel kernel;
  Divergence divergence;
  double eps;
  int64_t B = student.rows.size(0);
  // both sides' tiles and a panel fit a 2 MiB L2
  pairs::TileGrid grid = pairs::TileGrid::fitted(B, B, true);
  int64_t tiles = kernel == Kernel::kStudentT ? 3 : 2;  // K of both sides, and distances
  Scratch<T> scratch{thread_slots() * tiles * grid.tile_size()};
  const Epilogues<T>& kernels = epilogues<T>();

  Sweep(const Tensor& s, const Tensor& t, Kernel kernel_, Divergence divergence_)
      : student(s, kernel_, norm_eps(divergence_)),
        teacher(t, kernel_, norm_eps(divergence_)),
        kernel(kernel_),
        divergence(divergence_),
        eps(norm_eps(divergence_)) {}

  static double norm_eps(Divergence d) { return d == Divergence::kKl ? kKlEps : kJeffreysEps; }

  // A pair of the student's rows, within a tile, whose distance comes from their difference.
  struct Close {
    int64_t i, j;
    double distance;  // the root that K is of
  };

  // One tile of K of both sides.
  struct Pair {
    int64_t index, i0, j0;
    bool diagonal;
    Matrix<T> s, t;
    Matrix<const T> rows_i, rows_j;  // of the student
    // student_t with `distances`: those of the student, infinite of a row with itself and of
    // `close` pairs
    Matrix<T> distance;
    std::vector<Close> close;
  };

  template <typename F>
  void each_tile(double more_ops, bool distances, const F& f) {
    const auto x = student.view(), y = teacher.view();
    const int64_t size = grid.tile_size();
    const double ops = size * (2.0 * (x.cols + y.cols) + 100 + more_ops);
    grid.each(ops, [&](const pairs::Block& block) {
      const auto [i0, rows, j0, cols, diagonal] = block;
      T* memory = scratch.data() + thread_index() * tiles * size;
      Pair pair = {grid.triangle_index(block),
                   i0,
                   j0,
                   diagonal,
                   Matrix<T>::contiguous(memory, rows, cols),
                   Matrix<T>::contiguous(memory + size, rows, cols),
                   x.row_block(i0, rows),
                   x.row_block(j0, cols),
                   distances ? Matrix<T>::contiguous(memory + 2 * size, rows, cols) : Matrix<T>{},
                   {}};
      gemm<T>(pair.rows_i, pair.rows_j.t(), pair.s);
      gemm<T>(y.row_block(i0, rows), y.row_block(j0, cols).t(), pair.t);
      if (kernel == Kernel::kCosine) {
        kernels.cosines(pair.s, student.self.data() + i0, student.self.data() + j0);
        kernels.cosines(pair.t, teacher.self.data() + i0, teacher.self.data() + j0);
      } else {
        student_t(student, pair, pair.s, distances);
        student_t(teacher, pair, pair.t, false);
      }
      f(pair);
    });
  }

  // Inner products of a tile become K. A squared distance that its products leave few digits is
  // computed again from the rows as they were given.
  void student_t(const Side<T>& side, Pair& pair, Matrix<T> tile, bool distances) const {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const auto given = matrix<const T>(side.source);
    for (int64_t i = 0; i < tile.rows; ++i) {
      T* row = tile.row(i);
      const int64_t close =
          pairs::loops<T>().distances(row, side.self[pair.i0 + i], side.self.data() + pair.j0,
                                      tile.cols, pairs::Distance::kSqEuclidean);
      const size_t first = pair.close.size();
      for (int64_t j = 0; close > 0 && j < tile.cols; ++j) {
        if (!(row[j] < 0)) continue;
        const double d2 = rows::loops<T>().squared_difference(given.row(pair.i0 + i),
                                                              given.row(pair.j0 + j), given.cols);
        row[j] = static_cast<T>(d2);
        if (distances && !(pair.diagonal && i == j))
          pair.close.push_back({i, j, std::sqrt(d2 + kDistanceEps)});
      }
      kernels.student_t(row, distances ? pair.distance.row(i) : nullptr, tile.cols);
      if (!distances) continue;
      for (size_t c = first; c < pair.close.size(); ++c) {
        pair.distance.row(i)[pair.close[c].j] = kInfinity;
      }
      if (pair.diagonal) pair.distance.row(i)[i] = kInfinity;
    }
  }

  Stretch<T> stretch(int64_t first, const T* r) const {
    return {{student.inverse.data() + first, teacher.inverse.data() + first},
            r ? r + first : nullptr};
  }

  // Calls f(rows of sums, columns or null) for a tile, and adds the columns to the same sums.
  template <typename F>
  void add(const Pair& pair, std::vector<double>& sums, const F& f) const {
    std::vector<T> columns(pair.diagonal ? 0 : pair.s.cols);
    f(sums.data() + pair.i0, pair.diagonal ? nullptr : columns.data());
    for (size_t j = 0; j < columns.size(); ++j) sums[pair.j0 + j] += columns[j];
  }

  void sum_similarities() {
    each_tile(0, false, [&](const Pair& pair) {
      for (auto [side, k] : {std::pair{&student, pair.s}, std::pair{&teacher, pair.t}}) {
        add(pair, side->z, [&](double* rows, T* cols) { kernels.sums(k, rows, cols); });
      }
    });
    student.invert();
    teacher.invert();
  }

  // Adds the product of a tile's weights and rows to `gradient`, whose first tile is the diagonal.
  void add_product(const Pair& pair, Matrix<T> gradient) const {
    gemm<T>(pair.s, pair.rows_j, gradient.row_block(pair.i0, pair.s.rows), pair.diagonal ? 0 : 1);
    if (pair.diagonal) return;
    const Matrix<T> across = gradient.row_block(pair.j0, pair.s.cols);
    gemm<T>(pair.s.t(), pair.rows_i, across, 1);
  }

  // Returns the loss and computes r [B]. For kCosine it also computes the products of the gradient,
  // unless `gradient` is null.
  double loss(std::vector<double>& r, const Matrix<T>* gradient) {
    std::vector<double> losses(grid.triangle());  // of each tile, added in order
    const double more_ops = gradient ? 4.0 * gradient->cols : 0;
    each_tile(more_ops, false, [&](const Pair& pair) {
      const auto i = stretch(pair.i0, nullptr), j = stretch(pair.j0, nullptr);
      add(pair, r, [&](double* rows, T* cols) {
        losses[pair.index] = kernels.loss(pair.s, pair.t, i, j, divergence, rows, cols);
      });
      if (!gradient) return;
      kernels.weights(pair.s, pair.t, nullptr, i, j, divergence, nullptr, nullptr);
      add_product(pair, *gradient);
    });
    double total = 0;
    for (const double value : losses) total += value;
    return total;
  }

  // Completes the gradient from the products W u: adds the rank-one parts of dL/dK, then goes
  // through u = x / (|x| + eps).
  void finish_cosine(const std::vector<double>& r, Matrix<T> gradient) const {
    const auto u = student.view(), x = matrix<const T>(student.source);
    const int64_t D = u.cols;
    std::vector<double> ratio(B);
    for (int64_t i = 0; i < B; ++i) ratio[i] = r[i] / student.z[i];
    const std::vector<double> weighted = summed_rows<T>(u, ratio.data());
    parallel_each(B, 8.0 * D, [&](int64_t i) {
      T* row = gradient.row(i);
      for (int64_t d = 0; d < D; ++d) {
        row[d] = static_cast<T>((row[d] - ratio[i] * student.total[d] - weighted[d]) / 2);
      }
      // in fp64: the radial part that is taken away can be much larger than what remains
      const double norm = student.norm[i], inverse = 1 / (norm + eps);
      const double radial = norm == 0 ? 0 : dot(row, x.row(i), D) / norm * inverse;
      for (int64_t d = 0; d < D; ++d) {
        row[d] = static_cast<T>((row[d] - radial * x.row(i)[d]) * inverse);
      }
    });
  }

  // The sum of the derivatives by the squared distance of a close pair.
  double close_weight(const Pair& pair, const Close& close, const std::vector<double>& r) const {
    const auto [i, j, d] = close;
    const int64_t at[] = {pair.i0 + i, pair.j0 + j};
    const double k_s = pair.s.row(i)[j], k_t = pair.t.row(i)[j];
    double g = 0;
    for (const int64_t n : at) {
      const double p = k_s / student.z[n], q = k_t / teacher.z[n];
      g += ((divergence == Divergence::kKl
                 ? slope<Divergence::kKl, double, double, int64_t>(p, q)
                 : slope<Divergence::kJeffreys, double, double, int64_t>(p, q)) -
            r[n]) /
           student.z[n];
    }
    return g * student_t_slope(k_s, d);
  }

  // The difference of close rows would be lost in weight_i x_i - sum_j w_ij x_j.
  void add_close(const Pair& pair, const Close& close, double weight, Matrix<T> gradient) const {
    const auto x = matrix<const T>(student.source);
    const int64_t i = pair.i0 + close.i, j = pair.j0 + close.j;
    kernels.subtract_difference(weight, x.row(i), x.row(j), gradient.row(i), x.cols);
    if (pair.diagonal) return;  // where (j, i) comes too
    kernels.subtract_difference(weight, x.row(j), x.row(i), gradient.row(j), x.cols);
  }

  void student_t_gradient(const std::vector<double>& r, Matrix<T> gradient) {
    const std::vector<T> narrow(r.begin(), r.end());
    std::vector<double> weight(B);  // sum_j w_ij
    each_tile(4.0 * gradient.cols, true, [&](const Pair& pair) {
      std::vector<double> of_close;
      for (const Close& close : pair.close) of_close.push_back(close_weight(pair, close, r));
      add(pair, weight, [&](double* rows, T* cols) {
        kernels.weights(pair.s, pair.t, &pair.distance, stretch(pair.i0, narrow.data()),
                        stretch(pair.j0, narrow.data()), divergence, rows, cols);
      });
      add_product(pair, gradient);
      for (size_t c = 0; c < pair.close.size(); ++c) {
        add_close(pair, pair.close[c], of_close[c], gradient);
      }
    });
    const auto x = student.view();
    parallel_each(B, 4.0 * x.cols, [&](int64_t i) {
      T* row = gradient.row(i);
      for (int64_t d = 0; d < x.cols; ++d) {
        row[d] = static_cast<T>(2 * (weight[i] * x.row(i)[d] - row[d]));
      }
    });
  }
};

template <typename T>
std::tuple<Tensor, Tensor> fwd(const Tensor& student, const Tensor& teacher, Kernel kernel,
                               Divergence divergence, bool need_student) {
  Sweep<T> sweep(student, teacher, kernel, divergence);
  const int64_t B = student.size(0), D = student.size(1);
  const Tensor value = empty({}, scalar_type_of<T>);
  const Tensor dstudent =
      need_student ? empty({B, D}, scalar_type_of<T>) : empty({0}, scalar_type_of<T>);
  const auto gradient =
      Matrix<T>::contiguous(static_cast<T*>(dstudent.mutable_data_ptr()), need_student ? B : 0, D);
  std::vector<double> r(B);  // sum_j P_ij slope_ij
  const bool cosine = kernel == Kernel::kCosine;
  if (!cosine) sweep.sum_similarities();
  const double loss = sweep.loss(r, cosine && need_student ? &gradient : nullptr);
  *static_cast<T*>(value.mutable_data_ptr()) = static_cast<T>(loss);
  if (need_student) {
    cosine ? sweep.finish_cosine(r, gradient) : sweep.student_t_gradient(r, gradient);
  }
  return {value, dstudent};
}

std::tuple<Tensor, Tensor> pkt_fwd(Tensor student, Tensor teacher, std::string kernel,
                                   std::string divergence, bool need_student) {
  const auto run = student.scalar_type() == ScalarType::Double ? fwd<double> : fwd<float>;
  return run(student, teacher, by_name(kKernels, kernel), by_name(kDivergences, divergence),
             need_student);
}

}  // namespace
}  // namespace kdk::pkt

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def(
      "pkt_fwd(Tensor student, Tensor teacher, str kernel, str divergence, bool need_student) -> "
      "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) { m.impl("pkt_fwd", TORCH_BOX(&kdk::pkt::pkt_fwd)); }
