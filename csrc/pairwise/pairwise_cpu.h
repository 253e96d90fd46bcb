// SPDX-License-Identifier: Apache-2.0
// pairwise sweeps over the tiles of one matrix of values, in fp32 or fp64.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "../common/stable.h"
#include "pairwise_math.h"

namespace kdk::pairwise {

// One matrix of a tensor, which is [N, M] or [G, N, M] and has any floating-point type and strides.
class Plane {
 public:
  Plane(const Tensor& x, int64_t g);

  // Whether the matrix is of type T. If so, it can be used where it lies; else its blocks are read
  // and written.
  template <typename T>
  bool is_of() const {
    return type_ == scalar_type_of<T>;
  }
  template <typename T>
  Matrix<T> of() const {
    return {static_cast<T*>(data_), rows_, cols_, row_stride_, col_stride_};
  }

  // Reads or writes the block at (row0, col0), and converts it on the way.
  template <typename T>
  void read(int64_t row0, int64_t col0, Matrix<T> to) const;
  template <typename T>
  void write(int64_t row0, int64_t col0, Matrix<const T> from) const;

 private:
  View block(int64_t row0, int64_t rows, int64_t col0, int64_t cols) const;

  void* data_;
  ScalarType type_;
  int64_t rows_, cols_, row_stride_, col_stride_;
};

// The rows of one side, as they are given and as products take them.
template <typename T>
struct Rows {
  Matrix<const T> given;  // [n, D], columns contiguous
  Scratch<T> memory;      // what x points into where it is not `given`
  Matrix<const T> x;      // [n, D]: unit rows (kCosine), less a point common to both sides
                          // (distances) or as given
  std::vector<T> norm;    // distances: squared, of x; NaN where the row is not finite
};

// The rows of both sides. `y` is empty in batch, where its rows would be those of `x`.
template <typename T>
struct Pair {
  Rows<T> x;
  std::optional<Rows<T>> y;
  Metric metric;

  Pair(Matrix<const T> x_given, std::optional<Matrix<const T>> y_given, Metric metric);
  bool in_batch() const { return !y; }
  const Rows<T>& other() const { return y ? *y : x; }
};

// Fills `out` with the values. In batch, one half of it is mirrored into the other.
template <typename T>
void forward(const Pair<T>& pair, double gamma, const Plane& out);

// Computes dx [N, D], and dy [M, D] where the sides differ. Either may be null where it is not
// needed. `out` is read for distances only.
template <typename T>
void backward(const Pair<T>& pair, double gamma, const Plane& dout, const Plane* out,
              const Matrix<T>* dx, const Matrix<T>* dy);

}  // namespace kdk::pairwise
