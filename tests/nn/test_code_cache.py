# SPDX-License-Identifier: Apache-2.0
"""The file of a teacher's codes: round trip, refusals, and what an interrupted run leaves."""

from __future__ import annotations

import hashlib
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from codes import BITS, DIM, SAMPLES, images, loader, make_criterion, make_teacher
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.data import DataLoader, IterableDataset

from kdkernels.nn import CodeCache, encode_dataset, fingerprint


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


@pytest.mark.parametrize(
    "wrapped",
    [
        torch.compile,
        nn.DataParallel,
        lambda teacher: nn.DataParallel(torch.compile(teacher)),
        checkpoint_wrapper,
        lambda teacher: nn.Sequential(teacher[0], torch.compile(teacher[1]), teacher[2]),
        lambda teacher: nn.Sequential(teacher[0], checkpoint_wrapper(teacher[1]), teacher[2]),
    ],
)
def test_a_wrapped_teacher_is_the_same_teacher(path: Path, wrapped: Any) -> None:
    """Whichever of the two was hashed; another one is told apart as before."""
    teacher, other = make_teacher(), make_teacher(5)
    assert fingerprint(wrapped(teacher)) == fingerprint(teacher)
    assert fingerprint(wrapped(other)) != fingerprint(teacher)
    encode_dataset(wrapped(teacher), loader(), make_criterion(), path)
    for one in (teacher, wrapped(teacher)):
        CodeCache(path, teacher=one)
    with pytest.raises(ValueError, match="teacher must be the one"):
        CodeCache(path, teacher=wrapped(other))


def test_files_of_wrapped_teachers_from_before_are_still_theirs(path: Path) -> None:
    """Their fingerprint was that of the names with the prefixes."""
    teacher = nn.DataParallel(make_teacher())
    encode_dataset(teacher, loader(), make_criterion(), path)
    digest = hashlib.sha256()
    for name, value in teacher.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.contiguous().numpy().tobytes())
    new = fingerprint(teacher).encode()
    path.write_bytes(path.read_bytes().replace(new, digest.hexdigest().encode()))
    assert CodeCache(path, teacher=teacher).teacher == digest.hexdigest() != new.decode()


def test_an_empty_data_set_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="loader must give at least one sample, got none"):
        encode_dataset(make_teacher(), [], make_criterion(), path)
    assert list(path.parent.iterdir()) == []


CUT = """
import os, sys
from kdkernels.nn import CodeCache
cache = CodeCache(sys.argv[1])
kept = cache[2], cache[3:5]
os.truncate(sys.argv[1], 0)
for read in (lambda: cache[0], lambda: cache[[0, 1]], lambda: cache[1:], lambda: cache.codes):
    try:
        read()
    except RuntimeError as error:
        print(error)
print(*(x.sum().item() for x in kept), cache.weight.shape[0])
"""


def test_a_file_that_is_cut_while_it_is_open(path: Path) -> None:
    """In a process of its own, since reading what is gone would end it with SIGBUS."""
    cache = encode_dataset(make_teacher(), loader(), make_criterion(), path)
    size, sums = path.stat().st_size, [cache[part].sum().item() for part in (2, slice(3, 5))]
    command = [sys.executable, "-c", CUT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *errors, kept = done.stdout.splitlines()
    assert kept == f"{sums[0]} {sums[1]} {BITS}"
    expected = f"{path} has been cut to 0 bytes since it was opened, expected {size}"
    assert [error.startswith(expected) for error in errors] == [True] * 4
