# SPDX-License-Identifier: Apache-2.0
"""Which sample of the data set each row of a loader's batches is.

Nothing is believed that is not known: the places come from the loader's own sampler, from a
function of the user, or from the kind of the loader; every other loader is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sized
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, IterDataPipe, RandomSampler

WAYS_OUT = (
    "give a torch.utils.data.DataLoader, or a list, tuple or generator of batches in the order of "
    "the data set, or index_of=, a function from a batch to the places of its samples"
)
IndexOf = Callable[[Any], Any]


class Places:
    """Where the rows of successive batches belong; each place from 0 on once, without gaps.

    Args:
        samples: How many there are, None where only the end of the loader tells.
    """

    def __init__(self, samples: int | None) -> None:
        self.samples, self.count = samples, 0
        self._found: list[Tensor] = []  # empty while the rows come in order
        self._seen = None if samples is None else torch.zeros(samples, dtype=torch.bool)

    def add(self, rows: int, places: Tensor | None) -> None:
        """The next rows, at their places; None where they follow those before."""
        if places is None:
            places = torch.arange(self.count, self.count + rows)
        elif len(places) != rows:
            raise ValueError(
                f"features must have one row per sample of the batch, {len(places)}, got {rows}"
            )
        if self.samples is not None and len(places) and int(places.max()) >= self.samples:
            raise ValueError(self._once(f"got place {int(places.max())}"))
        if len(places) and int(places.min()) < 0:
            raise ValueError(self._once(f"got place {int(places.min())}"))
        if self._seen is not None:
            again = places[self._seen[places]]
            self._seen[places] = True
            self._refuse_again(again if len(again) else _repeated(places))
        self._found.append(places)
        self.count += rows

    def finish(self) -> Tensor | None:
        """All places, or None where the rows came in order."""
        if self.count == 0:
            raise ValueError("loader must give at least one sample, got none")
        found = torch.cat(self._found)
        self._refuse_again(_repeated(found))
        if self.samples is not None and self.count != self.samples:
            raise ValueError(self._once(f"got {self.count}"))
        if int(found.max()) != self.count - 1:
            raise ValueError(self._once(f"got {self.count}, and place {int(found.max())}"))
        return None if bool((found.diff() == 1).all()) else found

    def _refuse_again(self, again: Tensor) -> None:
        if len(again):
            raise ValueError(self._once(f"got sample {int(again[0])} again"))

    def _once(self, got: str) -> str:
        which = "each sample" if self.samples is None else f"each of the {self.samples} samples"
        return f"loader must give {which} once (drop_last=False), {got}"


def _repeated(places: Tensor) -> Tensor:
    """The places that occur more than once."""
    ordered = places.sort().values
    return ordered[1:][ordered.diff() == 0]


def placed(
    loader: Iterable[Any], index_of: IndexOf | None
) -> tuple[int | None, Iterator[tuple[Any, Tensor | None]]]:
    """(number of samples if it is known, batches with the places of their rows).

    Raises:
        TypeError, ValueError: where each row belongs is not known, naming `loader`.
    """
    if index_of is not None:
        if not callable(index_of):
            raise TypeError(f"index_of must be callable or None, got {type(index_of).__name__}")
        return _samples(loader), ((batch, _places(index_of(batch), "index_of")) for batch in loader)
    if type(loader) is DataLoader:
        return _of_stream(loader) if _is_stream(loader) else _of_data_set(loader)
    # exactly these types: a subclass may do anything, and so may what wraps another loader
    if type(loader) in (list, tuple, GeneratorType):
        return None, ((batch, None) for batch in loader)
    raise ValueError(
        "loader must give its batches in the order of the data set, which a "
        f"{type(loader).__name__} does not promise: {WAYS_OUT}"
    )


def _is_stream(loader: DataLoader[Any]) -> bool:
    return isinstance(loader.dataset, IterableDataset)


def _samples(loader: Iterable[Any]) -> int | None:
    """How many the data set of a loader has, if it says so."""
    data = getattr(loader, "dataset", None)
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a stream of unknown length
        return None


def _of_stream(loader: DataLoader[Any]) -> tuple[int | None, Iterator[tuple[Any, None]]]:
    """A data set that is iterated has the order in which it comes, if one process iterates it."""
    if loader.num_workers > 1 or isinstance(loader.dataset, IterDataPipe):
        found = (
            "an IterDataPipe, which may shuffle"
            if isinstance(loader.dataset, IterDataPipe)
            else f"{loader.num_workers} workers, each of which iterates its own copy"
        )
        raise ValueError(
            "loader must give its batches in the order of the data set (num_workers=0 or 1 where "
            f"that is an IterableDataset), got {found}: {WAYS_OUT}"
        )
    if loader.drop_last:
        raise ValueError("loader must give each sample once (drop_last=False), got drop_last=True")
    return _samples(loader), ((batch, None) for batch in loader)


class _Recorded:
    """A sampler that keeps what it has drawn until the batch of it has arrived."""

    def __init__(self, sampler: Iterable[Any], batched: bool) -> None:
        self.sampler, self.batched = sampler, batched
        self.drawn: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        for drawn in self.sampler:
            # a sampler may go on to write into the list that it has given, while that waits for a
            # worker
            drawn = list(drawn) if isinstance(drawn, list) else drawn
            self.drawn.append(_places(drawn, "loader's sampler") if self.batched else drawn)
            yield drawn

    def __len__(self) -> int:
        return len(self.sampler)


def _of_data_set(
    loader: DataLoader[Any],
) -> tuple[int | None, Iterator[tuple[Any, Tensor | None]]]:
    """A loader like the given one over a data set with places, whose sampler is listened to.

    Samplers run in this process, and with in_order=True the batches arrive as they were drawn.
    """
    if type(loader.sampler) is RandomSampler:
        raise ValueError(
            "loader must give the samples in the order of the data set (shuffle=False), got a "
            "RandomSampler"
        )
    batched = loader.batch_sampler is not None
    recorded = _Recorded(loader.batch_sampler if batched else loader.sampler, batched)
    sampler = {"batch_sampler": recorded} if batched else {"sampler": recorded, "batch_size": None}
    again: DataLoader[Any] = DataLoader(
        loader.dataset,
        **sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        pin_memory_device=loader.pin_memory_device,
        in_order=True,
    )
    return (_samples(loader) if batched else None), _listening(again, recorded, _samples(loader))


def _listening(
    loader: DataLoader[Any], recorded: _Recorded, samples: int | None
) -> Iterator[tuple[Any, Tensor | None]]:
    items = 0  # of the data set, which are batches themselves
    for batch in loader:
        drawn = recorded.drawn.pop(0)
        if not recorded.batched:
            drawn, items = _item(drawn, items)
        yield batch, drawn
    if items and samples is not None and items != samples:
        raise ValueError(f"loader must give each of the {samples} items once, got {items}")


def _item(drawn: Any, items: int) -> tuple[Tensor | None, int]:
    """(places, items so far) with batch_size=None: one item, or what the data set takes a list
    for."""
    try:
        place = operator.index(drawn)
    except TypeError:
        return _places(drawn, "loader's sampler"), items
    if place != items:
        raise ValueError(
            "loader must give the items of the data set in their order with batch_size=None, "
            f"got item {place} as number {items}: {WAYS_OUT}"
        )
    return None, items + 1


def _places(places: Any, name: str) -> Tensor:  # [B] int64
    """Integers as a sampler or a user gives them."""
    if isinstance(places, Tensor):
        if places.dtype == torch.bool or places.is_floating_point() or places.is_complex():
            raise TypeError(f"{name} must give integers, got {places.dtype}")
        if places.dim() != 1:
            raise ValueError(f"{name} must give integers [B], got shape {list(places.shape)}")
        return places.detach().to("cpu", torch.int64, copy=True)
    try:
        found = [operator.index(place) for place in places]
    except TypeError as error:
        raise TypeError(
            f"{name} must give one integer per sample of a batch, got {type(places).__name__} "
            f"({error}); or give index_of=, a function from a batch to the places of its samples"
        ) from error
    return torch.tensor(found, dtype=torch.int64)
