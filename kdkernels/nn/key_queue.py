# SPDX-License-Identifier: Apache-2.0
"""A ring of keys that moves on by a batch per step."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _checks
from kdkernels.nn._state import ProcessState, once, recomputing, same_rows

MOST = 2**31 - 1
INITS = ("random", "columns", "empty")


def _first(size: int, dim: int, init: str, generator: torch.Generator | None) -> Tensor:
    if init == "empty":
        return torch.zeros(size, dim)
    return F.normalize(
        torch.randn(size, dim, generator=generator), dim=0 if init == "columns" else 1
    )


class KeyQueue(ProcessState):
    """The last `size` rows that were enqueued, of one side or of both.

    Any number of rows up to `size` may come at a time: they overwrite the oldest, around the end of
    the ring. Keys are written in place, nothing is copied, and where to write next and how many
    keys count are numbers on the device, so no step waits for it.

    A loss may be computed before and differentiated after keys are enqueued, unless the keys
    themselves, or the teacher, ask for a gradient; then autograd says that they were changed.

    The keys are state of this process. They are in `state_dict` and follow `to`, `half` and the
    like, but they are no buffers: `torch.nn.parallel.DistributedDataParallel` leaves each process
    its own, whatever `broadcast_buffers` says, and `fully_shard` and `FullyShardedDataParallel`
    neither shard nor move them, so move the module to its device first. A state that is saved is
    that of the process which saves it. `torch.nn.DataParallel`, whose copies are thrown away, is
    not for queues.

    In a block under `torch.utils.checkpoint` (or another that computes a forward again within the
    backward) rows are enqueued in the forward and not again; `enqueue` then says where they lie. A
    loss of your own that reads the keys before it enqueues would find them changed there: keep it
    outside of the block. Compiled code that enqueues raises in a block instead.

    Args:
        size: Number of keys.
        dim: Width of a key.
        student_dim: Width of a second key per row, the student's, which lies at the same place;
            None keeps one.
        init: What is there before anything was enqueued. "random" are random rows of unit norm, all
            of which count; "columns" are random rows whose columns have unit norm, which leaves the
            rows at sqrt(dim / size) (RRD's public code; only a loss that does not normalise keys
            notices); "empty" is nothing: `num_keys` grows from 0 to `size`.
        generator: For the first rows; None is torch's own.

    Attributes:
        keys: [size, dim].
        student_keys: [size, student_dim], or None.
        next: int64 without dimensions: the row that is overwritten next.
        num_keys: int64 without dimensions: only the first `num_keys` keys count. It is
            what `num_keys` of `kdkernels.relational_kl` and `kdkernels.info_nce` wants, and needed
            only where `init` is "empty".

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `enqueue` too.
        RuntimeError: `enqueue` runs again within a backward pass, with other rows than the last
            ones, or compiled.

    Example:
        >>> queue = kd.nn.KeyQueue(16384, 128)
        >>> places = queue.enqueue(teacher)
        >>> loss = kd.relational_kl(student, teacher, queue.keys, exclude=places)
    """

    state_names = ("keys", "student_keys", "next", "num_keys")

    keys: Tensor
    student_keys: Tensor | None
    next: Tensor
    num_keys: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        student_dim: int | None = None,
        init: Literal["random", "columns", "empty"] = "random",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        size, dim = _checks.count("size", size, 1, MOST), _checks.count("dim", dim, 1, MOST)
        _checks.choice("init", init, INITS)
        self.init = init
        self.keys = _first(size, dim, init, generator)
        of_student = None
        if student_dim is not None:
            _checks.count("student_dim", student_dim, 1, MOST)
            of_student = _first(size, student_dim, init, generator)
        self.student_keys = of_student
        self.next = torch.zeros((), dtype=torch.int64)
        self.num_keys = torch.tensor(0 if init == "empty" else size)

    def enqueue(
        self,
        rows: Tensor,  # [B, dim]
        student_rows: Tensor | None = None,  # [B, student_dim]
    ) -> Tensor:  # [B] int64
        """Write rows over the oldest keys, in the dtype of the queue.

        Returns:
            Where each row lies, as `exclude` and `positives` want it.
        """
        pairs = self._pairs(rows, student_rows)
        if recomputing():
            return self._places_again(pairs)
        size = self.keys.shape[0]
        places = self._places(rows)

        def write() -> None:
            with torch.no_grad():
                for _, new, _, keys in pairs:
                    keys.index_copy_(0, places, new.to(keys.dtype))
                self.next.add_(rows.shape[0]).remainder_(size)
                self.num_keys.add_(rows.shape[0]).clamp_(max=size)

        overwritten = {keys_name: places for _, _, keys_name, _ in pairs}
        self.move({**overwritten, "next": None, "num_keys": None}, write)
        return places

    @torch.no_grad()
    def after(
        self,
        rows: Tensor,  # [B, dim]
    ) -> tuple[Tensor, Tensor, Tensor]:  # [size, dim], [B], []
        """(keys, places of the rows, num_keys) as `enqueue` would leave them, in a copy of one
        side's keys."""
        self._pairs(rows, None)
        places, size = self._places(rows), self.keys.shape[0]
        keys = self.keys.index_copy(0, places, rows.to(self.keys.dtype))
        return keys, places, (self.num_keys + rows.shape[0]).clamp(max=size)

    def _pairs(
        self, rows: Tensor, student_rows: Tensor | None
    ) -> list[tuple[str, Tensor, str, Tensor]]:
        """(name, rows, name of the keys, keys) of each side, checked."""
        pairs = [("rows", rows, "keys", self.keys)]
        if self.student_keys is not None:
            pairs.append(("student_rows", student_rows, "student_keys", self.student_keys))
        elif student_rows is not None:
            raise ValueError("student_rows must be None for a queue without student_dim")
        size = self.keys.shape[0]
        for name, new, keys_name, keys in pairs:
            _checks.matrix(name, new)
            _checks.same_device(name, new, keys_name, keys)
            if new.shape[1] != keys.shape[1]:
                raise ValueError(
                    f"{name} must have {keys.shape[1]} columns like {keys_name}, got {new.shape[1]}"
                )
            _checks.same_leading(name, new, "rows", rows)
            if new.shape[0] > size:
                raise ValueError(
                    f"{name} must be at most {size}, the size of the queue, got {new.shape[0]}"
                )
        return pairs

    def _places(self, rows: Tensor) -> Tensor:  # [B]
        of_batch = torch.arange(rows.shape[0], device=rows.device)
        return once((self.next + of_batch) % self.keys.shape[0])

    def _places_again(self, pairs: list[tuple[str, Tensor, str, Tensor]]) -> Tensor:  # [B]
        """Where the same rows were enqueued last, in the forward that is computed again."""
        places = self.last_places()
        for _, new, _, keys in pairs:
            same = places is not None and len(places) == len(new)
            if not same or not same_rows(new.to(keys.dtype), keys[places]):
                raise self.refusal("these rows were not the last to be enqueued")
        return places

    def extra_repr(self) -> str:
        dims = f"size={self.keys.shape[0]}, dim={self.keys.shape[1]}"
        if self.student_keys is not None:
            dims += f", student_dim={self.student_keys.shape[1]}"
        return f"{dims}, init={self.init!r}"
