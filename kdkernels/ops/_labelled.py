# SPDX-License-Identifier: Apache-2.0
"""What the ops on labelled rows share: the checks of their arguments, and the autograd function of
those whose forward computes the gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _checks
from kdkernels._library import first_order

DISTANCES = ("euclidean", "sqeuclidean", "cosine")


def _unit(x: Tensor, normalize: bool) -> Tensor:
    """Unit rows in the accumulation dtype, so that half precision rounds no distance."""
    if not normalize:
        return x
    return F.normalize(x.to(_checks.accumulation_dtype(x.dtype)), dim=-1)


def _labelled(name: str, x: Tensor, labels_name: str, labels: Any) -> None:
    _checks.matrix(name, x)
    _checks.labels(labels_name, labels, name, x)


def labelled_rows(
    embeddings: Tensor,
    labels: Tensor,
    *,
    references: Tensor | None = None,
    reference_labels: Tensor | None = None,
    distance: str = "euclidean",
    normalize_embeddings: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The four tensors checked, with unit rows where asked for and int64 labels.

    None for the references says that they are the embeddings, None for their labels that they are
    the same tensor: Dynamo passes no tensor to an autograd function twice (torch 2.13).
    """
    _labelled("embeddings", embeddings, "labels", labels)
    if (references is None) != (reference_labels is None):
        missing = "references" if references is None else "reference_labels"
        raise ValueError(f"{missing} must be given with the other of the two, got None")
    if references is not None:
        _labelled("references", references, "reference_labels", reference_labels)
        _checks.same_device("references", references, "embeddings", embeddings)
        _checks.same_columns("references", references, "embeddings", embeddings)
        references, embeddings = _checks.same_dtype(
            "references", references, "embeddings", embeddings
        )
    _checks.choice("distance", distance, DISTANCES)
    unit = normalize_embeddings or distance == "cosine"
    embeddings = _unit(embeddings, unit)
    given_labels, labels = labels, labels.to(torch.int64)
    shared = reference_labels is None or reference_labels is given_labels
    reference_labels = None if shared else reference_labels.to(torch.int64)
    if references is not None:
        references = _unit(references, unit)
        references = references.view_as(references) if references is embeddings else references
    return embeddings, labels, references, reference_labels


def both_sides(
    embeddings: Tensor, labels: Tensor, references: Tensor | None, reference_labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """(embeddings, labels, references, reference_labels, own), as operators take them."""
    own = references is None
    return (
        embeddings,
        labels,
        embeddings if own else references,
        labels if reference_labels is None else reference_labels,
        own,
    )


class SummedOverRows(torch.autograd.Function):
    """A sum over pairs or triplets of rows, whose gradient the same sweep has computed.

    The operator returns the sum, counts, and the two derivatives of the sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        references: Tensor | None,
        labels: Tensor,
        reference_labels: Tensor | None,
        operator: Any,
        options: tuple[Any, ...],
        backend: str,
    ) -> tuple[Tensor, ...]:
        rows = both_sides(embeddings, labels, references, reference_labels)
        need = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        *results, dembeddings, dreferences = operator(*rows, *options, *need, backend)
        # the rows themselves only so that a change of them or a second derivative is refused
        inputs = (embeddings,) if references is None else (embeddings, references)
        ctx.save_for_backward(dembeddings, dreferences, *inputs)
        ctx.dtype = embeddings.dtype
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    @first_order
    def backward(ctx: Any, dtotal: Tensor, *_: Any) -> tuple[Any, ...]:
        grads = [
            (dtotal * dx).to(ctx.dtype) if need else None
            for dx, need in zip(ctx.saved_tensors[:2], ctx.needs_input_grad[:2], strict=True)
        ]
        return (*grads, *(None,) * 5)


def summed_fake(counts: int) -> Any:
    """The fake of an operator with so many counts."""

    def fake(
        embeddings: Tensor, labels: Tensor, references: Tensor, reference_labels: Tensor,
        own: bool, *options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        *_, need_embeddings, need_references, _ = options
        acc = _checks.accumulation_dtype(embeddings.dtype)
        return (
            embeddings.new_empty((), dtype=acc),
            *(embeddings.new_empty((), dtype=torch.int64) for _ in range(counts)),
            embeddings.new_empty(embeddings.shape if need_embeddings else (0,), dtype=acc),
            embeddings.new_empty(
                references.shape if need_references and not own else (0,), dtype=acc
            ),
        )

    return fake
