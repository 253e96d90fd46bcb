# SPDX-License-Identifier: Apache-2.0
"""What the ops on labelled rows share: checks, the rows as operators take them, and the fake of
operators that return gradients with a sum."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import form
from kdkernels.ops import _rows
from kdkernels.ops._key_bank import within

DISTANCES = ("euclidean", "sqeuclidean", "cosine")


def _check_side(name: str, x: Tensor, labels_name: str, labels: Any) -> None:
    _checks.matrix(name, x)
    _checks.labels(labels_name, labels, name, x)


def _check(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    distance: str,
    exclude: Tensor | None,
    sample_mask: Tensor | None,
    ignore_index: int | None,
) -> torch.dtype:
    """The dtype of embeddings and references."""
    _check_side("embeddings", embeddings, "labels", labels)
    _checks.sample_mask(sample_mask, "embeddings", embeddings)
    _checks.ignore_index(ignore_index)
    if (references is None) != (reference_labels is None):
        missing = "references" if references is None else "reference_labels"
        raise ValueError(f"{missing} must be given with the other of the two, got None")
    dtype = embeddings.dtype
    if references is not None:
        _check_side("references", references, "reference_labels", reference_labels)
        _checks.same_device("references", references, "embeddings", embeddings)
        _checks.same_columns("references", references, "embeddings", embeddings)
        dtype = _checks.common_dtype(dtype, references.dtype)
    if exclude is not None:
        if references is None:
            raise ValueError(
                "exclude must be None without references, since no row meets itself then, "
                f"got {type(exclude).__name__}"
            )
        _checks.labels("exclude", exclude, "embeddings", embeddings)
    _checks.choice("distance", distance, DISTANCES)
    return dtype


class LabelledRows(NamedTuple):
    """Rows as operators take them: those that count, in one dtype, int64 labels.

    None for the references says that they are the embeddings, None for their labels that they are
    the same tensor: Dynamo passes no tensor to an autograd function twice (torch 2.13).
    """

    embeddings: Tensor
    labels: Tensor
    references: Tensor | None
    reference_labels: Tensor | None
    exclude: Tensor | None
    normalize: bool  # whether operators divide the rows by their norms
    index: Tensor | None  # of the rows in what was given; None where all count
    reference_index: Tensor | None  # likewise, of the embeddings where they are the references

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self[:5]


def normalizes(distance: str, normalize_embeddings: bool) -> bool:
    return bool(normalize_embeddings) or distance == "cosine"


def labelled_rows(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    references: Tensor | None,  # [M, D]
    reference_labels: Tensor | None,  # [M]
    distance: str,
    normalize_embeddings: bool,
    exclude: Tensor | None = None,  # [B]
    sample_mask: Tensor | None = None,  # [B]
    ignore_index: int | None = None,
) -> LabelledRows:
    """The arguments checked, and the rows of both sides that count.

    `sample_mask` is about the embeddings, `ignore_index` about both sides.
    """
    dtype = _check(
        embeddings, labels, references, reference_labels, distance, exclude, sample_mask,
        ignore_index,
    )  # fmt: skip
    normalize = normalizes(distance, normalize_embeddings)
    given_labels, labels = labels, labels.to(torch.int64)
    index = _rows.counting(_rows.of_label(labels, sample_mask, ignore_index))
    same_labels = reference_labels is given_labels and sample_mask is None
    embeddings, labels = _rows.take(index, embeddings, labels)
    if references is None:
        return LabelledRows(embeddings, labels, None, None, None, normalize, index, index)
    if exclude is not None:
        (exclude,) = _rows.take(index, exclude.to(torch.int64))
        within("exclude", exclude, -1, references.shape[0])
    reference_index, M = index, references.shape[0]
    if same_labels:
        (references,) = _rows.take(index, references)
        reference_labels = None
    else:
        reference_labels = reference_labels.to(torch.int64)
        reference_index = _rows.counting(_rows.of_label(reference_labels, None, ignore_index))
        references, reference_labels = _rows.take(reference_index, references, reference_labels)
    embeddings, references = _checks.in_dtype(dtype, embeddings, references)
    references = references.view_as(references) if references is embeddings else references
    if exclude is not None:
        exclude = _rows.renumbered(exclude, reference_index, M)
    return LabelledRows(
        embeddings, labels, references, reference_labels, exclude, normalize, index,
        reference_index,
    )  # fmt: skip


def both_sides(
    embeddings: Tensor, labels: Tensor, references: Tensor | None, reference_labels: Tensor | None,
    exclude: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool, Tensor | None]:  # fmt: skip
    """(embeddings, labels, references, reference_labels, in_batch, exclude), as operators take
    them."""
    in_batch = references is None
    return (
        embeddings,
        labels,
        embeddings if in_batch else references,
        labels if reference_labels is None else reference_labels,
        in_batch,
        exclude,
    )


def forms_of_both_sides(
    embeddings: Tensor,
    labels: Tensor,
    references: Tensor | None,
    reference_labels: Tensor | None,
    distance: str,
    normalize_embeddings: bool,
    exclude: Tensor | None,
    sample_mask: Tensor | None,
    ignore_index: int | None,
) -> tuple[Any, ...]:
    """The forms of `both_sides` of `labelled_rows` and its `normalize`, if all rows count."""
    dtype = _check(
        embeddings, labels, references, reference_labels, distance, exclude, sample_mask,
        ignore_index,
    )  # fmt: skip
    x, y, r, r_y = both_sides(embeddings, labels, references, reference_labels, exclude)[:4]
    return (
        form(x, dtype=dtype), form(y, dtype=torch.int64), form(r, dtype=dtype),
        form(r_y, dtype=torch.int64), references is None,
        None if exclude is None else form(exclude, dtype=torch.int64),
        normalizes(distance, normalize_embeddings),
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
        exclude: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        rows = both_sides(embeddings, labels, references, reference_labels, exclude)
        return operator(*rows, *options)

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
