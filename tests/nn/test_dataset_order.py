# SPDX-License-Identifier: Apache-2.0
"""Loaders of all kinds: a code is that of its sample, or the loader is refused."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import SAMPLES, images, make_criterion, make_teacher
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from kdkernels.nn import encode_dataset


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.codes"


class Numbered(torch.utils.data.Dataset):
    """Samples that know where they are; the first ones of each worker come late."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int | list[int]) -> tuple[Tensor, Tensor]:
        if torch.utils.data.get_worker_info() is not None and index < 5:
            time.sleep(0.1)
        return images()[index], torch.as_tensor(index)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(images())


class Epochs:
    """Samples of all classes in each batch: written into one list, which shuffles."""

    def __init__(self, places: list[int] | None = None) -> None:
        self.places = list(range(SAMPLES)) if places is None else places

    def __iter__(self) -> Iterator[list[int]]:
        drawn = []
        for batch in torch.tensor(self.places)[torch.randperm(len(self.places))].split(5):
            drawn[:] = batch.tolist()
            yield drawn


class Wrapped:
    """What other libraries put around a loader."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.dataset, self.batch_sampler = inner, inner.dataset, inner.batch_sampler

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner)


class Reversed(DataLoader):
    def __iter__(self) -> Iterator[Any]:
        return reversed(list(super().__iter__()))


class Backwards(SequentialSampler):
    def __iter__(self) -> Iterator[int]:
        return iter(range(SAMPLES)[::-1])


def of(**options: Any) -> DataLoader:
    return DataLoader(Numbered(), **options)


WEIGHTS = torch.ones(SAMPLES)
HALF = list(range(0, SAMPLES, 2))
# name -> (how to make the loader, whether its order is known)
LOADERS: dict[str, tuple[Callable[[], Any], bool]] = {
    "plain": (lambda: of(batch_size=5), True),
    "workers": (lambda: of(batch_size=5, num_workers=2), True),
    "workers that overtake": (lambda: of(batch_size=5, num_workers=2, in_order=False), True),
    "batch_sampler": (lambda: of(batch_sampler=Epochs()), True),
    "batch_sampler, workers that overtake": (
        lambda: of(batch_sampler=Epochs(), num_workers=2, in_order=False),
        True,
    ),
    "random batch_sampler": (
        lambda: of(batch_sampler=BatchSampler(SubsetRandomSampler(range(SAMPLES)), 4, False)),
        True,
    ),
    "sampler": (lambda: of(batch_size=5, sampler=SubsetRandomSampler(range(SAMPLES))), True),
    "subclass of a sampler": (lambda: of(batch_size=5, sampler=Backwards(Numbered())), True),
    "sampler of lists": (lambda: of(batch_size=None, sampler=Epochs()), True),
    "tensors as places": (lambda: of(batch_sampler=torch.randperm(SAMPLES).split(4)), True),
    "stream": (lambda: DataLoader(Stream(), 4), True),
    "list": (lambda: list(of(batch_size=5)), True),
    "tuple": (lambda: images().split(5), True),
    "generator": (lambda: (x for x in images().split(5)), True),
    "batches as items": (lambda: DataLoader(images().split(5), batch_size=None), True),
    "shuffle": (lambda: of(batch_size=5, shuffle=True), False),
    "shuffled items": (
        lambda: DataLoader(
            images().split(5), batch_size=None, sampler=SubsetRandomSampler(range(5))
        ),
        False,
    ),
    "drop_last": (lambda: of(batch_size=5, drop_last=True), False),
    "drop_last of a stream": (lambda: DataLoader(Stream(), 4, drop_last=True), False),
    "replacement": (
        lambda: of(batch_size=5, sampler=WeightedRandomSampler(WEIGHTS, SAMPLES)),
        False,
    ),
    "one sample twice": (lambda: of(batch_sampler=[list(range(SAMPLES)), [3]]), False),
    "gaps": (lambda: of(batch_sampler=Epochs(HALF)), False),
    "one place beyond the end": (lambda: of(batch_sampler=[[-1]]), False),
    "half of a batch lost": (lambda: of(batch_size=5, collate_fn=lambda x: x[0][0][None]), False),
    "stream of workers": (lambda: DataLoader(Stream(), 4, num_workers=2), False),
    "subclass": (lambda: Reversed(Numbered(), 5), False),
    "wrapped": (lambda: Wrapped(of(batch_size=5, shuffle=True)), False),
    "iterator": (lambda: iter(of(batch_size=5, shuffle=True)), False),
    "enumerated": (lambda: enumerate(of(batch_size=5)), False),
    "nothing": (list, False),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_code_is_that_of_its_sample_or_the_loader_is_refused(path: Path, name: str) -> None:
    make, known = LOADERS[name]
    teacher, criterion = make_teacher(), make_criterion()
    expected = encode_dataset(teacher, images().split(5), criterion, path).codes.clone()
    path.unlink()
    if not known:
        with pytest.raises(ValueError, match=r"loader must|features must have one row per sample"):
            encode_dataset(teacher, make(), criterion, path)
        assert list(path.parent.iterdir()) == []
        return
    assert torch.equal(encode_dataset(teacher, make(), criterion, path).codes, expected)


def second(batch: Any) -> Any:
    return batch[1]


@pytest.mark.parametrize("index_of", [second, lambda batch: second(batch).numpy()])
@pytest.mark.parametrize(
    "make",
    [
        lambda: of(batch_size=5, shuffle=True),
        lambda: Wrapped(of(batch_size=5, shuffle=True)),
        lambda: Reversed(Numbered(), 5),
        lambda: iter(of(batch_size=5, shuffle=True, num_workers=2, in_order=False)),
        lambda: DataLoader(Subset(Numbered(), list(range(SAMPLES))), 4, shuffle=True),
    ],
)
def test_batches_may_say_where_their_samples_are(path: Path, make: Any, index_of: Any) -> None:
    teacher, criterion = make_teacher(), make_criterion()
    expected = encode_dataset(teacher, images().split(5), criterion, path).codes.clone()
    made = encode_dataset(teacher, make(), criterion, path, index_of=index_of)
    assert torch.equal(made.codes, expected)


@pytest.mark.parametrize(
    ("index_of", "error", "message"),
    [
        (3, TypeError, "index_of must be callable or None, got int"),
        (lambda batch: batch[1].float(), TypeError, "index_of must give integers, got torch.float"),
        (lambda batch: batch[1][:, None], ValueError, "index_of must give integers [B], got shape"),
        (lambda _: ["a"], TypeError, "index_of must give one integer per sample of a batch"),
        (lambda batch: batch[1][:2], ValueError, "features must have one row per sample of the"),
        (lambda batch: batch[1] * 0, ValueError, "each of the 23 samples once (drop_last=False)"),
        (lambda batch: batch[1] + 1, ValueError, "got place 23"),
    ],
)
def test_bad_places(path: Path, index_of: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        encode_dataset(make_teacher(), of(batch_size=5), make_criterion(), path, index_of=index_of)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([[0, 1], [3]], "each sample once (drop_last=False), got 3, and place 3"),
        ([[0, 1], [1]], "each sample once (drop_last=False), got sample 1 again"),
        ([[0, -1]], "each sample once (drop_last=False), got place -1"),
    ],
)
def test_places_of_an_unknown_number_of_samples(
    path: Path, batches: list[list[int]], message: str
) -> None:
    given = ((images()[index], index) for index in batches)
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_dataset(make_teacher(), given, make_criterion(), path, index_of=second)


def test_a_sampler_is_drawn_from_once(path: Path) -> None:
    """What comes after draws the same numbers as after any epoch."""
    states = []
    for once in (list, lambda one: encode_dataset(make_teacher(3), one, make_criterion(), path)):
        loader = of(batch_sampler=Epochs(), generator=torch.Generator().manual_seed(1))
        make_teacher(3)  # draws its own numbers, and sets the seed
        once(loader)
        states.append((loader.generator.get_state(), torch.get_rng_state()))
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))
