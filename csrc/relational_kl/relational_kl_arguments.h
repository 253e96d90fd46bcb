// SPDX-License-Identifier: Apache-2.0
// The arguments that the forward and the backward operator of relational_kl share, on every device.
#pragma once

#include <string>
#include <tuple>

#include "../common/stable.h"

namespace kdk::relational_kl {

// One list: by name, by type, and as schemas have it. Everything else passes it on whole.
struct Arguments {
  Tensor student;
  Optional teacher;
  Tensor keys;
  Optional teacher_keys, key_scale, teacher_key_scale, positives, exclude, num_keys;
  bool subtract_entropy;
};

template <typename... Ts>
struct Types {};
using ArgumentTypes = Types<Tensor, Optional, Tensor, Optional, Optional, Optional, Optional,
                            Optional, Optional, bool>;

inline const std::string kArguments =
    "Tensor student, Tensor? teacher, Tensor keys, Tensor? teacher_keys, Tensor? key_scale, "
    "Tensor? teacher_key_scale, Tensor? positives, Tensor? exclude, Tensor? num_keys, "
    "bool subtract_entropy";

// Schemas of both operators; a device may take `more` arguments.
inline std::string fwd_schema(const std::string& more = "") {
  return "relational_kl_fwd(" + kArguments +
         ", Tensor? own_student, Tensor? own_teacher, bool need_student" + more +
         ") -> (Tensor, Tensor, Tensor, Tensor)";
}

inline std::string bwd_schema(const std::string& more = "") {
  return "relational_kl_bwd(Tensor dout, " + kArguments +
         ", Tensor loss, Tensor dloss, Tensor lse_student, Tensor lse_teacher, bool need_student, "
         "bool need_teacher, bool need_keys, bool need_teacher_keys" +
         more + ") -> (Tensor, Tensor, Tensor, Tensor)";
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The arguments of the backward alone: what it reads besides, and which gradients it is asked for.
struct BackwardArguments {
  Tensor dout, loss, dloss, lse_student, lse_teacher;
  bool need_student, need_teacher, need_keys, need_teacher_keys;
};

}  // namespace kdk::relational_kl
