# SPDX-License-Identifier: Apache-2.0
"""State of one process that a training step moves: queues and memories.

It is not a buffer, since `DistributedDataParallel` writes rank 0's buffers over everybody's before
each forward; and a forward that `torch.utils.checkpoint` runs again must not move it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

FORWARDS = 4  # that are remembered, of those that can be computed again
ROUNDINGS = 32  # by which rows that are computed again may differ


def recomputing() -> bool:
    """Whether this runs inside a backward pass, where torch.utils.checkpoint calls a forward
    again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _once(x: Tensor) -> Tensor:
    """A copy, made when the operator runs: the trace of compiled code knows no backward pass."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a compiled loss would read or move its queue or memory a second time inside a "
            "backward pass, as torch.utils.checkpoint has it. Compute the loss outside the "
            "checkpointed block, or leave it out of what is compiled"
        )
    return x.clone()


_library = torch.library.Library("kdkernels", "FRAGMENT")
_library.define("once(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("once", _once, "CompositeExplicitAutograd")
torch.library.register_fake("kdkernels::once", torch.empty_like, lib=_library)


def once(x: Tensor) -> Tensor:
    """In compiled code, what a loss needs and what is not to be computed again: it raises there."""
    return torch.ops.kdkernels.once(x) if torch.compiler.is_compiling() else x


Signature = tuple[tuple[Tensor, int], ...]


def _same_state(a: Signature, b: Signature) -> bool:
    return all(x is y and v == w for (x, v), (y, w) in zip(a, b, strict=True))


class _Rows:
    """What tells the rows of one forward from others: one weighted sum per row."""

    def __init__(self, rows: tuple[Tensor, ...]) -> None:
        with torch.no_grad():
            self.sums = [self._sum(x.detach()) for x in rows]

    @staticmethod
    def _sum(x: Tensor) -> tuple[Tensor, Tensor]:  # [B], [B]
        """(sum, how far it may be off)."""
        if not x.is_floating_point():
            return x.clone(), torch.zeros_like(x)
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        by = torch.arange(x.shape[-1], device=x.device, dtype=acc).cos()
        terms = x.to(acc) * by
        error = ROUNDINGS * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(terms, dim=-1)
        return terms.sum(-1), error

    def same(self, other: _Rows) -> bool:
        for (a, error), (b, _) in zip(self.sums, other.sums, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
                return False
            close = (a == b) | ((a - b).abs() <= error)
            if a.is_floating_point():
                close |= a.isnan() & b.isnan()
            if not bool(close.all()):
                return False
        return True


def same_rows(a: Tensor, b: Tensor) -> bool:
    """Whether rows are the same ones, up to the rounding of what is computed again."""
    return _Rows((a,)).same(_Rows((b,)))


@dataclass
class _Forward:
    rows: _Rows
    given: Any  # what came before the loss
    seen: Signature
    again: bool = False  # it has been computed again


@dataclass
class _Move:
    overwritten: list[tuple[Tensor, Tensor | None, Tensor]]  # (state, rows of it or None, values)
    before: Signature
    after: Signature


class ProcessState(nn.Module):
    """A module with tensors that belong to one process and that its training steps move.

    The tensors named in `state_names` are plain attributes. They are in `state_dict` and are moved
    and converted as buffers are, but `buffers()` does not list them.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self._forwards: deque[_Forward] = deque(maxlen=FORWARDS)
        self._last_move: _Move | None = None

    # What buffers do, by making the state buffers for as long as that takes.

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        for name in self.state_names:
            self._buffers[name] = self.__dict__.pop(name)
        try:
            yield
        finally:
            for name in self.state_names:
                self.__dict__[name] = self._buffers.pop(name)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._as_buffers():
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._as_buffers():
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_buffers():
            return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_forwards": None, "_last_move": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in self.state_names:  # modules that were pickled when these were buffers
            if name in self._buffers:
                self.__dict__[name] = self._buffers.pop(name)
        self._forget()

    # What a step does to it.

    def step(
        self,
        rows: tuple[Tensor, ...],
        loss: Callable[[Any], Any],
        *,
        first: Callable[[], Any] | None = None,
        then: Callable[[Any], None] | None = None,
    ) -> Any:
        """`loss(first())`, and `then` of its result: once, however often the loss is computed.

        Inside a backward pass only `loss` is called, with what `first` has returned in the forward
        with the same rows and on the state as that one saw it. The backward of a loss reads no
        state.
        """
        if recomputing():
            found = self._find(_Rows(rows))
            if found is None:
                return loss(None if first is None else first())
            with self._as_seen(found):
                return loss(found.given)
        given = None if first is None else first()
        if not torch.compiler.is_compiling() and self._may_come_again():
            kept = (x for x in self._forwards if not x.again)
            found = _Forward(_Rows(rows), given, self._signature())
            self._forwards = deque((*kept, found), maxlen=FORWARDS)
        result = loss(given)
        if then is not None:
            then(result)
        return result

    def move(self, rows_of: dict[str, Tensor | None], write: Callable[[], None]) -> None:
        """Write to the state, outside of any backward pass.

        Args:
            rows_of: What is overwritten: of each tensor by name the rows, or None for all of it.
            write: Does it.
        """
        if torch.compiler.is_compiling():
            write()
            return
        kept = None
        if self._may_come_again():
            states = ((self.__dict__[name], rows) for name, rows in rows_of.items())
            kept = [(x, rows, _read(x, rows)) for x, rows in states]
        before = self._signature()
        write()
        self._last_move = None if kept is None else _Move(kept, before, self._signature())

    def _signature(self) -> Signature:
        states = (self.__dict__[name] for name in self.state_names)
        return tuple((x, x._version) for x in states if x is not None)

    def _may_come_again(self) -> bool:
        """Whether a forward that runs now may be computed again: hooks keep what it saves, or
        nothing is saved (use_reentrant=True). In evaluation the latter is no sign of it."""
        if torch.is_inference_mode_enabled():
            return False
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return True
        return self.training and not torch.is_grad_enabled()

    def _find(self, rows: _Rows) -> _Forward | None:
        """The forward that is computed again; None for one of evaluation that was not kept."""
        found = [x for x in reversed(self._forwards) if x.rows.same(rows)]
        if not found:
            if not self.training:
                return None
            raise self.refusal("none of the last forwards had these rows")
        if any(not (x.again or _same_state(x.seen, found[0].seen)) for x in found[1:]):
            raise self.refusal("several forwards had these rows, and the state moved in between")
        found[0].again = True
        return found[0]

    @contextmanager
    def _as_seen(self, forward: _Forward) -> Iterator[None]:
        """The state as a forward saw it: as it is, or as it was before the last move."""
        now, last = self._signature(), self._last_move
        if _same_state(forward.seen, now):
            yield
            return
        if last is None or not (
            _same_state(last.after, now) and _same_state(last.before, forward.seen)
        ):
            raise self.refusal("its state has moved on since")
        moved = [(x, rows, _read(x, rows)) for x, rows, _ in last.overwritten]
        try:
            for x, rows, values in last.overwritten:
                _write(x, rows, values)
            yield
        finally:
            for x, rows, values in moved:
                _write(x, rows, values)
            self._renumber(now)

    def _renumber(self, old: Signature) -> None:
        """The state is what it was at `old`, but its tensors count two more writes."""
        now, last = self._signature(), self._last_move
        for one in self._forwards:
            one.seen = now if _same_state(one.seen, old) else one.seen
        if last is not None:
            last.after = now if _same_state(last.after, old) else last.after

    def last_places(self) -> Tensor | None:
        """The rows of its first tensor that the last move has overwritten, if nothing moved since
        then and it may have to be known again."""
        last = self._last_move
        if last is None or not _same_state(last.after, self._signature()):
            return None
        return last.overwritten[0][1]

    def refusal(self, why: str) -> RuntimeError:
        return RuntimeError(
            f"{type(self).__name__} is called inside a backward pass, as torch.utils.checkpoint "
            f"does to compute a forward again, but {why}. Call backward before the next forward, "
            "or compute the loss outside the checkpointed block"
        )


def _read(x: Tensor, rows: Tensor | None) -> Tensor:
    return x.clone() if rows is None else x[rows]


@torch.no_grad()
def _write(x: Tensor, rows: Tensor | None, values: Tensor) -> None:
    if rows is None:
        x.copy_(values)
    else:
        x.index_copy_(0, rows, values)
