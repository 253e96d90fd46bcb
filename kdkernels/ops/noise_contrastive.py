# SPDX-License-Identifier: Apache-2.0
"""noise_contrastive: the loss of contrastive representation distillation on sampled similarities,
and the moving average of its memories. Both are torch around the operators of sampled_similarity.
Derivation: docs/ops/sampled_similarity.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels._similarity import NOISE_EPS, unit
from kdkernels.ops import sampled_similarity
from kdkernels.ops._gradient_in_forward import GradientInForward


class NoiseContrastive(NamedTuple):
    loss: Tensor  # scalar
    log_partition: Tensor  # scalar: that which was used


def _softplus(x: Tensor) -> Tensor:
    # above 40, exp(-x) is below the rounding of x in fp64
    return F.softplus(x, threshold=40)


def _loss_and_gradient(
    x: Tensor,  # [B, D]
    bank: Tensor,  # [N, D]
    indices: Tensor,  # [B, 1 + m]
    log_partition: Tensor,
    temperature: float,
    need_x: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(loss, the log Z that was used, gradient of x or None)"""
    B, N, m = x.shape[0], bank.shape[0], indices.shape[1] - 1
    logits = sampled_similarity.sampled_similarity_fwd(x, bank, indices, backend)
    logits = logits.div_(temperature)
    log_z = log_partition.to(logits.dtype)
    if B > 0:
        # not math.log, for which a compiler would make one graph per batch size
        of_scores = logits.logsumexp((0, 1)) + logits.new_full((), N / logits.numel()).log()
        log_z = torch.where(log_z.isnan(), of_scores, log_z)
    logits -= log_z
    noise = math.log(m / N + NOISE_EPS)
    first, others = logits[:, 0], logits[:, 1:]
    loss = _softplus(noise - first).sum()
    loss = loss + (_softplus(others - noise) + (noise - math.log(m / N))).sum()
    scale = 1 / max(B, 1)
    dx = None
    if need_x:
        derivative = torch.sigmoid(logits - noise)
        derivative[:, 0] = -torch.sigmoid(noise - first)
        derivative *= scale / temperature
        dx = sampled_similarity.sampled_similarity_bwd(derivative, x, bank, indices, backend)
    log_z = log_z.to(log_partition.dtype)
    log_z = log_z.clone() if log_z is log_partition else log_z
    return loss * scale, log_z, dx


def noise_contrastive(
    x: Tensor,  # [B, D]
    bank: Tensor,  # [N, D]
    indices: Tensor,  # [B, 1 + m]
    log_partition: Tensor,  # scalar
    *,
    temperature: float = 0.07,
    backend: Backend = "auto",
) -> NoiseContrastive:
    r"""Each row shall tell its place in a bank from m others, drawn as noise.

    With o_ik = exp(<x_i, bank[indices_ik]> / temperature) / Z and c = m / N,

        loss = -(1/B) sum_i [ log(o_i0 / (o_i0 + c + eps))
                              + sum_(k >= 1) log(c / (o_ik + c + eps)) ]

    with eps = 1e-7, computed from logarithms: nothing over- or underflows. Z is a constant. The
    gradient of x is made in the forward, so the bank may be changed before the backward.

    Args:
        x: [B, D], and
        bank: [N, D], as for `kdkernels.sampled_similarity`.
        indices: Integer [B, 1 + m] with m of at least 1, the place of the row itself first.
        log_partition: log Z without dimensions; NaN where it is yet to be set, to
            log(N mean(exp(. / temperature))) of these scores. On its device that needs no look.
        temperature: Positive.
        backend: See `kdkernels.explain`.

    Returns:
        (loss, log_partition): scalars, the loss in fp32 (fp64 for fp64 inputs), 0 for an empty
        batch, and the log Z that was used, to be kept.

    Raises:
        TypeError, ValueError: an argument does not fit, by name.

    Reference:
        Tian, Krishnan and Isola, Contrastive Representation Distillation, ICLR 2020,
        arXiv:1910.10699.
    """
    x, bank, indices = sampled_similarity.prepared(x, bank, indices)
    if indices.shape[1] < 2:
        raise ValueError(
            f"indices must have at least 2 columns, its own place and one other, "
            f"got {indices.shape[1]}"
        )
    _checks.features("log_partition", log_partition, min_dim=0)
    if log_partition.dim() != 0:
        raise ValueError(
            f"log_partition must have no dimension, got shape {list(log_partition.shape)}"
        )
    _checks.same_device("log_partition", log_partition, "x", x)
    temperature = _checks.positive("temperature", temperature)
    # the bank may change before the backward, which does not read it
    return NoiseContrastive(
        *GradientInForward.apply(
            _loss_and_gradient, 1, 1.0, x, bank, indices, log_partition, temperature,
            _checks.wants_gradient(x), requested_backend(backend),
        )
    )  # fmt: skip


@torch.no_grad()
def move_rows(
    bank: Tensor,  # [N, D]
    index: Tensor,  # [B]
    rows: Tensor,  # [B, D]
    momentum: float,
) -> None:
    """bank[index] becomes momentum times what it was plus the rest of rows, of unit norm, in place.

    Of rows with the same index the last one counts, on every device.
    """
    index = index.long().contiguous()  # torch.searchsorted warns of strides
    if index.numel() == 0:
        return
    moved = momentum * bank[index] + (1 - momentum) * rows
    order = index.argsort(stable=True)
    last = order[torch.searchsorted(index[order], index, right=True) - 1]
    bank.index_copy_(0, index, unit(moved)[last].to(bank.dtype))
