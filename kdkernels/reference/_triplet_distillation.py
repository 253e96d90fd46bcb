# SPDX-License-Identifier: Apache-2.0
"""The definition of triplet distillation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kdkernels.reference._definition import counting, definition
from kdkernels.reference._distances import distances

SHIFT = 1e-6  # of each component of a difference, in torch.nn.TripletMarginLoss


@definition
def triplet_distillation(
    student: Tensor,  # [B, D]
    teacher: Tensor,  # [B, D]
    labels: Tensor,  # [B]
    *,
    margin: float = 5.0,
    negatives: Literal["random", "hardest", "semihard"] = "random",
    sample_mask: Tensor | None = None,  # [B]
    ignore_index: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The definition, differentiable by autograd.

    Random negatives are those that the public function would draw next, which draws with the same
    generator. Here its state is read and left as it is, so that both can be compared. In training
    take the public function for them: torch differentiates it twice, too.
    """
    if ignore_index is not None:
        labelled = labels != ignore_index
        sample_mask = labelled if sample_mask is None else labelled & sample_mask
    student, teacher, labels = counting(sample_mask, student, teacher.detach(), labels)
    allowed = labels[:, None] != labels[None]
    kept = allowed.any(1)
    if negatives == "random":
        index = _drawn(labels, allowed, generator)
        d_ap, d_an = (
            torch.linalg.vector_norm(teacher - rows + SHIFT, dim=1)
            for rows in (student, student[index])
        )
    else:
        d = distances(teacher, student, "euclidean")
        d_ap = d.diagonal()
        if negatives == "semihard":
            allowed = allowed & ~(d <= d_ap[:, None])  # NaN is beyond everything
            kept = allowed.any(1)
        d_an = torch.where(allowed, d, torch.inf).amin(1) if len(d) else d.sum(1)
    losses = torch.where(kept, (d_ap - d_an + margin).clamp_min(0), 0.0)
    return losses.sum() / kept.sum().clamp_min(1)


def _drawn(
    labels: Tensor,  # [B]
    allowed: Tensor,  # [B, B]
    generator: torch.Generator | None,
) -> Tensor:  # [B]
    """The row at place floor(u n) among the n rows of other labels, in the order of the labels;
    u is uniform."""
    if len(labels) == 0:
        return labels.long()
    source = _copy_of(generator, labels.device)
    u = torch.rand(len(labels), dtype=torch.float64, device=source.device, generator=source)
    order = labels.argsort(stable=True)
    others = allowed[:, order]
    place = (u.to(labels.device) * others.sum(1)).long()
    return order[(others & (others.cumsum(1) - 1 == place[:, None])).int().argmax(1)]


def _copy_of(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """A generator in the state of another one, or of torch's own for the device."""
    if generator is not None:
        return torch.Generator(generator.device).set_state(generator.get_state())
    if device.type == "cpu":
        return torch.Generator().set_state(torch.get_rng_state())
    state = torch.get_device_module(device).get_rng_state(device)
    return torch.Generator(device).set_state(state)
