// SPDX-License-Identifier: Apache-2.0
// Places of the numbers of rows in the residual `numbers`, as kdkernels/_key_bank_call.py has them.
#pragma once

namespace kdk::relational_kl {

enum : int {
  kLseStudent,
  kLseTeacher,
  kStudentScale,
  kTeacherScale,
  kOwnScale,
  kOwnStudent,
  kOwnTeacher,
  kNumbers
};

}  // namespace kdk::relational_kl
