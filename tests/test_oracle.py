# SPDX-License-Identifier: Apache-2.0
"""What a benchmark's errors are measured against, as far as memory and time allow."""

from __future__ import annotations

import dataclasses
from typing import Any

import fake_cuda
import pytest
import torch
from values import assert_same

from kdkernels.testing import bench, numerics, oracle, record
from kdkernels.testing.opinfo import BenchShape, OpInfo, Sample, opinfos

CUDA = torch.device("cuda")
B = 40
INFOS = {info.name: fake_cuda.on_host(info, B) for info in opinfos()}
BY_ROWS = [name for name, info in INFOS.items() if info.by_rows is not None]
SEVEN_ROWS = 8.0 * oracle.ROW_MATRICES * B * 7  # bytes


def _sample(info: OpInfo, shape: BenchShape, dtype: torch.dtype = torch.float64) -> Sample:
    sample = info.bench_sample(shape, CUDA, dtype)
    if "classes" in shape.sizes:  # of which each has several rows
        x, labels = sample.args
        sample = dataclasses.replace(sample, args=(x, labels % 5))
    return sample


def _nothing() -> None: ...


@pytest.mark.parametrize("name", BY_ROWS)
def test_rows_add_up_to_the_definition(name: str) -> None:
    info = INFOS[name]
    for shape in (shape for shape in info.bench if shape.kwargs.get("kernel") != "student_t"):
        sample = _sample(info, shape)
        value, gradient = oracle._value_and_gradient(bench.definition(info, sample), sample.args)
        found = oracle.by_rows(info.by_rows, sample, SEVEN_ROWS, _nothing)
        assert found.name == "definition in fp64, all rows in parts"
        assert_same(found.value, value)
        assert_same(found.gradient, gradient)


def test_a_kernel_that_rows_do_not_have_is_refused() -> None:
    info = INFOS["pkt"]
    (shape,) = (shape for shape in info.bench if shape.name == "flow")
    with pytest.raises(ValueError, match="sample must have the kernel 'cosine'"):
        oracle.by_rows(info.by_rows, _sample(info, shape), SEVEN_ROWS, _nothing)


def test_without_time_some_rows_of_the_gradient_are_known() -> None:
    info = INFOS["info_nce"]
    sample = _sample(info, info.bench[0])
    _, gradient = oracle._value_and_gradient(bench.definition(info, sample), sample.args)
    found = oracle.by_rows(info.by_rows, sample, SEVEN_ROWS, _nothing, seconds=0.0)
    assert found.name == "definition in fp64, 7 rows of the gradient"
    assert found.value is None
    assert found.rows.tolist() == list(range(0, B, 6))
    assert_same(found.gradient[found.rows], gradient[found.rows])
    function = bench.variant_function(info, sample, "reference")
    errors = oracle.relative_errors(function, sample, found, "queries")
    assert set(errors) == {"dqueries"}
    assert errors["dqueries"] < numerics.FP64_AGREEMENT
    pkt = INFOS["pkt"]
    sample = _sample(pkt, pkt.bench[0])
    with pytest.raises(TimeoutError, match="1 of 6 parts"):
        oracle.by_rows(pkt.by_rows, sample, SEVEN_ROWS, _nothing, seconds=0.0)


def _too_large(info: OpInfo) -> OpInfo:
    """For all that holds matrices."""

    def function(*args: Any, backend: str, **options: Any) -> Any:
        assert backend != "cpu", "which does not run on the device"
        return info.function(*args, backend=backend, **options)

    def memory(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
        wide = variant in ("eager", "reference") and dtype == torch.float64
        return 1e15 if wide else 0.0

    function.__name__ = info.public
    return dataclasses.replace(info, function=function, memory=memory)


@pytest.mark.parametrize("name", ["info_nce", "pkt", "triplet_loss", "contrastive_loss"])
def test_a_gpu_without_room_checks_rows_or_says_that_it_checks_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_cuda.installed(monkeypatch)
    info = _too_large(INFOS[name])
    entry = record.run(
        info, info.bench[0], torch.float32, "fwd_bwd", device=CUDA, variants=("reference", "eager"),
        rounds=5, memory=False,
    )  # fmt: skip
    for result in entry["variants"].values():
        assert result["time_us"]["p50"] > 0
        if info.by_rows is None:
            assert result["error"] == {}
        else:
            assert all(
                error < torch.finfo(torch.float32).eps ** 0.5 for error in result["error"].values()
            )
    if info.by_rows is None:
        reason = "definition in fp64 needs about 931323 GiB of 2"
        assert entry["oracle"].startswith(f"not checked: {reason}; reference backend in fp64")
    else:
        assert entry["oracle"] == "definition in fp64, all rows in parts"


def test_what_raises_leaves_the_next_way(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_cuda.installed(monkeypatch)

    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    info = INFOS["gram_mse"]
    shape, sample = info.bench[0], _sample(info, info.bench[0])
    without = dataclasses.replace(info, definition=full)
    assert oracle.oracle(without, shape, sample, CUDA).name == "reference backend in fp64"
    full.__name__ = info.public
    neither = dataclasses.replace(without, function=full)
    found = oracle.oracle(neither, shape, sample, CUDA)
    assert found.gradient is None
    assert found.name == (
        "not checked: definition in fp64: OutOfMemoryError: planted; "
        "reference backend in fp64: OutOfMemoryError: planted"
    )
