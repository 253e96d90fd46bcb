// SPDX-License-Identifier: Apache-2.0
#include "gemm.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <algorithm>

#include "integers.h"
#include "parallel.h"
#include "syrk_simd.h"

namespace kdk {
namespace {

constexpr int64_t kBlock = 256;      // output block: with its operands it stays in a core's L2
constexpr int64_t kSyrkBlock = 512;  // largest block on a diagonal that syrk computes in one go
constexpr int64_t kMinDepth = 1024;  // shortest piece of a contraction worth a task of its own
constexpr int64_t kTasks = 32;       // pieces that a small output is cut into, for cores to share

struct Task {
  size_t job;
  int64_t row0, rows, col0, cols, k0, depth;
  int64_t partial;  // offset into the scratch, or -1: straight into the output
  bool upper;       // only the upper triangle of the block is computed
};

}  // namespace

template <typename T>
void gemm(Matrix<const T> a, Matrix<const T> b, Matrix<T> c, int beta) {
  const View va(a), vb(b), vc(c);
  if (beta == 0) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(vc.get(), va.get(), vb.get()));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(vc.get(), vc.get(), va.get(), vb.get(), 1, 1));
  }
}

template <typename T>
void grams(const std::vector<Gram<T>>& jobs) {
  std::vector<Task> tasks;
  int64_t scratch = 0, packed = 0;
  double ops = 0;
  for (size_t j = 0; j < jobs.size(); ++j) {
    const auto& [x, y, out, symmetric] = jobs[j];
    // Without wide vectors, BLAS (which chooses its own) is faster at the whole square than syrk at
    // half of it.
    const bool by_syrk = symmetric && x.data == y.data &&
                         (x.row_stride == 1 || x.col_stride == 1) &&
                         simd_level() != SimdLevel::kBaseline;
    const int64_t block = by_syrk && x.rows <= kSyrkBlock ? kSyrkBlock : kBlock;
    const int64_t n_rows = ceil_div(x.rows, block), n_cols = ceil_div(y.rows, block);
    const int64_t blocks =
        std::max<int64_t>(1, symmetric ? n_rows * (n_rows + 1) / 2 : n_rows * n_cols);
    const int64_t pieces = std::clamp<int64_t>(x.cols / kMinDepth, 1, ceil_div(kTasks, blocks));
    const int64_t depth = std::max<int64_t>(1, ceil_div(x.cols, pieces));
    for (int64_t row0 = 0; row0 < x.rows; row0 += block) {
      for (int64_t col0 = symmetric ? row0 : 0; col0 < y.rows; col0 += block) {
        const int64_t rows = std::min(block, x.rows - row0), cols = std::min(block, y.rows - col0);
        const bool upper = by_syrk && row0 == col0;
        int64_t k0 = 0;
        do {
          const int64_t piece = std::min(depth, x.cols - k0);
          tasks.push_back(
              {j, row0, rows, col0, cols, k0, piece, pieces == 1 ? -1 : scratch, upper});
          if (pieces > 1) scratch += rows * cols;
          if (upper) packed = std::max(packed, syrk_scratch(rows));
          ops = std::max(ops, 2.0 * rows * cols * piece);
          k0 += depth;
        } while (k0 < x.cols);
      }
    }
  }
  const Scratch<T> partials(scratch), panels(thread_slots() * packed);
  parallel_each(static_cast<int64_t>(tasks.size()), ops, [&](int64_t i) {
    const Task& task = tasks[i];
    const Gram<T>& job = jobs[task.job];
    const Matrix<T> out =
        task.partial < 0
            ? job.out.block(task.row0, task.rows, task.col0, task.cols)
            : Matrix<T>::contiguous(partials.data() + task.partial, task.rows, task.cols);
    const auto x = job.x.block(task.row0, task.rows, task.k0, task.depth);
    if (task.upper) {
      syrk<T>(x, panels.data() + thread_index() * packed, out);
    } else {
      gemm<T>(x, job.y.block(task.col0, task.cols, task.k0, task.depth).t(), out);
    }
  });
  // Adds up the pieces of each block, in order, and mirrors what a symmetric product left out.
  for (size_t first = 0, end; first < tasks.size(); first = end) {
    end = first + 1;
    while (end < tasks.size() && tasks[end].k0 > 0) ++end;
    const Task& task = tasks[first];
    const Gram<T>& job = jobs[task.job];
    const bool mirror = task.upper || (job.symmetric && task.row0 != task.col0);
    if (task.partial < 0 && !mirror) continue;
    const Matrix<T> out = job.out.block(task.row0, task.rows, task.col0, task.cols);
    const Matrix<T> across = job.out.block(task.col0, task.cols, task.row0, task.rows);
    parallel_each(task.rows, 2.0 * task.cols * (end - first), [&](int64_t r) {
      T* to = out.row(r);
      const int64_t c0 = task.upper ? r : 0;
      for (size_t p = first; task.partial >= 0 && p < end; ++p) {
        const T* from = partials.data() + tasks[p].partial + r * task.cols;
        for (int64_t c = c0; c < task.cols; ++c) to[c] = p == first ? from[c] : to[c] + from[c];
      }
      for (int64_t c = c0; mirror && c < task.cols; ++c) across.row(c)[r] = to[c];
    });
  }
}

template void gemm<float>(Matrix<const float>, Matrix<const float>, Matrix<float>, int);
template void gemm<double>(Matrix<const double>, Matrix<const double>, Matrix<double>, int);
template void grams<float>(const std::vector<Gram<float>>&);
template void grams<double>(const std::vector<Gram<double>>&);

}  // namespace kdk
