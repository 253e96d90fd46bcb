# SPDX-License-Identifier: Apache-2.0
"""InfoNCE (van den Oord, Li and Vinyals, 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.ops.info_nce import info_nce


class InfoNCELoss(nn.Module):
    r"""Each query shall pick its positive out of all keys, by similarity.

    The mean of -log softmax(sim(query, keys) / temperature)[positive]. See `kdkernels.info_nce`.

    Args:
        weight: Factor of the loss.
        temperature: Positive.
        learn_temperature: Train the temperature, as its logarithm, from that start: give the
            parameters of this module to the optimiser.
        normalize: Similarities are cosines; False takes inner products.
        backend: See `kdkernels.explain`.

    Shape:
        - queries: [B, D]; keys: [K, D]. Both receive gradients if they ask for them.
        - positives: the key of each query, integer [B]; None where query i belongs to key i, and
          keys from B on are negatives of all.
        - output: scalar, fp32 (fp64 for fp64).

    Attributes:
        log_temperature: A parameter without dimensions, or None.

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Example:
        >>> criterion = kd.nn.InfoNCELoss()
        >>> loss = criterion(student, torch.cat([teacher, queue.keys]))

    Reference:
        van den Oord, Li and Vinyals, Representation Learning with Contrastive Predictive Coding,
        2018, arXiv:1807.03748.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        normalize: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.weight = _arguments.weight(weight)
        self.temperature = _checks.positive("temperature", temperature)
        self.normalize = _checks.flag("normalize", normalize)
        self.backend = backend
        self.log_temperature = None
        if _checks.flag("learn_temperature", learn_temperature):
            self.log_temperature = nn.Parameter(torch.tensor(math.log(self.temperature)))

    def forward(
        self,
        queries: Tensor,  # [B, D]
        keys: Tensor,  # [K, D]
        positives: Tensor | None = None,  # [B]
    ) -> Tensor:
        if positives is None:
            _checks.matrix("queries", queries)
            _checks.matrix("keys", keys)
            B = queries.shape[0]
            if keys.shape[0] < B:
                raise ValueError(
                    f"keys must have at least {B} rows, one per query, where positives are left "
                    f"out, got {keys.shape[0]}"
                )
            positives = torch.arange(B, device=queries.device)
        learned = self.log_temperature
        return self.weight * info_nce(
            queries,
            keys,
            positives,
            temperature=self.temperature if learned is None else learned.exp(),
            normalize=self.normalize,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight:g}, temperature={self.temperature:g}, "
            f"learn_temperature={self.log_temperature is not None}, normalize={self.normalize}, "
            f"backend={self.backend!r}"
        )
