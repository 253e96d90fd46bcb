// SPDX-License-Identifier: Apache-2.0
// The arguments that the forward and the backward operator of relational_kl share, on every device.
#pragma once

#include <string>
#include <tuple>

#include "../common/stable.h"
#include "relational_kl_numbers.h"

namespace kdk::relational_kl {

// One list: by name, by type, and as schemas have it. Everything else passes it on whole.
struct Arguments {
  Tensor student;
  Optional teacher;
  Tensor keys;
  Optional teacher_keys, own_keys, positives, exclude, num_keys, student_factor, teacher_factor;
  bool normalize, subtract_entropy;
};

template <typename... Ts>
struct Types {};
using ArgumentTypes = Types<Tensor, Optional, Tensor, Optional, Optional, Optional, Optional,
                            Optional, Optional, Optional, bool, bool>;

inline const std::string kArguments =
    "Tensor student, Tensor? teacher, Tensor keys, Tensor? teacher_keys, Tensor? own_keys, "
    "Tensor? positives, Tensor? exclude, Tensor? num_keys, Tensor? student_factor, "
    "Tensor? teacher_factor, bool normalize, bool subtract_entropy";

// Schemas of both operators; a device may take `more` arguments.
inline std::string fwd_schema(const std::string& more = "") {
  return "relational_kl_fwd(" + kArguments +
         ", float student_temperature, float teacher_temperature, bool need_student" + more +
         ") -> (Tensor, Tensor, Tensor, Tensor)";
}

inline std::string bwd_schema(const std::string& more = "") {
  return "relational_kl_bwd(Tensor dout, " + kArguments +
         ", Tensor loss, Tensor dloss, Tensor numbers, Tensor key_scales, bool need_student, "
         "bool need_teacher, bool need_keys, bool need_teacher_keys, bool need_own_keys, "
         "bool need_student_factor, bool need_teacher_factor" +
         more + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using BackwardResults = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The arguments of the forward alone.
struct ForwardArguments {
  double student_temperature, teacher_temperature;
  bool need_student;
};

// The arguments of the backward alone: what it reads besides, and which gradients it is asked for.
struct BackwardArguments {
  Tensor dout, loss, dloss, numbers, key_scales;
  bool need_student, need_teacher, need_keys, need_teacher_keys, need_own_keys, need_student_factor,
      need_teacher_factor;
};

}  // namespace kdk::relational_kl
