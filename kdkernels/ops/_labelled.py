# SPDX-License-Identifier: Apache-2.0
"""What the ops on labelled rows share: checks, the rows as operators take them, and the fake of
operators that return gradients with a sum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import form

DISTANCES = ("euclidean", "sqeuclidean", "cosine")


def _unit(x: Tensor) -> Tensor:
    """Unit rows in the accumulation dtype, so that half precision rounds no distance."""
    return F.normalize(x.to(_checks.accumulation_dtype(x.dtype)), dim=-1)


def _check_side(name: str, x: Tensor, labels_name: str, labels: Any) -> None:
    _checks.matrix(name, x)
    _checks.labels(labels_name, labels, name, x)


def _check(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    distance: str,
) -> torch.dtype:
    """The dtype of embeddings and references."""
    _check_side("embeddings", embeddings, "labels", labels)
    if (references is None) != (reference_labels is None):
        missing = "references" if references is None else "reference_labels"
        raise ValueError(f"{missing} must be given with the other of the two, got None")
    dtype = embeddings.dtype
    if references is not None:
        _check_side("references", references, "reference_labels", reference_labels)
        _checks.same_device("references", references, "embeddings", embeddings)
        _checks.same_columns("references", references, "embeddings", embeddings)
        dtype = _checks.common_dtype("references", references, "embeddings", dtype)
    _checks.choice("distance", distance, DISTANCES)
    return dtype


def labelled_rows(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    references: Tensor | None,  # [M, D]
    reference_labels: Tensor | None,  # [M]
    distance: str,
    normalize_embeddings: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The four tensors checked, with unit rows where asked for and int64 labels.

    None for the references says that they are the embeddings, None for their labels that they are
    the same tensor: Dynamo passes no tensor to an autograd function twice (torch 2.13).
    """
    dtype = _check(embeddings, labels, references, reference_labels, distance)
    unit = normalize_embeddings or distance == "cosine"
    given_labels, labels = labels, labels.to(torch.int64)
    shared = reference_labels is None or reference_labels is given_labels
    reference_labels = None if shared else reference_labels.to(torch.int64)
    if references is None:
        return _unit(embeddings) if unit else embeddings, labels, None, reference_labels
    embeddings, references = _checks.in_dtype(dtype, embeddings, references)
    if unit:
        embeddings, references = _unit(embeddings), _unit(references)
    references = references.view_as(references) if references is embeddings else references
    return embeddings, labels, references, reference_labels


def both_sides(
    embeddings: Tensor, labels: Tensor, references: Tensor | None, reference_labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """(embeddings, labels, references, reference_labels, in_batch), as operators take them."""
    in_batch = references is None
    return (
        embeddings,
        labels,
        embeddings if in_batch else references,
        labels if reference_labels is None else reference_labels,
        in_batch,
    )


def forms_of_both_sides(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    distance: str,
    normalize_embeddings: bool,
) -> tuple[Any, ...]:
    """The forms of `both_sides` of `labelled_rows`."""
    dtype = _check(embeddings, labels, references, reference_labels, distance)
    if normalize_embeddings or distance == "cosine":
        dtype = _checks.accumulation_dtype(dtype)
    x, y, r, r_y = both_sides(embeddings, labels, references, reference_labels)[:4]
    return (
        form(x, dtype=dtype), form(y, dtype=torch.int64), form(r, dtype=dtype),
        form(r_y, dtype=torch.int64), references is None,
    )  # fmt: skip


def need_of_both_sides(embeddings: Tensor, references: Tensor | None) -> tuple[bool, bool]:
    """The flags need_embeddings and need_references of operators."""
    return _checks.wants_gradient(embeddings), _checks.wants_gradient(references)


def differentiable_first(operator: Any) -> Any:
    """An operator on `both_sides` that takes the two arguments with a gradient first."""

    def call(
        embeddings: Tensor,
        references: Tensor | None,
        labels: Tensor,
        reference_labels: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        return operator(*both_sides(embeddings, labels, references, reference_labels), *options)

    return call


def summed_fake(counts: int) -> Any:
    """The fake of an operator with so many counts."""

    def fake(
        embeddings: Tensor, labels: Tensor, references: Tensor, reference_labels: Tensor,
        in_batch: bool, *options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        *_, need_embeddings, need_references, _ = options
        acc = _checks.accumulation_dtype(embeddings.dtype)
        need_references = need_references and not in_batch
        return (
            embeddings.new_empty((), dtype=acc),
            *(embeddings.new_empty((), dtype=torch.int64) for _ in range(counts)),
            embeddings.new_empty(embeddings.shape if need_embeddings else (0,), dtype=acc),
            embeddings.new_empty(references.shape if need_references else (0,), dtype=acc),
        )

    return fake
