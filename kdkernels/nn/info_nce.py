# SPDX-License-Identifier: Apache-2.0
"""InfoNCE (van den Oord, Li and Vinyals, 2018)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.nn._state import once
from kdkernels.nn.key_queue import KeyQueue
from kdkernels.ops.info_nce import info_nce


class InfoNCELoss(nn.Module):
    r"""Each query shall pick its positive out of all keys, by similarity.

    The mean of -log softmax(sim(query, keys) / temperature)[positive]. See `kdkernels.info_nce`.
    Three uses:

    - In the batch: `criterion(student, teacher)`, query i belongs to key i.
    - With other negatives, or with keys that belong to several queries: `keys` holds them all, and
      `positives` says which is whose.
    - With a queue: `keys` are the batch's, constants; they enter the queue first, and its keys are
      what a query picks from. So the queue's size counts the batch.

    The last one is the loss of DisCo and of DistilCSE's contrastive distillation. Their code trains
    scale = exp(logit_scale) from exp(1), which is one over the temperature here, keeps 65536 keys
    beside the batch of B, and starts with none:

        InfoNCELoss(temperature=math.exp(-1), learn_temperature=True,
                    queue=KeyQueue(65536 + B, dim, init="empty"))

    with the projection of the student, which is the user's. MoCo's differs: there the queue holds
    negatives only, and the other keys of the batch are none.

    For two views of each image, without the other view's key of the image among a query's
    negatives: the first call computes with its keys and does not keep them, see `update`,

        loss = criterion(s1, t2, update=False) + criterion(s2, t1)

    so that t1 enters the queue. Both calls with an update would have t2 there in the second one.

    Args:
        weight: Factor of the loss.
        temperature: Positive.
        learn_temperature: Train the temperature, as its logarithm, from that start: give the
            parameters of this module to the optimiser.
        normalize: Similarities are cosines; False takes inner products.
        queue: Of past keys, see above; it becomes part of this module.
        backend: See `kdkernels.explain`.

    Shape:
        - queries: [B, D]; keys: [K, D]. Both receive gradients if they ask for them.
        - positives: the key of each query, integer [B]; None where query i belongs to key i, and
          keys from B on are negatives of all. With a queue keys are [B, D], and positives None.
        - update: False computes the same value, from a copy of the queue's keys, and leaves the
          queue as it is. Nothing without a queue.
        - output: scalar, fp32 (fp64 for fp64).

    Attributes:
        log_temperature: A parameter without dimensions, or None.
        queue: `KeyQueue`, which moves on in training mode only, or None. In evaluation mode a query
            picks from the batch's keys and a copy of the queue's. See there for several processes
            and for blocks under `torch.utils.checkpoint`, where it moves once.

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
        queue: KeyQueue | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.weight = _arguments.weight(weight)
        self.temperature = _checks.positive("temperature", temperature)
        self.normalize = _checks.flag("normalize", normalize)
        self.backend = backend
        if queue is not None and not isinstance(queue, KeyQueue):
            raise TypeError(f"queue must be a KeyQueue or None, got {type(queue).__name__}")
        if queue is not None and queue.student_keys is not None:
            raise ValueError("queue must keep one side, got one with student_dim")
        self.queue = queue
        self.log_temperature = None
        if _checks.flag("learn_temperature", learn_temperature):
            self.log_temperature = nn.Parameter(torch.tensor(math.log(self.temperature)))

    def forward(
        self,
        queries: Tensor,  # [B, D]
        keys: Tensor,  # [K, D]
        positives: Tensor | None = None,  # [B]
        *,
        update: bool = True,
    ) -> Tensor:
        _checks.flag("update", update)
        if self.queue is not None:
            return self.weight * self._queued(queries, keys, positives, update)
        positives = _by_order(queries, keys) if positives is None else positives
        return self.weight * self._loss(queries, keys, positives)

    def _loss(
        self, queries: Tensor, keys: Tensor, positives: Tensor, num_keys: Tensor | None = None
    ) -> Tensor:
        learned = self.log_temperature
        return info_nce(
            queries,
            keys,
            positives,
            temperature=self.temperature if learned is None else learned.exp(),
            normalize=self.normalize,
            num_keys=num_keys,
            backend=self.backend,
        )

    def _queued(
        self, queries: Tensor, keys: Tensor, positives: Tensor | None, update: bool
    ) -> Tensor:
        queue, first = self.queue, _by_order(queries, keys)
        if positives is not None:
            raise ValueError("positives must be None with a queue: query i belongs to key i")
        if keys.shape[0] != queries.shape[0]:
            raise ValueError(
                f"keys must have {queries.shape[0]} rows like queries with a queue, "
                f"got {keys.shape[0]}"
            )

        def loss(places: Tensor | None) -> Tensor:
            if places is not None:
                return self._loss(queries, queue.keys, places, queue.num_keys)
            if self.training:
                return self._loss(queries, *queue.after(keys))
            with torch.no_grad():
                kept = torch.cat([keys.to(queue.keys.dtype), queue.keys])
            return self._loss(queries, kept, once(first), queue.num_keys + len(keys))

        moves = self.training and update
        enqueue = (lambda: queue.enqueue(keys)) if moves else None
        return queue.step((queries, keys), loss, first=enqueue)

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight:g}, temperature={self.temperature:g}, "
            f"learn_temperature={self.log_temperature is not None}, normalize={self.normalize}, "
            f"backend={self.backend!r}"
        )


def _by_order(queries: Tensor, keys: Tensor) -> Tensor:  # [B]
    """Query i belongs to key i."""
    _checks.matrix("queries", queries)
    _checks.matrix("keys", keys)
    B = queries.shape[0]
    if keys.shape[0] < B:
        raise ValueError(
            f"keys must have at least {B} rows, one per query, where positives are left out, "
            f"got {keys.shape[0]}"
        )
    return torch.arange(B, device=queries.device)
