# SPDX-License-Identifier: Apache-2.0
"""What the definitions of losses of labelled rows share."""

from __future__ import annotations

from torch import Tensor

from kdkernels.reference._rows import unit as rows_of_unit_norm


def sides(
    embeddings: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    references: Tensor | None,  # [M, D]
    reference_labels: Tensor | None,  # [M]
    unit: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
    """(embeddings, labels, references, reference_labels, in_batch), with unit rows if asked."""

    def rows(x: Tensor) -> Tensor:
        return rows_of_unit_norm(x) if unit else x

    x = rows(embeddings)
    if references is None or reference_labels is None:
        return x, labels, x, labels, True
    return x, labels, rows(references), reference_labels, False
