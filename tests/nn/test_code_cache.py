# SPDX-License-Identifier: Apache-2.0
"""The file of a teacher's codes: round trip, refusals, and what an interrupted run leaves."""

from __future__ import annotations

import pickle
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from kdkernels.nn import CodeCache, LSHFeatureMimickingLoss, encode_dataset, fingerprint

SAMPLES, DIM, BITS = 23, 6, 21


def images() -> Tensor:
    return torch.randn(SAMPLES, 3, 4, generator=torch.Generator().manual_seed(0))


def make_teacher(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, DIM), nn.Dropout(0.5))


def make_criterion(seed: int = 2, **options: Any) -> LSHFeatureMimickingLoss:
    generator = torch.Generator().manual_seed(seed)
    options = {"std": 0.5, "bias": "zero", "form": "lsh", "hash_bits": BITS, **options}
    return LSHFeatureMimickingLoss(DIM, generator=generator, **options)


def loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(images(), torch.arange(SAMPLES)), batch_size=5, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.codes"


def test_round_trip(path: Path) -> None:
    teacher, criterion = make_teacher(), make_criterion()
    criterion.hash_bias.uniform_(-0.1, 0.1)
    made = encode_dataset(teacher, loader(), criterion, path, progress=False)
    with torch.no_grad():
        expected = criterion.encode(teacher.eval()(images()))
    opened = CodeCache(path, criterion=criterion, teacher=teacher, samples=SAMPLES)
    for cache in (made, opened, pickle.loads(pickle.dumps(opened))):
        assert len(cache) == SAMPLES
        assert torch.equal(cache.codes, expected)
        assert torch.equal(cache.weight, criterion.hash_weight)
        assert torch.equal(cache.bias, criterion.hash_bias)
        assert cache.teacher == fingerprint(teacher)
    index = torch.tensor([7, 0, 22])
    assert torch.equal(opened[index], expected[index])
    assert torch.equal(opened[3], expected[3])
    assert torch.equal(opened[2:5], expected[2:5])
    student = torch.randn(3, DIM)
    with torch.no_grad():
        direct = criterion(student, teacher(images()[index]))
    assert torch.equal(criterion(student, codes=opened[index]), direct)


def test_the_teacher_is_evaluated_and_left_as_it_was(path: Path) -> None:
    teacher = make_teacher()
    teacher.train()
    teacher[1].eval()  # frozen by its owner
    first = encode_dataset(teacher, loader(), make_criterion(), path).codes.clone()
    assert [child.training for child in teacher] == [True, False, True]
    assert teacher.training
    second = encode_dataset(teacher, loader(), make_criterion(), path)
    assert torch.equal(first, second.codes), "dropout was active"


def test_batches_and_outputs_of_another_form(path: Path) -> None:
    class Teacher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make_teacher()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"pooled": self.body(x), "logits": x}

    teacher = Teacher()
    cache = encode_dataset(
        teacher,
        ({"image": x} for x in images().split(4)),
        make_criterion(),
        path,
        inputs=lambda batch: batch["image"],
        features=lambda output: output["pooled"],
    )
    expected = encode_dataset(teacher.body, images().split(23), make_criterion(), path)
    assert torch.equal(cache.codes, expected.codes)


def test_a_stream_has_no_order_to_refuse(path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(images())

    cache = encode_dataset(make_teacher(), DataLoader(Stream(), 4), make_criterion(), path)
    assert len(cache) == SAMPLES


def other(**options: Any) -> dict[str, Any]:
    return {"criterion": make_criterion(**options)}


@pytest.mark.parametrize(
    ("used_with", "message"),
    [
        (other(seed=3), "criterion must have the hash_weight that train.codes was made with, got"),
        (other(hash_bits=16), "torch.float32 [21, 6], got torch.float32 [16, 6]"),
        ({"criterion": make_criterion().double()}, "got torch.float64 [21, 6]"),
        ({"teacher": make_teacher(5)}, "teacher must be the one that train.codes was made with"),
        ({"samples": 22}, "samples must be 23 as in train.codes, got 22"),
    ],
)
def test_what_does_not_match_is_refused(
    path: Path, used_with: dict[str, Any], message: str
) -> None:
    encode_dataset(make_teacher(), loader(), make_criterion(), path)
    with pytest.raises(ValueError, match=re.escape(message)):
        CodeCache(path, **used_with)


def test_another_bias_is_refused(path: Path) -> None:
    criterion = make_criterion()
    encode_dataset(make_teacher(), loader(), criterion, path)
    criterion.hash_bias[3] = 0.5
    with pytest.raises(ValueError, match="criterion must have the hash_bias that"):
        CodeCache(path, criterion=criterion)


@pytest.mark.parametrize("kept", [0.999, 0.5])
def test_a_truncated_file_is_refused(path: Path, kept: float) -> None:
    encode_dataset(make_teacher(), loader(), make_criterion(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"train\.codes is truncated"):
        CodeCache(path)
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match=r"train\.codes has been written to"):
        CodeCache(path)


def test_other_files_are_refused(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CodeCache(path)
    for content in (b"", b"PK" * 5000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a file of codes"):
            CodeCache(path)
    encode_dataset(make_teacher(), loader(), make_criterion(), path)
    newer = path.read_bytes().replace(b'"version": 1', b'"version": 2')
    path.write_bytes(newer)
    with pytest.raises(ValueError, match="has version 2 of the format, expected 1"):
        CodeCache(path)


def test_an_interrupted_run_leaves_what_was_there(path: Path) -> None:
    old = encode_dataset(make_teacher(), loader(), make_criterion(), path).codes.clone()

    def interrupted() -> Iterator[Tensor]:
        yield images()[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_dataset(make_teacher(7), interrupted(), make_criterion(), path)
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    assert torch.equal(CodeCache(path).codes, old)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle": True}, "loader must give the samples in the order of the data set"),
        ({"drop_last": True}, "loader must give each of the 23 samples once (drop_last=False)"),
    ],
)
def test_a_loader_that_loses_the_order_or_samples_is_refused(
    path: Path, options: dict[str, bool], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        encode_dataset(make_teacher(), loader(**options), make_criterion(), path)
    assert list(path.parent.iterdir()) == []


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


def test_a_bias_that_is_not_fitted_is_refused(path: Path) -> None:
    with pytest.raises(RuntimeError, match="fit_bias"):
        encode_dataset(make_teacher(), loader(), make_criterion(bias="median"), path)


def test_fingerprints_tell_teachers_apart() -> None:
    teacher = make_teacher()
    before = fingerprint(teacher)
    assert before == fingerprint(make_teacher())
    assert before != fingerprint(make_teacher().double())
    with torch.no_grad():
        teacher[1].bias[0] += 1e-3
    assert before != fingerprint(teacher)


def test_an_empty_data_set_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="loader must give at least one sample, got none"):
        encode_dataset(make_teacher(), [], make_criterion(), path)
    assert list(path.parent.iterdir()) == []
