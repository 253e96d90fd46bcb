# SPDX-License-Identifier: Apache-2.0
"""lsh_bce: cross-entropy of a student's random projections against a teacher's hash bits.

Traffic of one forward and backward for the student, in elements: reads 2 B D + N D and B N / 8
bytes of codes, writes 2 B D; the B x N projections stay in tiles. Derivation: docs/ops/lsh_bce.md.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, form, requested_backend
from kdkernels._function import KernelFunction, keep_for_backward
from kdkernels._library import define_operator, first_order

REDUCTIONS = ("mean", "sum", "none")

# Results of the forward, the same for every backend; fp64 for fp64 inputs, else fp32. With
# z = student weight^T + bias [B, N] and y the bits:
#   loss      [B]     sum over n of max(z, 0) - z y + log(1 + exp(-|z|))
#   dloss     [B, D]  its derivative by the student, (sigmoid(z) - y) weight; empty (0) unless
#                     need_student
# A row that sample_mask leaves out is not read, and 0 in both. The gradient of a weighted sum of
# losses is the weights times dloss, row by row, so the backward for the student is a scaling.
# Those of weight and bias sum over rows, with weights not known before the backward: it projects
# again. Bits beyond N in the last byte of a code are ignored.


def _encode_fake(features: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    return features.new_empty((features.shape[0], _bytes(weight.shape[0])), dtype=torch.uint8)


def _fwd_fake(
    student: Tensor, codes: Tensor, weight: Tensor, bias: Tensor | None,
    sample_mask: Tensor | None, need_student: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc = _checks.accumulation_dtype(student.dtype)
    return (
        student.new_empty(student.shape[0], dtype=acc),
        student.new_empty(student.shape if need_student else (0,), dtype=acc),
    )


def _bwd_fake(
    dout: Tensor, student: Tensor, codes: Tensor, weight: Tensor, bias: Tensor | None,
    sample_mask: Tensor | None, dloss: Tensor, need_student: bool, need_weight: bool,
    need_bias: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        student.new_empty(student.shape if need_student else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


_TENSORS = "Tensor student, Tensor codes, Tensor weight, Tensor? bias, Tensor? sample_mask"
_encode = define_operator(
    "lsh_bce",
    "encode",
    "(Tensor features, Tensor weight, Tensor? bias, str backend) -> Tensor codes",
    _encode_fake,
)
_fwd = define_operator(
    "lsh_bce",
    "fwd",
    f"({_TENSORS}, bool need_student, str backend) -> (Tensor loss, Tensor dloss)",
    _fwd_fake,
)
_bwd = define_operator(
    "lsh_bce",
    "bwd",
    f"(Tensor dout, {_TENSORS}, Tensor dloss, bool need_student, bool need_weight, "
    "bool need_bias, str backend) -> (Tensor dstudent, Tensor dweight, Tensor dbias)",
    _bwd_fake,
)


class LSHBCEFunction(KernelFunction):
    """Attaches the operator pair to autograd, and the reduction to both."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        codes: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        sample_mask: Tensor | None,
        need_student: bool,
        reduction: str,
        backend: str,
    ) -> Tensor:
        loss, dloss = _fwd(student, codes, weight, bias, sample_mask, need_student, backend)
        scale = 1.0 if reduction == "sum" else 1.0 / max(weight.shape[0], 1)
        count = None
        if reduction == "mean" and sample_mask is None:
            scale /= max(student.shape[0], 1)
        elif reduction == "mean":
            count = sample_mask.sum().clamp_min(1)
        keep_for_backward(ctx, student, codes, weight, bias, sample_mask, dloss, count)
        ctx.scale, ctx.backend = scale, backend
        loss = loss * scale if reduction == "none" else loss.sum() * scale
        return loss if count is None else loss / count

    @staticmethod
    @first_order
    def backward(ctx: Any, kept: tuple[Tensor | None, ...], dout: Tensor) -> tuple[Any, ...]:
        *tensors, count = kept
        dout = dout * ctx.scale if count is None else dout * ctx.scale / count
        dout = dout.expand(tensors[0].shape[0])
        need = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        grads = _bwd(dout, *tensors, *need, ctx.backend)
        ds, dw, db = (grad if needed else None for grad, needed in zip(grads, need, strict=True))
        return ds, None, dw, db, None, None, None, None


def _bytes(N: int) -> int:
    """Bytes that N bits take."""
    return (N + 7) // 8


def _check_projection(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """Checks x W^T + b, and returns the dtype of all."""
    _checks.matrix(name, x)
    _checks.matrix("weight", weight)
    _checks.same_device("weight", weight, name, x)
    _checks.same_columns("weight", weight, name, x)
    dtype = _checks.common_dtype(x.dtype, weight.dtype)
    if bias is not None:
        _checks.features("bias", bias, min_dim=1)
        _checks.same_device("bias", bias, name, x)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias must have shape {list(weight.shape[:1])} like the rows of weight, "
                f"got {list(bias.shape)}"
            )
        dtype = _checks.common_dtype(dtype, bias.dtype)
    return dtype


def _cast(
    dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return *_checks.in_dtype(dtype, x, weight), None if bias is None else bias.to(dtype)


def _encode_args(features: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    dtype = _check_projection("features", features, weight, bias)
    return tuple(x if x is None else form(x, dtype=dtype) for x in (features, weight, bias))


def _check(
    student: Tensor,
    codes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sample_mask: Tensor | None,
    reduction: str,
) -> torch.dtype:
    """The dtype of student, weight and bias."""
    dtype = _check_projection("student", student, weight, bias)
    _checks.tensor("codes", codes)
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes must be packed bits in torch.uint8, got {codes.dtype}")
    _checks.same_device("codes", codes, "student", student)
    B, N = student.shape[0], weight.shape[0]
    if codes.shape != (B, _bytes(N)):
        raise ValueError(
            f"codes must have shape {[B, _bytes(N)]} (rows of student, 1 bit per row of weight), "
            f"got {list(codes.shape)}"
        )
    _checks.sample_mask(sample_mask, "student", student)
    _checks.choice("reduction", reduction, REDUCTIONS)
    return dtype


def _operator_args(
    student: Tensor,
    codes: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sample_mask: Tensor | None,
    reduction: str,
) -> tuple[Any, ...]:
    dtype = _check(student, codes, weight, bias, sample_mask, reduction)
    return (
        form(student, dtype=dtype),
        form(codes),
        form(weight, dtype=dtype),
        None if bias is None else form(bias, dtype=dtype),
        None if sample_mask is None else form(sample_mask),
        _checks.wants_gradient(student),
    )


def _encode_choices(**_: Any) -> dict[str, str]:
    return {}


def _choices(student: Tensor, **_: Any) -> dict[str, str]:
    if _checks.wants_gradient(student):
        return {"gradient": "of the student in the forward sweep (student requires one)"}
    return {"gradient": "none in the forward sweep (student requires none)"}


@explained_by(_encode_args, _encode_choices)
def lsh_encode(
    features: Tensor,  # [B, D]
    weight: Tensor,  # [N, D]
    bias: Tensor | None = None,  # [N]
    *,
    backend: Backend = "auto",
) -> Tensor:
    r"""Hash features to one bit per random direction: which side of a hyperplane they lie on.

    Bit n of a row is 1 where <features, weight_n> + bias_n > 0, strictly: a row that lies exactly
    on a hyperplane, or is not a number, gets 0. It is stored as bit n % 8, counted from the least
    significant one, of byte n // 8; bits beyond N in the last byte are 0. The B x N projections are
    never in memory. The codes of a frozen teacher can be computed once per data set and kept.

    Args:
        features: [B, D], fp16, bf16, fp32 or fp64. Any strides.
        weight: One direction per row, [N, D], on the same device.
        bias: [N], or None for hyperplanes through the origin. The widest dtype of the three is
            taken where they differ.
        backend: See `kdkernels.explain`.

    Returns:
        uint8 [B, ceil(N / 8)]. Projections that are 0 up to rounding may fall on either side on
        different backends. Not differentiable.

    Raises:
        TypeError: not a floating tensor.
        ValueError: shapes or devices do not fit, naming the argument.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Wang, Ge and Wu, Distilling Knowledge by Mimicking Features, TPAMI 2021.
    """
    dtype = _check_projection("features", features, weight, bias)
    with torch.no_grad():
        return _encode(*_cast(dtype, features, weight, bias), requested_backend(backend))


@explained_by(_operator_args, _choices)
def lsh_bce(
    student: Tensor,  # [B, D]
    codes: Tensor,  # [B, ceil(N / 8)]
    weight: Tensor,  # [N, D]
    bias: Tensor | None = None,  # [N]
    *,
    sample_mask: Tensor | None = None,  # [B]
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Binary cross-entropy of the student's projections against hash bits of the teacher.

    With z = student weight^T + bias and y the bits of `codes`, the mean over all B x N of

        max(z, 0) - z y + log(1 + exp(-|z|)),

    which is the cross-entropy of sigmoid(z). The B x N projections are never in memory: if the
    student asks for a gradient, the forward computes it tile by tile, and the backward only scales
    it. Gradients of weight and bias project a second time in the backward.

    Args:
        student: Features, [B, D], fp16, bf16, fp32 or fp64. Any strides.
        codes: The teacher's bits, uint8 [B, ceil(N / 8)], of `lsh_encode` with the same weight and
            bias.
        weight: One direction per row, [N, D], on the same device. Usually frozen; it receives a
            gradient if it asks for one.
        bias: [N] or None; likewise. The widest dtype of student, weight and bias is taken where
            they differ.
        sample_mask: Which samples count, bool [B]; None for all. What the other rows hold does not
            matter.
        reduction: "mean" over all bits of the samples that count, 0 if none does; "sum" over the
            same, undivided; "none" gives the mean over the bits of each sample, [B], 0 where the
            sample does not count.
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or [B] for reduction="none". 0 without samples or
        bits.

    Raises:
        TypeError: not a floating tensor, codes that are not uint8, a mask that is not bool.
        ValueError: shapes, devices or options do not fit, naming the argument.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Wang, Ge and Wu, Distilling Knowledge by Mimicking Features, TPAMI 2021.
    """
    dtype = _check(student, codes, weight, bias, sample_mask, reduction)
    student, weight, bias = _cast(dtype, student, weight, bias)
    return LSHBCEFunction.apply(
        student, codes, weight, bias, sample_mask, _checks.wants_gradient(student), reduction,
        requested_backend(backend),
    )  # fmt: skip
