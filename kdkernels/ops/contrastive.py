# SPDX-License-Identifier: Apache-2.0
"""contrastive: pairs of one label are pulled together, all others pushed beyond a margin.

One sweep over tiles of distances gives the sum and its derivatives; B x M distances are never
written down. Derivation: docs/ops/contrastive.md.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, requested_backend
from kdkernels._library import define_operator
from kdkernels.ops._gradient_in_forward import GradientInForward
from kdkernels.ops._labelled import (
    differentiable_first,
    forms_of_both_sides,
    labelled_rows,
    need_of_both_sides,
    summed_fake,
)

REDUCTIONS = ("mean", "mean_nonzero", "sum")

# Results of the operator, the same for every backend; fp64 for fp64 inputs, else fp32:
#   total        []      sum over pairs of d^2 / 2 where the labels agree, else
#                        max(margin - d, 0)^2 / 2; with `in_batch`, where the references are the
#                        embeddings, each pair of rows counts once and no row pairs with itself;
#                        nor does a row with the reference `exclude` [B] int64 names, -1 for none
#   nonzero      [] int64  pairs with a loss above 0
#   dembeddings  [B, D]  derivative of `total` by the rows as given; [0] unless needed
#   dreferences  [M, D]  likewise; [0] with `in_batch`
# `normalize` is that of ops/triplet.py. Distances are NaN as there; a pair with such a distance
# makes `total` NaN.
contrastive_fwd = define_operator(
    "contrastive",
    "fwd",
    "(Tensor embeddings, Tensor labels, Tensor references, Tensor reference_labels, bool in_batch, "
    "Tensor? exclude, bool normalize, float margin, str distance, bool need_embeddings, "
    "bool need_references, str backend) "
    "-> (Tensor total, Tensor nonzero, Tensor dembeddings, Tensor dreferences)",
    summed_fake(counts=1),
)
_forward = differentiable_first(contrastive_fwd)


def _operator_args(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    margin: float,
    distance: str,
    normalize_embeddings: bool,
    exclude: Tensor | None,
    sample_mask: Tensor | None,
    ignore_index: int | None,
    reduction: str,
) -> tuple[Any, ...]:
    margin = _checks.not_negative("margin", margin)
    _checks.choice("reduction", reduction, REDUCTIONS)
    rows = forms_of_both_sides(
        embeddings, labels, references, reference_labels, distance, normalize_embeddings, exclude,
        sample_mask, ignore_index,
    )  # fmt: skip
    return *rows, margin, distance, *need_of_both_sides(embeddings, references)


def _choices(references: Tensor | None, **_: Any) -> dict[str, str]:
    return {"pairs": "of the batch" if references is None else "of the batch and the references"}


@explained_by(_operator_args, _choices)
def contrastive_loss(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    *,
    references: Tensor | None = None,  # [M, D]
    reference_labels: Tensor | None = None,  # [M]
    margin: float = 1.0,
    distance: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean",
    normalize_embeddings: bool = True,
    exclude: Tensor | None = None,  # [B]
    sample_mask: Tensor | None = None,  # [B]
    ignore_index: int | None = None,
    reduction: Literal["mean", "mean_nonzero", "sum"] = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Contrastive loss of all pairs of rows.

    A pair at distance d costs d^2 / 2 if its labels agree, and max(margin - d, 0)^2 / 2 if not.
    Pairs are taken within the batch, each once; or between the batch and `references`: a teacher's
    outputs, or the codes of another modality's encoder.

    Args:
        embeddings, labels: [B, D], fp16, bf16, fp32 or fp64; [B], any integer dtype.
        references, reference_labels: [M, D] and [M], or None for the batch itself; the wider dtype
            is taken where the references have another one. Gradients reach the embeddings and the
            references.
        margin: Distance beyond which pairs of different labels cost nothing; not negative.
        distance: "euclidean", its square, or "cosine" (1 - cosine; normalises in any case).
        normalize_embeddings: Divide each row by its norm first, clamped at 1e-12.
        exclude: One reference per row that is in no pair with it, integer [B], -1 for none: the
            row's own copy, where the references hold it. Only with references.
        sample_mask, ignore_index: As in `mine_triplets`: pairs are between rows that count.
        reduction: "mean" divides by the number of pairs, "mean_nonzero" by the number of losses
            above 0, "sum" by nothing; each is 0, with a gradient of 0, where there is none.
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64) scalar.

    Raises:
        TypeError, ValueError: an argument does not fit, by name. Indices are looked at only where
            they lie on the CPU; elsewhere one that names no reference excludes none.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Hadsell, Chopra and LeCun, Dimensionality Reduction by Learning an Invariant Mapping, CVPR
        2006, which sums over pairs.
    """
    margin = _checks.not_negative("margin", margin)
    _checks.choice("reduction", reduction, REDUCTIONS)
    rows = labelled_rows(
        embeddings, labels, references, reference_labels, distance, normalize_embeddings, exclude,
        sample_mask, ignore_index,
    )  # fmt: skip
    x, y, r, r_y, exclude = rows.tensors
    total, nonzero = GradientInForward.apply(
        _forward, 2, 1.0, x, r, y, r_y, exclude, rows.normalize, margin, distance,
        *need_of_both_sides(x, r), requested_backend(backend),
    )  # fmt: skip
    if reduction == "sum":
        return total
    if reduction == "mean_nonzero":
        return total / nonzero.clamp_min(1)
    B = x.shape[0]
    pairs = B * (B - 1) // 2 if r is None else B * r.shape[0]
    if exclude is None:
        return total / max(pairs, 1)
    return total / (pairs - (exclude >= 0).sum()).clamp_min(1)
