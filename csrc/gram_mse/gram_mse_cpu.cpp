// SPDX-License-Identifier: Apache-2.0
// CPU operators kdkernels_C::gram_mse_{fwd,bwd}. Arguments were checked by the public function.
#include <string>
#include <tuple>
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

// Returns features as the algorithms read them: rows that BLAS takes, or unit rows if the Gram is
// made of unit rows.
template <typename T>
Tensor prepare(const Tensor& x, Normalize normalize) {
  const Tensor from = groups_for_blas<T>(x);
  if (normalize != Normalize::kFeature) return from;
  const int64_t B = x.size(1), D = x.size(2);
  const Tensor unit = empty({x.size(0), B, D}, scalar_type_of<T>);
  parallel_each(x.size(0) * B, 2.0 * D, [&](int64_t i) {
    const T* source = group<const T>(from, i / B).row(i % B);
    rows::loops<T>().normalize(source, group<T>(unit, i / B).row(i % B), D);
  });
  return unit;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fwd(const Tensor& student, const Tensor& teacher,
                                                       const Options& options) {
  const int64_t G = student.size(0), B = student.size(1), D_s = student.size(2),
                D_t = teacher.size(2);
  const bool factored = options.algorithm == Algorithm::kFactored,
             streamed = options.algorithm == Algorithm::kStreamed;
  const int64_t n_s = factored ? D_s : streamed ? 0 : B, n_t = factored ? D_t : streamed ? 0 : B;
  constexpr ScalarType type = scalar_type_of<T>;
  const Tensor loss = empty({G}, type), coef = empty({G, kCoefs, B}, ScalarType::Double);
  const Tensor gram_s = empty({G, n_s, n_s}, type), gram_t = empty({G, n_t, n_t}, type);
  const Tensor cross = empty({G, factored ? D_t : 0, factored ? D_s : 0}, type);
  const Tensor s = prepare<T>(student, options.normalize),
               t = prepare<T>(teacher, options.normalize);
  parallel_each(G, 2.0 * B * B * (D_s + D_t), [&](int64_t g) {
    T* value = static_cast<T*>(loss.mutable_data_ptr()) + g;
    forward<T>({group<T>(s, g), group<T>(t, g), value, group<double>(coef, g), group<T>(gram_s, g),
                group<T>(gram_t, g), group<T>(cross, g)},
               options);
  });
  return {loss, coef, gram_s, gram_t, cross};
}

template <typename T>
struct Side {
  Tensor source;  // as the caller gave it
  Tensor x;       // prepared
  Tensor gram;
  int64_t b, c;  // rows of coef
};

template <typename T>
Tensor gradient(const Side<T>& side, const Side<T>& other, const Tensor& coef, const Tensor& cross,
                bool transposed, const Tensor& dout, const Options& options) {
  const int64_t G = side.x.size(0), B = side.x.size(1), D = side.x.size(2);
  const Tensor result = empty({G, B, D}, scalar_type_of<T>);
  const T* scale = static_cast<const T*>(dout.const_data_ptr());
  const auto& loops = rows::loops<T>();
  const bool unit = options.normalize == Normalize::kFeature;
  const Tensor source = unit ? groups_for_blas<T>(side.source) : side.x;
  parallel_each(G, 2.0 * B * B * (D + other.x.size(2)), [&](int64_t g) {
    const Matrix<const double> rows = group<double>(coef, g);
    const Matrix<const T> m = group<T>(cross, g);
    const Matrix<T> dx = group<T>(result, g);
    const T factor = scale[g * dout.stride(0)];
    // dout goes into the coefficients, which spares a pass over the gradient
    std::vector<double> scaled(3 * B);
    const int64_t which[] = {0, side.b, side.c};
    for (int k = 0; k < 3; ++k) {
      for (int64_t i = 0; i < B; ++i) scaled[k * B + i] = rows.row(which[k])[i] * factor;
    }
    const double* a = scaled.data();
    backward<T>({group<T>(side.x, g), group<T>(other.x, g), group<T>(side.gram, g),
                 group<T>(other.gram, g), transposed ? m.t() : m, a, a + B, a + 2 * B, factor, dx},
                options);
    if (!unit) return;
    const Matrix<const T> x = group<T>(source, g);
    parallel_each(B, 8.0 * D, [&](int64_t i) { loops.normalize_backward(x.row(i), dx.row(i), D); });
  });
  return in_dtype(result, side.source.scalar_type());
}

template <typename T>
std::tuple<Tensor, Tensor> bwd(const Tensor& dout, const Tensor& student, const Tensor& teacher,
                               const Tensor& coef, const Tensor& gram_student,
                               const Tensor& gram_teacher, const Tensor& cross, bool need_student,
                               bool need_teacher, const Options& options) {
  const Side<T> s{student, prepare<T>(student, options.normalize), gram_student, 1, 3};
  const Side<T> t{teacher, prepare<T>(teacher, options.normalize), gram_teacher, 2, 4};
  return {need_student ? gradient<T>(s, t, coef, cross, false, dout, options)
                       : empty({0}, student.scalar_type()),
          need_teacher ? gradient<T>(t, s, coef, cross, true, dout, options)
                       : empty({0}, teacher.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gram_mse_fwd(Tensor student, Tensor teacher,
                                                                std::string normalize,
                                                                std::string kernel, double gamma,
                                                                int64_t order,
                                                                std::string algorithm) {
  const Options options = parse(normalize, kernel, gamma, order, algorithm);
  return student.scalar_type() == ScalarType::Double ? fwd<double>(student, teacher, options)
                                                     : fwd<float>(student, teacher, options);
}

std::tuple<Tensor, Tensor> gram_mse_bwd(Tensor dout, Tensor student, Tensor teacher, Tensor coef,
                                        Tensor gram_student, Tensor gram_teacher, Tensor cross,
                                        bool need_student, bool need_teacher, std::string normalize,
                                        std::string kernel, double gamma, int64_t order,
                                        std::string algorithm) {
  const Options options = parse(normalize, kernel, gamma, order, algorithm);
  const auto run = student.scalar_type() == ScalarType::Double ? bwd<double> : bwd<float>;
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
