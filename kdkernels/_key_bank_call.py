# SPDX-License-Identifier: Apache-2.0
"""The arguments that the operators of relational_kl have in common."""

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
    key_scale: Tensor | None = None  # [K]
    teacher_key_scale: Tensor | None = None  # [K]
    positives: Tensor | None = None  # [B] int64
    exclude: Tensor | None = None  # [B] int64
    num_keys: Tensor | None = None  # [] int64
    subtract_entropy: bool = False
