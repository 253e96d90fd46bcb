# SPDX-License-Identifier: Apache-2.0
"""What a loss costs by itself, on the features of a real batch: time per step and peak memory.

A step is forward and backward of the criterion, down to the student's features and logits. Memory
counts what the step allocates above its inputs. On CUDA that is the allocator's own peak. On the
CPU it is the growth of the resident set in a process of its own (`kdkernels.demo.memory`): the
kernels and BLAS take scratch memory that torch's allocator, hence its profiler, never sees, and a
fresh process holds no freed memory that would hide an allocation.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdkernels.demo.losses import Criterion
from kdkernels.demo.models import Outputs
from kdkernels.testing import fresh

_WARM_UP = 2
_ROUNDS = 15


@dataclass(frozen=True)
class Batch:
    """A real step's inputs to a criterion."""

    student: Outputs
    teacher: Outputs
    labels: Tensor  # [B]
    index: Tensor  # [B] in the training set

    def tensors(self) -> dict[str, Tensor]:
        return {
            "student_features": self.student.features,
            "student_logits": self.student.logits,
            "teacher_features": self.teacher.features,
            "teacher_logits": self.teacher.logits,
            "labels": self.labels,
            "index": self.index,
        }

    @staticmethod
    def of(tensors: dict[str, Tensor], rows: int | None = None) -> Batch:
        """The inverse of `tensors`, of the first rows only if asked."""
        part = {name: tensor[:rows] for name, tensor in tensors.items()}
        return Batch(
            Outputs(part["student_features"], part["student_logits"]),
            Outputs(part["teacher_features"], part["teacher_logits"]),
            part["labels"],
            part["index"],
        )


@dataclass(frozen=True)
class StepTime:
    """Milliseconds per step: median, and the 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def step_of(criterion: Criterion, batch: Batch) -> Callable[[], None]:
    """A function that runs the criterion forward and backward once."""
    student = batch.student
    sources = student.features.detach().requires_grad_(), student.logits.detach().requires_grad_()
    outputs = Outputs(*sources)
    trained = [parameter for parameter in criterion.parameters() if parameter.requires_grad]

    def step() -> None:
        loss = criterion(outputs, batch.teacher, batch.labels, batch.index)
        torch.autograd.grad(loss, (*sources, *trained), allow_unused=True)

    return step


def step_times(criteria: dict[str, Criterion], batch: Batch) -> dict[str, StepTime]:
    """Times of each criterion, interleaved: what slows the machine slows all of them."""
    device = batch.labels.device
    steps = {name: step_of(criterion, batch) for name, criterion in criteria.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(_WARM_UP + _ROUNDS):
        for name, step in steps.items():
            _synchronize(device)
            begin = time.perf_counter()
            step()
            _synchronize(device)
            if round_ >= _WARM_UP:
                times[name].append(1e3 * (time.perf_counter() - begin))
    found = {}
    for name, values in times.items():
        fifths = statistics.quantiles(values, n=5)
        found[name] = StepTime(statistics.median(values), fifths[0], fifths[-1])
    return found


def peak_bytes(criterion: Criterion, batch: Batch) -> int:
    """Most memory that a step holds at once above its inputs."""
    device = batch.labels.device
    if device.type == "cuda":
        step = step_of(criterion, batch)
        step()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "step.pt"
        torch.save((criterion, batch.tensors()), path)
        return fresh.call("kdkernels.demo.memory", "peak_bytes", path, torch.get_num_threads())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
