# SPDX-License-Identifier: Apache-2.0
"""What launches of relational_kl decide by sizes and options, once for all calls that agree in
them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels._gpu import fp32_matmul
from kdkernels._key_bank_call import KeyBankCall
from kdkernels.triton.common.launch import COLUMNS, ROWS, Arch, arch_of, cdiv
from kdkernels.triton.common.prepared import REMEMBERED, Launch
from kdkernels.triton.relational_kl import bwd_kernels, kernels, row_kernels
from kdkernels.triton.relational_kl.config import RelationalKLConfig, pick_config

# How kernels name the tensors of a call, in the order of KeyBankCall.
_NAMES = (
    "x_ptr", "y_ptr", "keys_ptr", "teacher_keys_ptr", "own_ptr", "positives_ptr", "exclude_ptr",
    "num_keys_ptr", "x_factor_ptr", "y_factor_ptr",
)  # fmt: skip
STUDENT, TEACHER, OWN = range(3)  # whose gradient `_relational_kl_bwd_rows_kernel` makes
_OF_ROWS = {"ROWS": ROWS, "COLUMNS": COLUMNS}


def tensors_of(call: KeyBankCall) -> dict[str, Tensor]:
    """Those that are there, by the names that kernels have for them."""
    return {name: x for name, x in zip(_NAMES, call, strict=False) if x is not None}


class Facts(NamedTuple):
    """What decides on launches."""

    B: int
    D: int
    E: int  # of the teacher's rows
    K: int
    dtype: torch.dtype
    given: frozenset[str]  # of _NAMES
    mask: bool  # whether exclude is one
    normalize: bool
    subtract_entropy: bool
    arch: Arch
    fp32_matmul: str

    @property
    def config(self) -> RelationalKLConfig:
        return pick_config(self.B, dtype=self.dtype, arch=self.arch, fp32_matmul=self.fp32_matmul)

    @property
    def has_teacher(self) -> bool:
        return "y_ptr" in self.given


def facts_of(call: KeyBankCall, tensors: dict[str, Tensor]) -> Facts:
    B, D = call.student.shape
    return Facts(
        B, D, D if call.teacher is None else call.teacher.shape[1], call.keys.shape[0],
        call.student.dtype, frozenset(tensors),
        call.exclude is not None and call.exclude.dtype == torch.uint8, call.normalize,
        call.subtract_entropy, arch_of(call.student), fp32_matmul(),
    )  # fmt: skip


class Prepared:
    """A launch that takes its tensors from a table of all tensors of the call."""

    __slots__ = ("_launch", "_names")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        facts: Facts,
        absent: tuple[str, ...] = (),
        floats: tuple[str, ...] = (),
        **arguments: Any,
    ) -> None:
        without = {name for name in _NAMES if name not in facts.given}.union(absent)
        if not facts.normalize:
            without.add("key_scales_ptr")
        pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
        none = {name: None for name in pointers if name in without}
        self._names = (*(name for name in pointers if name not in none), *floats)
        self._launch = Launch(kernel, grid, **none, **arguments)

    def __call__(self, table: dict[str, Any]) -> None:
        self._launch(**{name: table[name] for name in self._names})


@dataclass(frozen=True)
class Chunk:
    """Launches for rows first ... first + rows - 1."""

    first: int
    rows: int
    weights: Prepared
    merge: Prepared
    product: Prepared | None
    splits: int


@dataclass(frozen=True)
class ForwardPlan:
    scales: Prepared | None
    chunks: tuple[Chunk, ...]
    stats: int  # numbers
    weights: int  # elements; 0 where nobody asks for a gradient
    weight_dtype: torch.dtype


@lru_cache(REMEMBERED)
def forward_plan(facts: Facts, need_student: bool) -> ForwardPlan:
    B, K, config = facts.B, facts.K, facts.config
    tile, sides = config.logits, 2 if facts.has_teacher else 1
    weight_bytes = sides * K * config.weight_dtype.itemsize
    step = config.chunk(B, weight_bytes if need_student else 0, tile.m)
    tiles = cdiv(K, tile.n)
    return ForwardPlan(
        scales=_scales(facts),
        chunks=tuple(
            _chunk(facts, config, first, min(step, B - first), tiles, need_student)
            for first in range(0, B, max(step, 1))
        ),
        stats=(5 if facts.has_teacher else 3) * tiles * step,
        weights=sides * step * K if need_student else 0,
        weight_dtype=config.weight_dtype,
    )


def _scales(facts: Facts) -> Prepared | None:
    banks = (2 if "teacher_keys_ptr" in facts.given else 1) if facts.normalize else 0
    programs = cdiv(facts.B, ROWS) + banks * cdiv(facts.K, ROWS)
    if programs == 0:
        return None
    return Prepared(
        row_kernels._relational_kl_scales_kernel, (programs,), facts,
        floats=("x_temperature", "y_temperature"), B=facts.B, K=facts.K, D=facts.D, E=facts.E,
        NORMALIZE=facts.normalize, **_OF_ROWS,
    )  # fmt: skip


def _chunk(
    facts: Facts,
    config: RelationalKLConfig,
    first: int,
    rows: int,
    tiles: int,
    need_student: bool,
) -> Chunk:
    B, D, K, tile = facts.B, facts.D, facts.K, config.logits
    place = {"first": first, "rows": rows}
    options = {"MASK": facts.mask, "ENTROPY": facts.subtract_entropy}
    weights = Prepared(
        kernels._relational_kl_weights_kernel, (cdiv(rows, tile.m) * tiles,), facts,
        absent=() if need_student else ("weights_ptr",), **place, B=B, K=K, D=D, E=facts.E,
        **options, PRECISION=config.of_logits, **tile.launch(),
    )  # fmt: skip
    merged_rows, merged_tiles = config.merge
    # on Blackwell four warps leave numbers on the stack, and eight do elsewhere
    warps = 8 if config.arch.name.startswith("sm_10") else 4
    merge = Prepared(
        kernels._relational_kl_merge_kernel, (cdiv(rows, merged_rows),), facts, **place, B=B, K=K,
        tiles=tiles, TEACHER=facts.has_teacher, OWN="own_ptr" in facts.given, **options,
        FACTORS=need_student, ROWS=merged_rows, TILES=merged_tiles, num_warps=warps,
    )  # fmt: skip
    if not need_student or D == 0:
        return Chunk(first, rows, weights, merge, None, 1)
    tile = config.product
    count = tile.count(rows, D)
    length, splits = tile.split(K, count, config.arch, config.logits.n)
    product = Prepared(
        kernels._relational_kl_fwd_kernel_product, (count, splits), facts, **place, K=K, D=D,
        split_k=length, TEACHER=facts.has_teacher, SPLIT=splits > 1, PRECISION=config.of_weights,
        TILE=config.logits.n, **tile.launch(),
    )  # fmt: skip
    return Chunk(first, rows, weights, merge, product, splits)


@lru_cache(REMEMBERED)
def rows_gradient(
    facts: Facts, of: int, stride_dout: int, needed: bool, of_factor: bool
) -> Prepared:
    """The gradient of student, teacher or own keys, and that of the side's factor."""
    there = {"v_ptr": of != OWN, "out_ptr": needed}
    there |= dict.fromkeys(("dfactor_ptr", "factor_ptr"), of_factor)
    absent = [name for name, yes in there.items() if not yes]
    return Prepared(
        row_kernels._relational_kl_bwd_rows_kernel, (cdiv(facts.B, ROWS),), facts,
        absent=tuple(absent), B=facts.B, D=facts.E if of == TEACHER else facts.D,
        stride_dout=stride_dout, OF=of, NORMALIZE=facts.normalize,
        ENTROPY=facts.subtract_entropy, **_OF_ROWS,
    )  # fmt: skip


@lru_cache(REMEMBERED)
def derivatives(
    facts: Facts,
    rows: range,
    keys: range,
    stride_dout: int,
    of_student: bool,
    by_rows: bool,
) -> Prepared:
    """Derivatives by logits of some rows and keys, for a product with rows or with keys."""
    tile = facts.config.logits
    absent = (*(() if of_student else ("g_ptr",)), *(() if facts.has_teacher else ("h_ptr",)))
    return Prepared(
        bwd_kernels._relational_kl_derivatives_kernel, (tile.count(len(rows), len(keys)),), facts,
        absent=absent, first_row=rows.start, first_key=keys.start, rows=len(rows), keys=len(keys),
        B=facts.B, K=facts.K, D=facts.D, E=facts.E, stride_dout=stride_dout, BY_ROWS=by_rows,
        MASK=facts.mask, ENTROPY=facts.subtract_entropy, PRECISION=facts.config.of_logits,
        **tile.launch(),
    )  # fmt: skip


@lru_cache(REMEMBERED)
def keys_gradient(facts: Facts, width: int) -> Prepared:
    """The gradient of a bank's keys through their norms."""
    return Prepared(
        row_kernels._relational_kl_bwd_keys_kernel, (cdiv(facts.K, ROWS),), facts, K=facts.K,
        D=width, **_OF_ROWS,
    )  # fmt: skip
