// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "../common/parallel.h"
#include "../common/rows_simd.h"
#include "../pairs/centre.h"
#include "pairwise_cpu.h"

namespace kdk::pairwise {
namespace {

int64_t size_of(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

// How many bits finer the point subtracted is: what it then leaves of a mean adds less than 2% to
// the squared norms.
constexpr int kFinerBits = 4;

template <typename T>
void subtract(Rows<T>& rows, const std::vector<T>& point) {
  const int64_t n = rows.given.rows, D = rows.given.cols;
  rows.memory = Scratch<T>(n * D);
  rows.x = Matrix<const T>::contiguous(rows.memory.data(), n, D);
  parallel_each(n, 3.0 * D, [&](int64_t i) {
    T* to = rows.memory.data() + i * D;
    std::copy_n(rows.given.row(i), D, to);
    if (std::isnan(rows.norm[i])) return;
    rows::loops<T>().subtract(to, point.data(), D);
    rows.norm[i] = static_cast<T>(rows::loops<T>().dot(to, to, D));
  });
}

template <typename T>
Rows<T> make_rows(Matrix<const T> given, Metric metric) {
  const int64_t n = given.rows, D = given.cols;
  Rows<T> rows{given, Scratch<T>(metric == Metric::kCosine ? n * D : 0), given, {}};
  if (metric == Metric::kCosine) {
    rows.x = Matrix<const T>::contiguous(rows.memory.data(), n, D);
    parallel_each(n, 3.0 * D, [&](int64_t i) {
      rows::loops<T>().normalize(given.row(i), rows.memory.data() + i * D, D);
    });
  } else if (is_distance(metric)) {
    rows.norm.resize(n);
    parallel_each(n, 2.0 * D,
                  [&](int64_t i) { rows.norm[i] = pairs::norm_or_nan<T>(given.row(i), D); });
  }
  return rows;
}

}  // namespace

Plane::Plane(const Tensor& x, int64_t g)
    : type_(x.scalar_type()),
      rows_(x.size(x.dim() - 2)),
      cols_(x.size(x.dim() - 1)),
      row_stride_(x.stride(x.dim() - 2)),
      col_stride_(x.stride(x.dim() - 1)) {
  const int64_t offset = x.dim() == 3 ? g * x.stride(0) * size_of(type_) : 0;
  data_ = static_cast<char*>(const_cast<void*>(x.const_data_ptr())) + offset;
}

View Plane::block(int64_t row0, int64_t rows, int64_t col0, int64_t cols) const {
  const int64_t offset = (row0 * row_stride_ + col0 * col_stride_) * size_of(type_);
  const Matrix<char> form{static_cast<char*>(data_) + offset, rows, cols, row_stride_, col_stride_};
  return View(form.data, form, shim_dtype(type_));
}

template <typename T>
void Plane::read(int64_t row0, int64_t col0, Matrix<T> to) const {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_copy_(View(to).get(), block(row0, to.rows, col0, to.cols).get(), 0));
}

template <typename T>
void Plane::write(int64_t row0, int64_t col0, Matrix<const T> from) const {
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_copy_(block(row0, from.rows, col0, from.cols).get(), View(from).get(), 0));
}

template <typename T>
Pair<T>::Pair(Matrix<const T> x_given, std::optional<Matrix<const T>> y_given, Metric metric_)
    : x(make_rows<T>(x_given, metric_)), metric(metric_) {
  if (y_given) y = make_rows<T>(*y_given, metric);
  if (!is_distance(metric)) return;
  const std::vector<T> centre =
      pairs::centre_of<T>(other().given, other().norm, x.norm, kFinerBits);
  if (centre.empty()) return;
  subtract(x, centre);
  if (y) subtract(*y, centre);
}

template void Plane::read<float>(int64_t, int64_t, Matrix<float>) const;
template void Plane::read<double>(int64_t, int64_t, Matrix<double>) const;
template void Plane::write<float>(int64_t, int64_t, Matrix<const float>) const;
template void Plane::write<double>(int64_t, int64_t, Matrix<const double>) const;
template struct Pair<float>;
template struct Pair<double>;

}  // namespace kdk::pairwise
