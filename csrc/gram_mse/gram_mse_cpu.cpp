// SPDX-License-Identifier: Apache-2.0
// CPU operators kdkernels_C::gram_mse_{fwd,bwd}. Arguments were checked by the public function.
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/parallel.h"
#include "../common/rows_simd.h"
#include "gram_mse_cpu.h"
#include "gram_mse_names.h"
#include "gram_mse_simd.h"

namespace kdk::gram_mse {
namespace {

Options parse(const std::string& normalize, const std::string& kernel, double gamma, int64_t order,
              const std::string& algorithm) {
  return {by_name(kNormalizations, normalize), by_name(kTaylorKernels, kernel), gamma,
          static_cast<int>(order), by_name(kAlgorithms, algorithm)};
}

// Whether the algorithm reads unit rows. Where factors are wider than features, it reads the
// features and divides by their norms while it widens them.
template <typename T, typename F>
bool reads_unit_rows(const Options& options) {
  return options.normalize == Normalize::kFeature && std::is_same_v<T, F>;
}

// Returns features as the algorithms read them: rows that BLAS takes, or unit rows.
template <typename T>
Tensor prepare(const Tensor& x, bool unit_rows) {
  const Tensor from = groups_for_blas<T>(x);
  if (!unit_rows) return from;
  const int64_t B = x.size(1), D = x.size(2);
  const Tensor unit = empty({x.size(0), B, D}, scalar_type_of<T>);
  const Scratch<double> wide(thread_slots() * D);
  parallel_each(x.size(0) * B, 2.0 * D, [&](int64_t i) {
    // In fp64 until the end: a rounded norm would be common to a row of the Gram, and as the
    // student approaches the teacher that is no longer small beside their difference.
    double* row = wide.data() + thread_index() * D;
    rows::loops<T>().widen(group<const T>(from, i / B).row(i % B), 1, row, D);
    rows::loops<double>().normalize(row, row, D);
    rows::loops<T>().narrow(row, group<T>(unit, i / B).row(i % B), D);
  });
  return unit;
}

template <typename T, typename F = T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fwd(const Tensor& student, const Tensor& teacher,
                                                       const Options& options) {
  const int64_t G = student.size(0), B = student.size(1), D_s = student.size(2),
                D_t = teacher.size(2);
  const bool factored = options.algorithm == Algorithm::kFactored,
             streamed = options.algorithm == Algorithm::kStreamed;
  const int64_t n_s = factored ? D_s : streamed ? 0 : B, n_t = factored ? D_t : streamed ? 0 : B;
  constexpr ScalarType type = scalar_type_of<F>;
  const Tensor loss = empty({G}, scalar_type_of<T>),
               coef = empty({G, kCoefs, B}, ScalarType::Double);
  const Tensor gram_s = empty({G, n_s, n_s}, type), gram_t = empty({G, n_t, n_t}, type);
  const Tensor cross = empty({G, factored ? D_t : 0, factored ? D_s : 0}, type);
  const bool unit_rows = reads_unit_rows<T, F>(options);
  const Tensor s = prepare<T>(student, unit_rows), t = prepare<T>(teacher, unit_rows);
  parallel_each(G, 2.0 * B * B * (D_s + D_t), [&](int64_t g) {
    T* value = static_cast<T*>(loss.mutable_data_ptr()) + g;
    const Forward<T, F> call = {group<T>(s, g),         group<T>(t, g),      value,
                                group<double>(coef, g), group<F>(gram_s, g), group<F>(gram_t, g),
                                group<F>(cross, g)};
    if constexpr (std::is_same_v<T, F>) {
      if (!factored) return tiled_forward<T>(call, options);
    }
    factored_forward<T, F>(call, options);
  });
  return {loss, coef, gram_s, gram_t, cross};
}

// Factors of 16-bit features are fp32, as the features are once converted.
bool has_wide_factors(const Tensor& features, const Options& options) {
  return options.algorithm == Algorithm::kFactored && features.scalar_type() == ScalarType::Float;
}

template <typename T>
struct Side {
  Tensor source;  // as the caller gave it
  Tensor x;       // prepared
  Tensor gram;
  int64_t b, c;  // rows of coef
};

template <typename T, typename F>
Tensor gradient(const Side<T>& side, const Side<T>& other, const Tensor& coef, const Tensor& cross,
                bool transposed, const Tensor& dout, const Options& options) {
  const int64_t G = side.x.size(0), B = side.x.size(1), D = side.x.size(2);
  const Tensor result = empty({G, B, D}, scalar_type_of<T>);
  const T* scale = static_cast<const T*>(dout.const_data_ptr());
  const auto& loops = rows::loops<T>();
  const bool unit = reads_unit_rows<T, F>(options);
  const Tensor source = unit ? groups_for_blas<T>(side.source) : side.x;
  parallel_each(G, 2.0 * B * B * (D + other.x.size(2)), [&](int64_t g) {
    const Matrix<const double> rows = group<double>(coef, g);
    const Matrix<const F> m = group<F>(cross, g);
    const Matrix<T> dx = group<T>(result, g);
    const T factor = scale[g * dout.stride(0)];
    // dout goes into the coefficients, which spares a pass over the gradient
    std::vector<double> scaled(4 * B);
    const int64_t which[] = {0, side.b, side.c, other.b};
    for (int k = 0; k < 4; ++k) {
      for (int64_t i = 0; i < B; ++i) scaled[k * B + i] = rows.row(which[k])[i] * factor;
    }
    const double* a = scaled.data();
    const Backward<T, F> call = {group<T>(side.x, g),
                                 group<T>(other.x, g),
                                 group<F>(side.gram, g),
                                 group<F>(other.gram, g),
                                 transposed ? m.t() : m,
                                 a,
                                 a + B,
                                 a + 2 * B,
                                 a + 3 * B,
                                 factor,
                                 dx};
    if constexpr (std::is_same_v<T, F>) {
      if (options.algorithm != Algorithm::kFactored) tiled_backward<T>(call, options);
    }
    if (options.algorithm == Algorithm::kFactored) factored_backward<T, F>(call, options);
    if (!unit) return;
    const Matrix<const T> x = group<T>(source, g);
    parallel_each(B, 8.0 * D, [&](int64_t i) { loops.normalize_backward(x.row(i), dx.row(i), D); });
  });
  return in_dtype(result, side.source.scalar_type());
}

template <typename T, typename F = T>
std::tuple<Tensor, Tensor> bwd(const Tensor& dout, const Tensor& student, const Tensor& teacher,
                               const Tensor& coef, const Tensor& gram_student,
                               const Tensor& gram_teacher, const Tensor& cross, bool need_student,
                               bool need_teacher, const Options& options) {
  const bool unit_rows = reads_unit_rows<T, F>(options);
  const Side<T> s{student, prepare<T>(student, unit_rows), gram_student, 1, 3};
  const Side<T> t{teacher, prepare<T>(teacher, unit_rows), gram_teacher, 2, 4};
  return {need_student ? gradient<T, F>(s, t, coef, cross, false, dout, options)
                       : empty({0}, student.scalar_type()),
          need_teacher ? gradient<T, F>(t, s, coef, cross, true, dout, options)
                       : empty({0}, teacher.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gram_mse_fwd(Tensor student, Tensor teacher,
                                                                std::string normalize,
                                                                std::string kernel, double gamma,
                                                                int64_t order,
                                                                std::string algorithm) {
  const Options options = parse(normalize, kernel, gamma, order, algorithm);
  const auto run = student.scalar_type() == ScalarType::Double ? fwd<double>
                   : has_wide_factors(student, options)        ? fwd<float, double>
                                                               : fwd<float>;
  return run(student, teacher, options);
}

std::tuple<Tensor, Tensor> gram_mse_bwd(Tensor dout, Tensor student, Tensor teacher, Tensor coef,
                                        Tensor gram_student, Tensor gram_teacher, Tensor cross,
                                        bool need_student, bool need_teacher, std::string normalize,
                                        std::string kernel, double gamma, int64_t order,
                                        std::string algorithm) {
  const Options options = parse(normalize, kernel, gamma, order, algorithm);
  const auto run = student.scalar_type() == ScalarType::Double ? bwd<double>
                   : has_wide_factors(student, options)        ? bwd<float, double>
                                                               : bwd<float>;
  return run(dout, student, teacher, coef, gram_student, gram_teacher, cross, need_student,
             need_teacher, options);
}

}  // namespace
}  // namespace kdk::gram_mse

STABLE_TORCH_LIBRARY_FRAGMENT(kdkernels_C, m) {
  m.def(
      "gram_mse_fwd(Tensor student, Tensor teacher, str normalize, str kernel, float gamma, int "
      "order, "
      "str algorithm) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gram_mse_bwd(Tensor dout, Tensor student, Tensor teacher, Tensor coef, Tensor gram_student, "
      "Tensor gram_teacher, Tensor cross, bool need_student, bool need_teacher, str normalize, str "
      "kernel, "
      "float gamma, int order, str algorithm) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_C, CPU, m) {
  m.impl("gram_mse_fwd", TORCH_BOX(&kdk::gram_mse::gram_mse_fwd));
  m.impl("gram_mse_bwd", TORCH_BOX(&kdk::gram_mse::gram_mse_bwd));
}
