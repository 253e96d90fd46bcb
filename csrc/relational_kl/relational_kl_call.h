// SPDX-License-Identifier: Apache-2.0
// The tensors of a call in the form that the CUDA kernels of relational_kl read.
#pragma once

#include <limits>

#include "../common/cuda/glue.h"
#include "relational_kl_arguments.h"
#include "relational_kl_cuda.h"

namespace kdk::relational_kl {

using namespace kdk::cuda;

inline Math math_of_keys(const Tensor& keys, bool ieee) {
  // the softmaxes' difference over norms of keys could leave the range of fp16
  return keys.scalar_type() == ScalarType::Half ? Math::kTf32x3 : math_of(keys, ieee);
}

template <typename T>
const T* data_or_null(const Optional& x) {
  return x ? data_of<const T>(*x) : nullptr;
}

// Returns how many tiles of keys a block has. Blocks run in waves, and a wave takes as long as the
// tiles of a block and the filling of its pipeline, which takes about as long as one more tile.
inline int tiles_of_block(int64_t row_tiles, int64_t key_tiles) {
  constexpr int64_t kMost = 64, kGrid = 65535;  // blocks along the axis of keys
  const int64_t at_once = 2 * processors(), fewest = ceil_div(key_tiles, kGrid);
  int64_t best = fewest, least = std::numeric_limits<int64_t>::max();
  for (int64_t tiles = fewest; tiles <= std::max(fewest, std::min(key_tiles, kMost)); ++tiles) {
    const int64_t waves = ceil_div(row_tiles * ceil_div(key_tiles, tiles), at_once);
    const int64_t time = waves * (tiles + 1);
    if (time > least) continue;
    best = tiles;
    least = time;
  }
  return static_cast<int>(best);
}

// The rows and keys of a call as they are given, and what is known about rows.
class Given {
 public:
  Given(const Arguments& given, const Tensor& numbers, const Tensor& key_scales)
      : dtype(given.student.scalar_type()),
        numbers_(numbers),
        key_scales_(key_scales),
        rows_{with_contiguous_rows(given.student), with_rows(given.teacher),
              with_rows(given.own_keys), with_contiguous_rows(given.keys),
              with_rows(given.teacher_keys)},
        factors_{contiguous(given.student_factor), contiguous(given.teacher_factor)},
        normalize(given.normalize),
        subtract_entropy(given.subtract_entropy),
        B(given.student.size(0)),
        K(given.keys.size(0)) {}

  Source rows(int which) const { return rows_[which] ? source_of(*rows_[which]) : Source{}; }
  float* known(int place) const { return data_of<float>(numbers_) + place * B; }
  const float* factor(int side) const { return data_or_null<float>(factors_[side]); }
  // Returns the scales of a bank, or null.
  float* key_scales(int bank) const {
    return normalize ? data_of<float>(key_scales_) + bank * K : nullptr;
  }

  void find_scales(const Device& device, const ForwardArguments& with) const {
    ScalesParams params{};
    params.x[0] = rows(kStudent);
    params.x[1] = rows(kTeacher);
    params.own = rows(kOwnKeys);
    params.keys[0] = rows(kKeys);
    params.keys[1] = rows(kTeacherKeys);
    params.banks = !normalize ? 0 : rows_[kTeacherKeys] ? 2 : 1;
    params.normalize = normalize;
    params.temperature[0] = with.student_temperature;
    params.temperature[1] = with.teacher_temperature;
    params.factor[0] = factor(0);
    params.factor[1] = factor(1);
    params.numbers = known(0);
    params.key_scales = key_scales(0);
    params.B = B;
    params.K = K;
    launch_relational_kl_scales(params, stored_as(dtype), device.stream());
  }

  enum : int { kStudent, kTeacher, kOwnKeys, kKeys, kTeacherKeys };

  const ScalarType dtype;

 private:
  static Optional with_rows(const Optional& x) {
    return x ? Optional(with_contiguous_rows(*x)) : std::nullopt;
  }

  Tensor numbers_, key_scales_;
  Optional rows_[5], factors_[2];

 public:
  const bool normalize, subtract_entropy;
  const int64_t B, K;
};

// The tensors of a call in the form that sweeps read, with the rows of both sides as one operand.
class Call {
 public:
  Call(const Device& device, const Arguments& given, const Given& known, bool ieee)
      : math(math_of_keys(given.keys, ieee)),
        B(known.B),
        K(known.K),
        teacher(given.teacher.has_value()),
        two_banks(given.teacher_keys.has_value()),
        keys_(with_contiguous_rows(in_dtype(given.keys, dtype_of(math)))),
        teacher_keys_(two_banks
                          ? with_contiguous_rows(in_dtype(*given.teacher_keys, dtype_of(math)))
                          : keys_),
        positives_(contiguous(given.positives)),
        exclude_(contiguous(given.exclude)),
        num_keys_(given.num_keys) {
    const int step = kStepBytes / static_cast<int>(element_bytes(math));
    const auto steps = [&](const Tensor& bank) {
      return static_cast<int>(std::max<int64_t>(ceil_div(bank.size(1), step), 1));
    };
    Operand& operand = all.operand;
    operand.steps[0] = steps(keys_);
    operand.steps[1] = two_banks ? steps(teacher_keys_) : 0;
    operand.width = (operand.steps[0] + operand.steps[1]) * step;
    operand.rows = rows_of_queries(B);
    rows_.emplace(device.empty({operand.rows, pieces_of(math), operand.width}, dtype_of(math)));
    operand.data = rows_->mutable_data_ptr();
    launch_relational_kl_prepare({{known.rows(Given::kStudent), known.rows(Given::kTeacher)},
                                  stored_as(known.dtype),
                                  {known.known(kStudentScale), known.known(kTeacherScale)},
                                  operand,
                                  teacher},
                                 math, device.stream());
    all.keys[0] = source_of(keys_);
    all.keys[1] = source_of(teacher_keys_);
    for (int side = 0; side < 2; ++side) all.scale[side] = known.key_scales(side && two_banks);
    all.B = B;
    all.K = all.all = K;
    all.num_keys = data_or_null<int64_t>(num_keys_);
    all.exclude = data_or_null<int64_t>(exclude_);
    all.positives = data_or_null<int64_t>(positives_);
    all.teacher = teacher;
    all.subtract_entropy = given.subtract_entropy;
  }

  // Returns how many rows of the operand hold so many queries.
  int64_t rows_of_queries(int64_t count) const {
    return round_up(teacher ? 2 * round_up(count, kGroup) : count, kTile);
  }

  // Returns a sweep of `count` queries from query `first` on, which begins a tile, against all
  // keys.
  SweepParams queries(int64_t first, int64_t count) const {
    SweepParams part = all;
    part.operand.data = data_of<char>(*rows_) + (teacher ? 2 : 1) * first * pieces_of(math) *
                                                    all.operand.width * rows_->element_size();
    part.operand.rows = rows_of_queries(count);
    part.B = count;
    if (part.exclude) part.exclude += first;
    if (part.positives) part.positives += first;
    part.tiles = tiles_of_block(part.operand.rows / kTile, ceil_div(K, kTile));
    return part;
  }

  // Returns a sweep of all queries against `count` keys from key `first` on.
  SweepParams keys(int64_t first, int64_t count) const {
    SweepParams part = all;
    for (int side = 0; side < 2; ++side) {
      part.keys[side] = rows_of(all.keys[side], first, count, math);
      if (part.scale[side]) part.scale[side] += first;
    }
    part.K = count;
    part.first = first;
    part.tiles = tiles_of_block(part.operand.rows / kTile, ceil_div(count, kTile));
    return part;
  }

  // Returns D columns of the rows that a bank meets, as operand b of a product over these rows.
  Source rows_meeting(int bank, int64_t D) const {
    Source source = source_of(*rows_);
    source.data = data_of<char>(*rows_) + (bank == 0 ? 0 : all.operand.steps[0] * kStepBytes);
    source.rows = all.operand.rows;
    source.cols = D;
    source.stride = pieces_of(math) * all.operand.width;
    source.group = 0;
    return source;
  }

  const Math math;
  const int64_t B, K;
  const bool teacher, two_banks;
  SweepParams all{};

 private:
  Tensor keys_, teacher_keys_;
  Optional positives_, exclude_, num_keys_;
  Optional rows_;
};

}  // namespace kdk::relational_kl
