# SPDX-License-Identifier: Apache-2.0
"""Collects `bench_*.py` here, and puts what was measured beside the times of pytest-benchmark."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kdkernels import _dispatch
from kdkernels.testing import bench, record
from kdkernels.testing.opinfo import BenchShape, OpInfo, opinfos


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kdkernels")
    group.addoption("--bench-device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    group.addoption(
        "--bench-seconds",
        type=float,
        default=3.0,
        help="of the interleaved rounds per shape (default: 3)",
    )


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if (
        file_path.name.startswith("bench_")
        and file_path.suffix == ".py"
        and not parent.session.isinitpath(file_path)
    ):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """op x named shape x dtype x mode x variant, for what the device can run."""
    if "workload" not in metafunc.fixturenames:
        return
    name = metafunc.config.getoption("--bench-device") or (
        "cuda" if torch.cuda.is_available() else "cpu"
    )
    device = torch.device(name)
    params = []
    for info in opinfos():
        for shape in (shape for shape in info.bench if shape.device in (None, device.type)):
            for dtype in (torch.float32, torch.bfloat16):
                for mode in bench.MODES:
                    for variant in record.default_variants(info, device):
                        number = str(dtype).removeprefix("torch.")
                        label = f"{info.name}-{shape.name}-{number}-{mode}-{variant}"
                        params.append(
                            pytest.param((info, shape, dtype, mode, variant, device), id=label)
                        )
    metafunc.parametrize("workload", params)


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest) -> Any:
    """The interleaved record of a shape, measured once for all of its variants."""
    seconds = request.config.getoption("--bench-seconds")
    found = {info.name: info for info in opinfos()}

    @cache
    def of_shape(
        op: str, name: str, dtype: torch.dtype, mode: str, device: torch.device
    ) -> dict[str, Any]:
        info: OpInfo = found[op]
        shape: BenchShape = next(shape for shape in info.bench if shape.name == name)
        return record.run(info, shape, dtype, mode, device=device, seconds=seconds)

    return of_shape


@pytest.fixture(scope="session")
def gated() -> Any:
    """What is wrong with a backend; asked before it is timed."""
    found = {info.name: info for info in opinfos()}

    @cache
    def of_backend(
        op: str, backend: str, device: torch.device, dtype: torch.dtype
    ) -> tuple[str, ...]:
        return (
            tuple(bench.gate(found[op], backend, device, dtype))
            if backend in _dispatch.BACKENDS
            else ()
        )

    return of_backend
