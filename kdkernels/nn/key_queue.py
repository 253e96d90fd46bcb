# SPDX-License-Identifier: Apache-2.0
"""A ring of keys that moves on by a batch per step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels import _checks

MOST = 2**31 - 1


class KeyQueue(nn.Module):
    """The last `size` rows that were enqueued; at first random unit rows.

    Any number of rows may come at a time, more than `size` too: they overwrite the oldest, around
    the end of the ring. Keys are written in place, nothing is copied, and where to write next is a
    number on the device, so no step waits for it.

    A loss may be computed before and differentiated after keys are enqueued, unless the keys
    themselves, or the teacher, ask for a gradient; then autograd says that they were changed.

    Args:
        size: Number of keys.
        dim: Width of a key.
        generator: For the first rows; None is torch's own.

    Attributes:
        keys: [size, dim], a buffer.
        next: int64 without dimensions, a buffer: the row that is overwritten next.

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `enqueue` too.

    Example:
        >>> queue = kd.nn.KeyQueue(16384, 128)
        >>> own = queue.enqueue(teacher)
        >>> loss = kd.relational_kl(student, teacher, queue.keys, exclude=own)
    """

    keys: Tensor
    next: Tensor

    def __init__(self, size: int, dim: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        size, dim = _checks.count("size", size, 1, MOST), _checks.count("dim", dim, 1, MOST)
        self.register_buffer("keys", F.normalize(torch.randn(size, dim, generator=generator)))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(
        self,
        rows: Tensor,  # [B, dim]
    ) -> Tensor:  # [B] int64
        """Write rows over the oldest keys, in the dtype of the queue.

        Returns:
            Where each row lies, as `exclude` and `positives` want it; -1 for one that the same call
            has overwritten.
        """
        _checks.matrix("rows", rows)
        _checks.same_device("rows", rows, "keys", self.keys)
        size, dim = self.keys.shape
        if rows.shape[1] != dim:
            raise ValueError(f"rows must have {dim} columns like keys, got {rows.shape[1]}")
        B = rows.shape[0]
        lost = max(B - size, 0)
        places = (self.next + torch.arange(B, device=rows.device)) % size
        self.keys.index_copy_(0, places[lost:], rows[lost:].to(self.keys.dtype))
        self.next.add_(B).remainder_(size)
        places[:lost] = -1
        return places

    def extra_repr(self) -> str:
        return f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}"
