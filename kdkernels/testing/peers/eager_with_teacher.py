# SPDX-License-Identifier: Apache-2.0
"""Losses in torch that compute what they need of the teacher in each step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.reference import _lsh_bce as reference
from kdkernels.testing.opinfo import Sample
from kdkernels.testing.opinfos.lsh_bce import bench_teacher
from kdkernels.testing.peers import Peer


def with_teacher(sample: Sample) -> Sample:
    """The sample with the teacher's features, [B, D], in place of the codes.

    Raises:
        ValueError: The codes are not those of `bench_teacher`.
    """
    student, codes, weight = sample.args
    teacher = bench_teacher(student)
    if not torch.equal(reference.lsh_encode(teacher, weight), codes):
        raise ValueError("sample must have the codes of the teacher of benchmarks")
    return Sample(sample.name, (student, teacher, weight), sample.kwargs)


def lsh_bce(sample: Sample) -> Callable[..., Tensor]:
    """Targets by projecting the teacher, then the loss on them.

    Raises:
        ValueError: An option that is not written here.
    """
    if sample.kwargs:
        raise ValueError(f"sample must have no option, got {sample.kwargs}")

    def call(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            targets = (F.linear(teacher, weight) > 0).to(student.dtype)  # [B, N]
        return F.binary_cross_entropy_with_logits(F.linear(student, weight), targets)

    return call


PEERS = {
    "lsh_bce": Peer(
        computes="The whole loss in eager mode, from the teacher's features instead of codes: "
        "projects both in each step, and compares with float targets; gradient included.",
        function=lsh_bce,
        prepare=with_teacher,
    )
}
