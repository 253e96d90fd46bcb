// SPDX-License-Identifier: Apache-2.0
#include "gemm.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "parallel.h"

namespace kdk {
namespace {

// Owns a tensor handle over memory that somebody else owns.
class View {
 public:
  template <typename T>
  explicit View(const Matrix<T>& m) {
    const int64_t sizes[] = {m.rows, m.cols}, strides[] = {m.row_stride, m.col_stride};
    const int32_t dtype =
        sizeof(T) == sizeof(float) ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64();
    using Plain = std::remove_const_t<T>;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_create_tensor_from_blob(const_cast<Plain*>(m.data), 2, sizes, strides, 0, dtype,
                                           aoti_torch_device_type_cpu(), 0, &handle_));
  }
  ~View() { aoti_torch_delete_tensor_object(handle_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  AtenTensorHandle get() const { return handle_; }

 private:
  AtenTensorHandle handle_ = nullptr;
};

constexpr int64_t kBlock = 256;      // output block: with its operands it stays in a core's L2
constexpr int64_t kMinDepth = 1024;  // shortest piece of a contraction worth a task of its own
constexpr int64_t kTasks = 32;       // pieces that a small output is cut into, for cores to share

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Task {
  size_t job;
  int64_t row0, rows, col0, cols, k0, depth;
  int64_t partial;  // offset into the scratch, or -1: straight into the output
};

}  // namespace

template <typename T>
void gemm(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int beta) {
  const View va(a), vb(b), vc(c);
  if (beta == 0) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(vc.get(), va.get(), vb.get()));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(vc.get(), vc.get(), va.get(), vb.get(), 1, 1));
  }
}

template <typename T>
void grams(const std::vector<Gram<T>>& jobs, const Tensor& like) {
  std::vector<Task> tasks;
  int64_t scratch = 0;
  double ops = 0;
  for (size_t j = 0; j < jobs.size(); ++j) {
    const auto& [x, y, out, symmetric] = jobs[j];
    const int64_t n_rows = ceil_div(x.rows, kBlock), n_cols = ceil_div(y.rows, kBlock);
    const int64_t blocks = symmetric ? n_rows * (n_rows + 1) / 2 : n_rows * n_cols;
    const int64_t pieces =
        std::clamp<int64_t>(x.cols / kMinDepth, 1, ceil_div(kTasks, std::max<int64_t>(blocks, 1)));
    const int64_t depth = ceil_div(x.cols, pieces);
    for (int64_t bi = 0; bi < n_rows; ++bi) {
      for (int64_t bj = symmetric ? bi : 0; bj < n_cols; ++bj) {
        const int64_t row0 = bi * kBlock, col0 = bj * kBlock;
        const int64_t rows = std::min(kBlock, x.rows - row0),
                      cols = std::min(kBlock, y.rows - col0);
        for (int64_t k0 = 0; k0 < x.cols || k0 == 0; k0 += depth) {
          const int64_t piece = std::min(depth, x.cols - k0);
          tasks.push_back({j, row0, rows, col0, cols, k0, piece, pieces == 1 ? -1 : scratch});
          if (pieces > 1) scratch += rows * cols;
          ops = std::max(ops, 2.0 * rows * cols * piece);
          if (depth == 0) break;
        }
      }
    }
  }
  const Scratch<T> partials(like, scratch);
  parallel_each(static_cast<int64_t>(tasks.size()), ops, [&](int64_t i) {
    const Task& task = tasks[i];
    const Gram<T>& job = jobs[task.job];
    Matrix<T> out = task.partial < 0 ? job.out.block(task.row0, task.rows, task.col0, task.cols)
                                     : Matrix<T>::contiguous(partials.data() + task.partial,
                                                             task.rows, task.cols);
    gemm<T>(job.x.block(task.row0, task.rows, task.k0, task.depth),
            job.y.block(task.col0, task.cols, task.k0, task.depth).t(), out);
  });
  // Adds up the pieces of each block, in order, and mirrors the blocks above a diagonal.
  for (size_t first = 0; first < tasks.size();) {
    const Task& task = tasks[first];
    const Gram<T>& job = jobs[task.job];
    size_t end = first + 1;
    while (end < tasks.size() && tasks[end].k0 > 0) ++end;
    const bool mirror = job.symmetric && task.row0 != task.col0;
    if (task.partial >= 0 || mirror) {
      const Matrix<T> out = job.out.block(task.row0, task.rows, task.col0, task.cols);
      const Matrix<T> across = job.out.block(task.col0, task.cols, task.row0, task.rows);
      parallel_each(task.rows, 2.0 * task.cols * (end - first), [&](int64_t r) {
        T* to = out.row(r);
        if (task.partial >= 0) {
          std::copy_n(partials.data() + task.partial + r * task.cols, task.cols, to);
          for (size_t p = first + 1; p < end; ++p) {
            const T* from = partials.data() + tasks[p].partial + r * task.cols;
            for (int64_t c = 0; c < task.cols; ++c) to[c] += from[c];
          }
        }
        if (mirror) {
          for (int64_t c = 0; c < task.cols; ++c) across.row(c)[r] = to[c];
        }
      });
    }
    first = end;
  }
}

template void gemm<float>(Matrix<const float>, Matrix<const float>, Matrix<float>, int);
template void gemm<double>(Matrix<const double>, Matrix<const double>, Matrix<double>, int);
template void grams<float>(const std::vector<Gram<float>>&, const Tensor&);
template void grams<double>(const std::vector<Gram<double>>&, const Tensor&);

}  // namespace kdk
