# SPDX-License-Identifier: Apache-2.0
"""The arguments and the numbers of rows that the operators of relational_kl have in common."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KeyBankCall(NamedTuple):
    """Rows that meet a bank of keys, in the order of the operators' schemas.

    ops/relational_kl.py says what each argument means.
    """

    student: Tensor  # [B, D]
    teacher: Tensor | None  # [B, E]
    keys: Tensor  # [K, D]
    teacher_keys: Tensor | None = None  # [K, E]
    own_keys: Tensor | None = None  # [B, D]
    positives: Tensor | None = None  # [B] int64
    exclude: Tensor | None = None  # [B] int64, or [B, K] bool
    num_keys: Tensor | None = None  # [] int64
    student_factor: Tensor | None = None  # []
    teacher_factor: Tensor | None = None  # []
    normalize: bool = True
    subtract_entropy: bool = False


class RowNumbers(NamedTuple):
    """What the operators know about each row, [B] each, in the order of a residual [7, B].

    0 where a call has no such number.
    """

    lse_student: Tensor
    lse_teacher: Tensor
    student_scale: Tensor
    teacher_scale: Tensor
    own_scale: Tensor
    own_student: Tensor
    own_teacher: Tensor
