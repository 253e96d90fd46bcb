# SPDX-License-Identifier: Apache-2.0
"""triplet: the positive and the negative that each anchor is compared with, and what it costs.

Traffic of one forward and backward: the embeddings once per tile column, and O(B D) for the chosen
triplets; nothing of size B x M is written. Derivation: docs/ops/triplet.md.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, requested_backend
from kdkernels._function import KernelFunction, constant_results, keep_for_backward
from kdkernels._library import define_operator, first_order
from kdkernels._mined_triplets import MinedTriplets
from kdkernels.ops._labelled import both_sides, forms_of_both_sides, labelled_rows

STRATEGIES = ("hardest", "semihard", "easiest")

# Results of the forward, the same for every backend; numbers are fp64 for fp64 inputs, else fp32.
#   total     []        sum of the losses
#   nonzero   [] int64  losses above 0
#   valid     [] int64  anchors that have a positive and a negative
#   losses    [B]       max(d_ap - d_an + margin, 0), or log(1 + e^(d_ap - d_an + margin)) if soft;
#                       0 where the anchor lacks a positive or a negative
#   positive  [B] int64  row of the references; -1 where the anchor lacks a positive or a negative
#   negative  [B] int64  likewise, -1 at the same anchors
#   d_ap      [B]        distance to the positive from the difference of the two rows; 0 where -1
#   d_an      [B]        likewise
# `exclude` [B] int64 names one reference per anchor that is not chosen, or none by -1; None: none.
# positives="paired" makes row i of the references the positive of anchor i, whatever its label.
# Ties go to the lowest row. With `in_batch` the references are the embeddings. With `normalize`
# rows are divided by their norms as `kdkernels._similarity.unit` does, in the accumulation dtype,
# and the backward returns the gradient of the rows as they are given. Its dloss is the derivative
# by `total`, [], or by `losses`, [B].
# A row whose squared norm is not below a quarter of the largest number has distances NaN. NaN is
# chosen before every other distance, is beyond every bound, and everything is beyond it.


def _fwd_fake(
    embeddings: Tensor, labels: Tensor, references: Tensor, reference_labels: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    B, acc = embeddings.shape[0], _checks.accumulation_dtype(embeddings.dtype)
    sums, rows = (acc, torch.int64, torch.int64), (acc, torch.int64, torch.int64, acc, acc)
    return (
        *(embeddings.new_empty((), dtype=dtype) for dtype in sums),
        *(embeddings.new_empty(B, dtype=dtype) for dtype in rows),
    )


def _bwd_fake(
    dloss: Tensor, embeddings: Tensor, references: Tensor, positive: Tensor, negative: Tensor,
    d_ap: Tensor, d_an: Tensor, in_batch: bool, normalize: bool, need_embeddings: bool,
    need_references: bool, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        embeddings.new_empty(embeddings.shape if need_embeddings else (0,)),
        references.new_empty(references.shape if need_references and not in_batch else (0,)),
    )


_fwd = define_operator(
    "triplet",
    "fwd",
    "(Tensor embeddings, Tensor labels, Tensor references, Tensor reference_labels, bool in_batch, "
    "Tensor? exclude, bool normalize, str positives, str negatives, float margin, bool soft, "
    "str distance, str backend) -> (Tensor total, Tensor nonzero, Tensor valid, Tensor losses, "
    "Tensor positive, Tensor negative, Tensor d_ap, Tensor d_an)",
    _fwd_fake,
)
_bwd = define_operator(
    "triplet",
    "bwd",
    "(Tensor dloss, Tensor embeddings, Tensor references, Tensor positive, Tensor negative, "
    "Tensor d_ap, Tensor d_an, bool in_batch, bool normalize, bool need_embeddings, "
    "bool need_references, float margin, bool soft, str distance, str backend) "
    "-> (Tensor dembeddings, Tensor dreferences)",
    _bwd_fake,
)


class TripletFunction(KernelFunction):
    """Attaches the operator pair to autograd: (sum of the losses, number of losses above 0, number
    of triplets), or with `each` all losses in place of their sum."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        labels: Tensor,
        references: Tensor | None,
        reference_labels: Tensor | None,
        exclude: Tensor | None,
        normalize: bool,
        positives: str,
        negatives: str,
        margin: float,
        soft: bool,
        distance: str,
        each: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = both_sides(embeddings, labels, references, reference_labels, exclude)
        total, nonzero, valid, losses, *residuals = _fwd(
            *rows, normalize, positives, negatives, margin, soft, distance, backend
        )
        inputs = (embeddings,) if references is None else (embeddings, references)
        keep_for_backward(ctx, *inputs, *residuals)
        ctx.normalize, ctx.options = normalize, (margin, soft, distance, backend)
        constant_results(ctx, nonzero, valid)
        return losses if each else total, nonzero, valid

    @staticmethod
    @first_order
    def backward(ctx: Any, kept: tuple[Tensor, ...], dloss: Tensor, *_: Any) -> tuple[Any, ...]:
        embeddings, *rest = kept
        in_batch = len(rest) == 4
        references, *residuals = (embeddings, *rest) if in_batch else rest
        need_embeddings, need_references = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        dx, dr = _bwd(
            dloss, embeddings, references, *residuals, in_batch, ctx.normalize, need_embeddings,
            need_references, *ctx.options,
        )  # fmt: skip
        return (
            dx if need_embeddings else None,
            None,
            dr if need_references else None,
            *(None,) * 10,
        )


def _check_strategies(positives: str, negatives: str) -> None:
    _checks.choice("positives", positives, STRATEGIES)
    _checks.choice("negatives", negatives, STRATEGIES)
    if positives == negatives == "semihard":
        raise ValueError(
            "negatives must be 'hardest' or 'easiest' with positives='semihard', got 'semihard'"
        )


def _operator_args(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    positives: str,
    negatives: str,
    distance: str,
    normalize_embeddings: bool,
    exclude: Tensor | None,
    sample_mask: Tensor | None,
    ignore_index: int | None,
) -> tuple[Any, ...]:
    rows = forms_of_both_sides(
        embeddings, labels, references, reference_labels, distance, normalize_embeddings, exclude,
        sample_mask, ignore_index,
    )  # fmt: skip
    _check_strategies(positives, negatives)
    return *rows, positives, negatives, 0.0, False, distance


def _choices(positives: str, negatives: str, **_: Any) -> dict[str, str]:
    return {"mining": f"{positives} positive, {negatives} negative per anchor"}


@explained_by(_operator_args, _choices)
def mine_triplets(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    *,
    references: Tensor | None = None,  # [M, D]
    reference_labels: Tensor | None = None,  # [M]
    positives: Literal["hardest", "semihard", "easiest"] = "hardest",
    negatives: Literal["hardest", "semihard", "easiest"] = "hardest",
    distance: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean",
    normalize_embeddings: bool = True,
    exclude: Tensor | None = None,  # [B]
    sample_mask: Tensor | None = None,  # [B]
    ignore_index: int | None = None,
    backend: Backend = "auto",
) -> MinedTriplets:
    r"""One triplet per anchor: its positive (same label) and its negative (another label).

    | strategy   | positive                              | negative                         |
    |------------|---------------------------------------|----------------------------------|
    | "hardest"  | the farthest                          | the nearest                      |
    | "semihard" | the farthest nearer than the negative | the nearest beyond the positive  |
    | "easiest"  | the nearest                           | the farthest                     |

    "semihard" compares strictly, and one side at most can be "semihard". Anchors without a positive
    or a negative of that kind are dropped. Equal distances go to the lowest row. Ranking uses
    |x|^2 + |y|^2 - 2 <x, y> in the accumulation dtype, so among candidates closer to each other
    than its rounding another one may win than in exact arithmetic; `d_ap` and `d_an` are then
    computed from differences of the rows.

    Args:
        embeddings: Anchors, [B, D], fp16, bf16, fp32 or fp64.
        labels: [B], any integer dtype, any values.
        references, reference_labels: Where positives and negatives come from, [M, D] and [M]: a
            memory bank, the teacher, another modality. None: the batch itself, where an anchor is
            not its own positive. The wider dtype is taken where the references have another one.
        distance: "euclidean", its square, or "cosine" (1 - cosine; normalises in any case).
        normalize_embeddings: Divide each row by its norm first, clamped at 1e-12.
        exclude: One reference per row that is neither its positive nor its negative, integer [B],
            -1 for none: the row's own copy, where the references hold it. Only with references.
        sample_mask: Which rows of the embeddings count, bool [B]: value and gradient are those of
            the batch without the other rows, which may hold anything and whose gradient is 0. The
            number of rows that count is read, for which a GPU is waited for, and
            `torch.compile(fullgraph=True)` refuses it. None: all rows.
        ignore_index: Label of rows of both sides that do not count, an integer: they are neither
            anchors nor positives nor negatives, and the number of those that count is read
            likewise. None: every label is a class, -1 too.
        backend: See `kdkernels.explain`.

    Returns:
        `MinedTriplets`: rows of the anchors (ascending), positives and negatives, int64 [K], and
        the two distances, fp32 (fp64 for fp64). None of them is differentiable. The number K of
        anchors kept depends on the data, so on a GPU this call waits for the device;
        `triplet_loss` does not.

    Raises:
        TypeError: labels that are not integers, embeddings that are not floating point.
        ValueError: shapes, devices or options do not fit, naming the argument. Indices are looked
            at only where they lie on the CPU; elsewhere one that names no reference excludes none.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Hermans, Beyer and Leibe, In Defense of the Triplet Loss for Person Re-Identification, 2017,
        arXiv:1703.07737; Schroff, Kalenichenko and Philbin, FaceNet, CVPR 2015, arXiv:1503.03832.
    """
    with torch.no_grad():
        rows = labelled_rows(
            embeddings, labels, references, reference_labels, distance, normalize_embeddings,
            exclude, sample_mask, ignore_index,
        )  # fmt: skip
        _check_strategies(positives, negatives)
        positive, negative, d_ap, d_an = _fwd(
            *both_sides(*rows.tensors), rows.normalize, positives, negatives, 0.0, False, distance,
            requested_backend(backend),
        )[4:]  # fmt: skip

    def given(at: Tensor, index: Tensor | None) -> Tensor:
        return at if index is None else index[at]

    anchors = (positive >= 0).nonzero().squeeze(1)
    return MinedTriplets(
        given(anchors, rows.index),
        given(positive[anchors], rows.reference_index),
        given(negative[anchors], rows.reference_index),
        d_ap[anchors],
        d_an[anchors],
    )
