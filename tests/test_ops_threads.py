# SPDX-License-Identifier: Apache-2.0
"""Generic matrix, threads: the CPU kernels cut their work by shapes alone, so results do not depend
on the number of threads, except where a product of BLAS does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import Case, assert_within_budget, each_case, each_info, gradients, leaves
from torch import Tensor

from kdkernels.testing.opinfo import OpInfo

CPU = torch.device("cpu")
THREADS = (1, 2, 3)
# Ops of which BLAS was seen to round a product differently on one thread (docs/numerics.md).
ROUNDED_BY_BLAS = ("gram_mse", "lsh_bce", "rkd_distance", "sampled_similarity")
MOST_FLOPS = 2e9  # of a workload of the benchmarks: under a second on one core


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def _results(case: Case, threads: int) -> list[Tensor]:
    torch.set_num_threads(threads)
    args = leaves(case)
    value = case.call(*args)
    return [value.detach(), *gradients(value, args)]


def _assert_same_bits(case: Case) -> None:
    if case.info.name in ROUNDED_BY_BLAS:
        for threads in THREADS:
            torch.set_num_threads(threads)
            assert_within_budget(case, case.errors())
        return
    first, *others = (_results(case, threads) for threads in THREADS)
    for threads, results in zip(THREADS[1:], others, strict=True):
        for got, wanted in zip(results, first, strict=True):
            assert torch.equal(got, wanted), f"{case.id}, {threads} threads"


@each_case(
    dtypes=(torch.bfloat16, torch.float32, torch.float64),
    backends=("cpu",),
    devices=(CPU,),
)
def test_results_do_not_depend_on_the_number_of_threads(case: Case) -> None:
    _assert_same_bits(case)


@each_info()
def test_workloads_do_not_depend_on_the_number_of_threads(info: OpInfo) -> None:
    """Large enough to be shared by threads, which most samples are not."""
    if info.name in ROUNDED_BY_BLAS:
        return
    for shape in info.bench:
        if shape.device in (None, "cpu") and info.cost(shape, torch.float32).flops < MOST_FLOPS:
            sample = info.bench_sample(shape, CPU, torch.float32)
            case = Case(info, "cpu", CPU, torch.float32, sample)
            if case.why_not() is None:
                _assert_same_bits(case)
