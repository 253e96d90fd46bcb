# SPDX-License-Identifier: Apache-2.0
"""InfoNCE (van den Oord, Li and Vinyals, 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend
from kdkernels.nn._state import once
from kdkernels.nn._temperature import TemperedLoss
from kdkernels.nn.key_queue import KeyQueue
from kdkernels.ops.info_nce import info_nce


class InfoNCELoss(TemperedLoss):
    r"""Each query shall pick its positive out of all keys, by similarity.

    The mean of -log softmax(sim(query, keys) / temperature)[positive]. See `kdkernels.info_nce`.
    `NTXentLoss`, `SupConLoss` and `CLIPLoss` are uses of it with names of their own. Others:

    - In the batch: `criterion(student, teacher)`, query i belongs to key i.
    - With other negatives, or with keys that belong to several queries: `keys` holds them all, and
      `positives` says which is whose.
    - With a queue: `keys` are the batch's, constants; they enter the queue first, and its keys are
      what a query picks from. So the queue's size counts the batch.
    - With a bank of negatives only, as MoCo has it, where the batch's other keys are none:

          loss = criterion(queries, queue.keys, own_keys=keys)
          queue.enqueue(keys)

    The third one is the loss of DisCo and of DistilCSE's contrastive distillation. Their code
    trains scale = exp(logit_scale) from exp(1), which is one over the temperature here, without a
    bound, keeps 65536 keys beside the batch of B, and starts with none:

        InfoNCELoss(temperature=math.exp(-1), learn_temperature=True, min_temperature=0,
                    queue=KeyQueue(65536 + B, dim, init="empty"))

    with the projection of the student, which is the user's.

    For two views of each image, without the other view's key of the image among a query's
    negatives: the first call computes with its keys and does not keep them, see `update`,

        loss = criterion(s1, t2, update=False) + criterion(s2, t1)

    so that t1 enters the queue. Both calls with an update would have t2 there in the second one.

    Args:
        weight: Factor of the loss.
        temperature: Positive.
        learn_temperature: Train the temperature, as its logarithm, from that start: give the
            parameters of this module to the optimiser.
        min_temperature: Of a learned temperature; 0.01 is CLIP's bound of 100 for the scale, and 0
            is none. The temperature is max(exp(log_temperature), min_temperature). At the bound the
            parameter's derivative is that of exp where it leads up again, and 0 where it would lead
            further down; so the parameter may come to lie below, by an optimiser's momentum, and
            comes back.
        normalize: Similarities are cosines; False takes inner products.
        queue: Of past keys, see above; it becomes part of this module.
        backend: See `kdkernels.explain`.

    Shape:
        - queries: [B, D]; keys: [K, D]. Both receive gradients if they ask for them.
        - positives: the key of each query, integer [B]; None where query i belongs to key i, and
          keys from B on are negatives of all. With a queue keys are [B, D], and positives None.
        - key_labels, own_keys, exclude: as in `kdkernels.info_nce`; None with a queue.
        - update: False computes the same value, from a copy of the queue's keys, and leaves the
          queue as it is. Nothing without a queue.
        - output: scalar, fp32 (fp64 for fp64).

    Attributes:
        log_temperature: A parameter of shape [1], or None. Saved states without a dimension load.
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
        min_temperature: float = 0.01,
        normalize: bool = True,
        queue: KeyQueue | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            weight, temperature, learn_temperature, min_temperature, normalize, backend
        )
        if queue is not None and not isinstance(queue, KeyQueue):
            raise TypeError(f"queue must be a KeyQueue or None, got {type(queue).__name__}")
        if queue is not None and queue.student_keys is not None:
            raise ValueError("queue must keep one side, got one with student_dim")
        self.queue = queue

    def forward(
        self,
        queries: Tensor,  # [B, D]
        keys: Tensor,  # [K, D]
        positives: Tensor | None = None,  # [B]
        *,
        key_labels: Tensor | None = None,  # [K]
        own_keys: Tensor | None = None,  # [B, D]
        exclude: Tensor | None = None,  # [B] or [B, K]
        update: bool = True,
    ) -> Tensor:
        _checks.flag("update", update)
        options = {"key_labels": key_labels, "own_keys": own_keys, "exclude": exclude}
        if self.queue is not None:
            for name, given in {"positives": positives, **options}.items():
                if given is not None:
                    raise ValueError(f"{name} must be None with a queue: query i belongs to key i")
            return self.weight * self._queued(queries, keys, update)
        if positives is None and key_labels is None and own_keys is None:
            positives = _by_order(queries, keys)
        return self.weight * info_nce(queries, keys, positives, **options, **self._options())

    def _queued(self, queries: Tensor, keys: Tensor, update: bool) -> Tensor:
        queue, first = self.queue, _by_order(queries, keys)
        if keys.shape[0] != queries.shape[0]:
            raise ValueError(
                f"keys must have {queries.shape[0]} rows like queries with a queue, "
                f"got {keys.shape[0]}"
            )

        def of(bank: Tensor, places: Tensor, num_keys: Tensor) -> Tensor:
            return info_nce(queries, bank, places, num_keys=num_keys, **self._options())

        def loss(places: Tensor | None) -> Tensor:
            if places is not None:
                return of(queue.keys, places, queue.num_keys)
            if self.training:
                return of(*queue.after(keys))
            with torch.no_grad():
                kept = torch.cat([keys.to(queue.keys.dtype), queue.keys])
            return of(kept, once(first), queue.num_keys + len(keys))

        moves = self.training and update
        enqueue = (lambda: queue.enqueue(keys)) if moves else None
        return queue.step((queries, keys), loss, first=enqueue)


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
