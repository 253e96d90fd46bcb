# SPDX-License-Identifier: Apache-2.0
"""Commands that go on with what they have written: after an interruption, and by themselves in a
new process where a kernel has broken the device."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch

from kdkernels.cli import bench as bench_command
from kdkernels.cli import check as check_command
from kdkernels.cli import lines
from kdkernels.cli.main import main
from kdkernels.reference import _pkt as reference
from kdkernels.testing import bench, clock
from kdkernels.testing.opinfo import opinfos

CHECK = ["check", "--quick", "--backend", "reference", "--dtype", "float32", "--op", "pkt"]
BENCH = ["bench", "--device", "cuda", "--op", "pkt", "--shape", "small", "--rounds", "5"]


class Replaced(Exception):
    """The process became another."""


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Of the processes that took the place of this one."""
    found: list[list[str]] = []

    def become(program: str, command: list[str]) -> None:
        assert program == sys.executable
        found.append(command)
        raise Replaced

    monkeypatch.setattr(lines.os, "execv", become)
    monkeypatch.setattr(lines.os, "closerange", lambda first, last: None)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _next(command: list[str]) -> list[str]:
    assert command[:3] == [sys.executable, "-m", "kdkernels"]
    return command[3:]


def test_a_check_goes_on_with_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lines"
    assert main([*CHECK, "--lines", str(path)]) == 0
    whole = capsys.readouterr().out
    *before, last, end = path.read_text().splitlines()
    path.write_text("\n".join(before) + "\n" + last[:10])  # killed while it wrote
    before.append(last)
    run: list[Any] = []
    right = check_command.numerics.check_sample
    monkeypatch.setattr(
        check_command.numerics, "check_sample", lambda *args: run.append(args) or right(*args)
    )
    assert main([*CHECK, "--lines", str(path), "--resume"]) == 0
    assert len(run) == 1
    assert capsys.readouterr().out == whole
    after, wanted = _lines(path), [json.loads(line) for line in (*before, end)]
    assert [line | {"seconds": 0} for line in after] == [line | {"seconds": 0} for line in wanted]
    assert main([*CHECK, "--resume"]) == 2


def test_a_check_that_lost_its_device_goes_on_in_a_new_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commands: list[list[str]]
) -> None:
    path = tmp_path / "lines"
    argv = [*CHECK, "--lines", str(path), "--limit", "100", "--json", str(tmp_path / "json")]

    def breaks(*args: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    with monkeypatch.context() as broken:
        broken.setattr(reference, "pkt_fwd", breaks)
        broken.setattr(clock, "lost", lambda device: "it is lost")
        with pytest.raises(Replaced):
            main(argv)
    (command,) = commands
    words = _next(command)
    assert words[: len(argv)] == argv
    assert words[len(argv) : -1] == ["--resume", "--limit"]
    assert 0 < float(words[-1]) < 100
    assert main(words) == 1
    found = json.loads((tmp_path / "json").read_text())
    assert [sample["ok"] for sample in found["samples"]] == [False] + [True] * found["passed"]
    assert found["passed"] > 1
    assert "illegal memory access" in found["samples"][0]["message"]


def test_a_benchmark_that_lost_its_device_goes_on_without_what_broke_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, commands: list[list[str]]
) -> None:
    fake = fake_cuda.installed(monkeypatch)
    infos = tuple(fake_cuda.on_host(info, 24) for info in opinfos())
    monkeypatch.setattr(bench_command, "opinfos", lambda: infos)
    monkeypatch.setattr(bench, "measure", functools.partial(bench.measure, warm_up_seconds=0.0))
    monkeypatch.setattr(bench, "gate", lambda *args: [])
    path = tmp_path / "lines"
    argv = [*BENCH, "--backend", "reference", "eager", "mm", "--lines", str(path)]

    def breaks(*args: Any) -> Any:
        fake.lost = "it is lost" if fake.capturing else None
        if fake.capturing:
            raise RuntimeError("an illegal memory access was encountered")
        return right(*args)

    right = reference.pkt_fwd
    monkeypatch.setattr(reference, "pkt_fwd", breaks)
    with pytest.raises(Replaced):
        main(argv)
    fake.lost = None
    (command,) = commands
    assert _next(command) == [*argv, "--resume"]
    assert main(_next(command)) == 1
    gate, lost, graph, call = _lines(path)
    assert gate["gate"]
    assert (lost["lost_device"], lost["variant"]) == ("it is lost", "reference")
    assert [entry["timing"] for entry in (graph, call)] == ["graph", "call"]
    for entry in (graph, call):
        assert entry["variants"]["reference"] == {"failed": "it broke the device: it is lost"}
        assert entry["variants"]["eager"]["rounds"] == 5
    assert main(_next(command)) == 1  # with nothing left to do
    assert _lines(path) == [gate, lost, graph, call]


def test_a_device_that_takes_work_is_not_lost() -> None:
    assert clock.lost(torch.device("cpu")) is None
    found = clock.lost(torch.device("cuda"))
    assert (found is None) == torch.cuda.is_available()
