// SPDX-License-Identifier: Apache-2.0
// What the operators of relational_kl take on every device.
#pragma once

#include "../common/stable.h"

namespace kdk::relational_kl {

// Arguments that the forward and the backward share.
struct Arguments {
  const Tensor& student;
  const Optional& teacher;
  const Tensor& keys;
  const Optional &teacher_keys, &key_scale, &teacher_key_scale, &positives, &exclude, &num_keys;
  bool subtract_entropy;
};

}  // namespace kdk::relational_kl
