# SPDX-License-Identifier: Apache-2.0
"""triplet_loss: one mined triplet per anchor (op `triplet`), or several (op `triplet_all`)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, explained_by, requested_backend
from kdkernels.ops import _rows
from kdkernels.ops._gradient_in_forward import GradientInForward
from kdkernels.ops._labelled import (
    differentiable_first,
    forms_of_both_sides,
    labelled_rows,
    need_of_both_sides,
)
from kdkernels.ops.triplet import TripletFunction
from kdkernels.ops.triplet_all import triplet_all_fwd

# one triplet per anchor: (positives, negatives) of `mine_triplets`
ONE = {"batch_hard": ("hardest", "hardest"), "batch_semihard": ("hardest", "semihard")}
# several: negatives of the op `triplet_all`
SEVERAL = {"batch_all": "all", "pair_semihard": "semihard"}
MININGS = (*ONE, *SEVERAL)
REDUCTIONS = ("mean_nonzero", "mean", "sum", "none")

_forward_of_several = differentiable_first(triplet_all_fwd)


def _checked(mining: str, margin: float, soft: bool, reduction: str) -> float:
    """The margin as a float."""
    _checks.choice("mining", mining, MININGS)
    margin = _checks.not_negative("margin", margin)
    _checks.flag("soft", soft)
    _checks.choice("reduction", reduction, REDUCTIONS)
    if mining in SEVERAL and reduction == "none":
        raise ValueError(
            f"reduction must be 'mean_nonzero', 'mean' or 'sum' with mining={mining!r}, whose "
            "triplets are summed as they are found, got 'none'"
        )
    return margin


def _operator_args(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    mining: str,
    margin: float,
    soft: bool,
    distance: str,
    normalize_embeddings: bool,
    exclude: Tensor | None,
    sample_mask: Tensor | None,
    ignore_index: int | None,
    reduction: str,
) -> tuple[Any, ...]:
    margin = _checked(mining, margin, soft, reduction)
    rows = forms_of_both_sides(
        embeddings, labels, references, reference_labels, distance, normalize_embeddings, exclude,
        sample_mask, ignore_index,
    )  # fmt: skip
    if mining in ONE:
        return *rows, *ONE[mining], margin, soft, distance
    need = need_of_both_sides(embeddings, references)
    return *rows, SEVERAL[mining], margin, soft, distance, *need


def _op(mining: str, **_: Any) -> str:
    return "triplet_all" if mining in SEVERAL else "triplet"


def _choices(mining: str, **_: Any) -> dict[str, str]:
    meanings = {
        "batch_hard": "hardest positive, hardest negative per anchor",
        "batch_semihard": "hardest positive, semihard negative per anchor",
        "batch_all": "every positive with every negative, by thresholds",
        "pair_semihard": "semihard negative per positive",
    }
    return {"mining": meanings[mining]}


@explained_by(_operator_args, _choices, op=_op)
def triplet_loss(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    *,
    references: Tensor | None = None,  # [M, D]
    reference_labels: Tensor | None = None,  # [M]
    mining: Literal["batch_hard", "batch_semihard", "batch_all", "pair_semihard"] = "batch_hard",
    margin: float = 0.2,
    soft: bool = False,
    distance: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean",
    normalize_embeddings: bool = True,
    exclude: Tensor | None = None,  # [B]
    sample_mask: Tensor | None = None,  # [B]
    ignore_index: int | None = None,
    reduction: Literal["mean_nonzero", "mean", "sum", "none"] = "mean_nonzero",
    backend: Backend = "auto",
) -> Tensor:
    r"""Triplet loss over triplets found in the batch.

    With u = d(anchor, positive) - d(anchor, negative) + margin, a triplet costs max(u, 0), or
    log(1 + e^u) if `soft`.

    Args:
        embeddings, labels, references, reference_labels: As in `mine_triplets`. Gradients reach the
            embeddings and the references.
        mining: Which triplets.
            "batch_hard": per anchor the farthest positive and the nearest negative.
            "batch_semihard": per anchor the farthest positive and the nearest negative strictly
            beyond it; anchors without one are dropped.
            "batch_all": every positive with every negative. The time of `soft` grows with the
            number of triplets, as does that of the hinge on Triton; on the CPU it grows with the
            number of pairs.
            "pair_semihard": every positive with the nearest negative strictly beyond it, or with
            the farthest one where there is none.
        margin: Not negative. Kept under `soft` too, as pytorch-metric-learning does; Hermans et al.
            use `soft` with margin 0.
        soft: Softplus in place of the hinge.
        distance, normalize_embeddings, exclude, sample_mask, ignore_index: As in `mine_triplets`.
        reduction: "mean_nonzero" divides by the number of losses above 0, "mean" by the number of
            triplets, "sum" by nothing; each is 0, with a gradient of 0, where there is none. "none"
            gives [B], 0 where the anchor was dropped or does not count; only with one triplet per
            anchor.
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64): a scalar, or [B] for reduction="none".

    Raises:
        TypeError, ValueError, BackendUnavailableError: As in `mine_triplets`; and for a margin that
            is negative or not a number.

    Reference:
        Hermans, Beyer and Leibe, In Defense of the Triplet Loss for Person Re-Identification, 2017,
        arXiv:1703.07737, for "batch_hard" and "batch_all"; Schroff, Kalenichenko and Philbin,
        FaceNet, CVPR 2015, arXiv:1503.03832, for the semi-hard negative.
    """
    margin = _checked(mining, margin, soft, reduction)
    chosen_backend = requested_backend(backend)
    rows = labelled_rows(
        embeddings, labels, references, reference_labels, distance, normalize_embeddings, exclude,
        sample_mask, ignore_index,
    )  # fmt: skip
    x, y, r, r_y, exclude = rows.tensors
    if mining in SEVERAL:
        total, nonzero, valid = GradientInForward.apply(
            _forward_of_several, 2, 1.0, x, r, y, r_y, exclude, rows.normalize, SEVERAL[mining],
            margin, soft, distance, *need_of_both_sides(x, r), chosen_backend,
        )  # fmt: skip
    else:
        each = reduction == "none"
        total, nonzero, valid = TripletFunction.apply(
            x, y, r, r_y, exclude, rows.normalize, *ONE[mining], margin, soft, distance, each,
            chosen_backend,
        )  # fmt: skip
        if each:
            return _rows.put_back(total, rows.index, embeddings.shape[0])
    if reduction == "sum":
        return total
    return total / (nonzero if reduction == "mean_nonzero" else valid).clamp_min(1)
