# SPDX-License-Identifier: Apache-2.0
"""Timing on a GPU that is not there (fake_cuda.py): graphs, events and the profiler, and what
becomes of a record where one of them fails."""

from __future__ import annotations

import dataclasses
import functools
import json
import weakref
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch

from kdkernels.cli import bench as command
from kdkernels.cli.main import main
from kdkernels.testing import bench, clock, oracle, record, work
from kdkernels.testing.gpu_table import GPU_TABLE
from kdkernels.testing.opinfo import opinfos

CUDA = torch.device("cuda")
INFOS = {info.name: fake_cuda.on_host(info, 32) for info in opinfos()}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> fake_cuda.Fake:
    monkeypatch.setattr(bench, "measure", functools.partial(bench.measure, warm_up_seconds=0.0))
    return fake_cuda.installed(monkeypatch)


def _run(op: str = "pkt", **options: Any) -> list[dict[str, Any]]:
    info = INFOS[op]
    options = {"variants": ("reference", "eager", "mm"), "rounds": 5} | options
    found = list(
        record.records(info, info.bench[0], torch.float32, "fwd_bwd", device=CUDA, **options)
    )
    json.dumps(found, allow_nan=False)
    return found


def test_a_graph_is_captured_after_warm_up_and_replayed(fake: fake_cuda.Fake) -> None:
    calls: list[tuple[int, bool]] = []

    def make() -> clock.Call:
        return lambda i: calls.append((i, fake.capturing))

    graph = clock.of(CUDA).graph(make, 4)
    warm_up = [(i, False) for i in range(clock.WARM_UP_CALLS)]
    assert calls == warm_up + [(i, True) for i in range(4)]
    assert fake.captures == [True]
    assert (graph.calls, graph.launches, graph.launches_unknown) == (4, fake_cuda.NODES / 4, None)
    seconds = clock.of(CUDA).seconds(graph.call, 0, 5)
    assert fake.replays == 5
    assert seconds >= 5 * fake_cuda.REPLAY_MS * 1e-3
    graph.release()
    assert fake.resets == 1


def test_a_replay_keeps_what_its_graph_reads(fake: fake_cuda.Fake) -> None:
    class Reads:
        def __call__(self, i: int) -> None: ...

    made: list[weakref.ref[Reads]] = []

    def make() -> clock.Call:
        call = Reads()
        made.append(weakref.ref(call))
        return call

    replay = clock.of(CUDA).graph(make, 2).call
    assert made[0]() is not None
    del replay
    assert made[0]() is None


def test_a_graph_whose_nodes_are_not_counted_is_timed(fake: fake_cuda.Fake) -> None:
    fake.nodes_status = 1
    (entry,) = _run(timings=("graph",))
    for result in entry["variants"].values():
        assert result["launches_unknown"] == "RuntimeError: cuGraphGetNodes returned 1"
        assert result["time_us"]["p50"] > 0


def test_kernels_are_those_of_the_device(fake: fake_cuda.Fake) -> None:
    made: list[int] = []
    kernels = clock.of(CUDA).kernels(made.append, 2)
    assert made == [0, 0, 1]
    assert kernels == [clock.Kernel("product", 1.0, 15.0), clock.Kernel("fill", 0.5, 1.0)]
    fake.events = fake_cuda.EVENTS[3:]
    with pytest.raises(RuntimeError, match="the profiler reported no kernel"):
        clock.of(CUDA).kernels(made.append, 2)


def test_records_of_every_way_of_timing(fake: fake_cuda.Fake) -> None:
    graph, call, kernels = _run(timings=("kernels", "call", "graph"))
    assert [entry["timing"] for entry in (graph, call, kernels)] == ["graph", "call", "kernels"]
    info = INFOS["pkt"]
    sample = info.bench_sample(info.bench[0], CUDA, torch.float32)
    sets = len(bench.input_sets(sample, CUDA))
    for entry in (graph, call, kernels):
        assert entry["device"] == "cuda"
        assert entry["device_name"] == "a GPU"
        assert entry["oracle"] == "definition in fp64"
        assert entry["variants"]["reference"]["peak_extra_mib"] == 2.0
        assert set(entry["variants"]["eager"]["error"]) == {"loss", "dstudent"}
        assert entry["variants"]["eager"]["speedup_over_eager"] == 1.0
    for result in graph["variants"].values():
        assert result["launches"] == pytest.approx(fake_cuda.NODES / sets, abs=0.01)
        # a replay stands for all calls in it
        assert result["time_us"]["p50"] < 1.5 * fake_cuda.REPLAY_MS * 1e3 / sets
    assert fake.resets == len(graph["variants"])
    for result in kernels["variants"].values():
        assert result["launches"] == 3 / work.PROFILED_CALLS
        assert result["device_us"] == pytest.approx(32.0 / work.PROFILED_CALLS, abs=0.01)
        assert [kernel["name"] for kernel in result["kernels"]] == ["product", "fill"]
        assert "time_us" not in result
    assert "launches" not in call["variants"]["eager"]


def test_a_capture_that_fails_leaves_the_other_ways(
    fake: fake_cuda.Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = INFOS["pkt"]
    right = info.function

    @functools.wraps(right)
    def waits_for_the_device(*args: Any, **options: Any) -> Any:
        torch.cuda.synchronize()
        return right(*args, **options)

    monkeypatch.setitem(INFOS, "pkt", dataclasses.replace(info, function=waits_for_the_device))
    graph, call = _run(timings=("graph", "call"))
    assert (
        graph["variants"]["reference"]["failed"] == "graph: AssertionError: a capture cannot wait"
    )
    assert graph["variants"]["eager"]["rounds"] == call["variants"]["reference"]["rounds"] == 5


def test_what_lacks_errors_or_memory_is_timed(
    fake: fake_cuda.Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(oracle, "relative_errors", full)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", full)
    (entry,) = _run(timings=("graph",))
    for name in ("reference", "eager"):
        result = entry["variants"][name]
        assert result["error_failed"] == "OutOfMemoryError: planted"
        assert result["peak_extra_mib_skipped"] == "OutOfMemoryError: planted"
        assert result["rounds"] == 5


def test_a_full_device_is_a_record(fake: fake_cuda.Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setitem(INFOS, "pkt", dataclasses.replace(INFOS["pkt"], bench_sample=full))
    for entry in _run(timings=("graph", "call")):
        assert entry["failed"] == "OutOfMemoryError: planted"
        assert entry["variants"] == {}


def test_the_command_measures_the_table(
    fake: fake_cuda.Fake,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(command, "opinfos", lambda: tuple(INFOS.values()))
    monkeypatch.setattr(bench, "gate", lambda *args: [])
    path = tmp_path / "lines.jsonl"
    argv = ["bench", "--device", "cuda", "--table", "--rounds", "5", "--lines", str(path)]
    modes = ["--mode", "graph", "kernels", "--backend", "reference", "eager", "mm"]
    assert main([*argv, *modes]) == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    entries = [line for line in lines if "gate" not in line]
    shapes = [(entry["op"], entry["shape"]["name"], entry["mode"]) for entry in entries]
    assert shapes == [*GPU_TABLE, *GPU_TABLE]  # profiled in the end, when all times are there
    timings = [entry["timing"] for entry in entries]
    assert timings == ["graph"] * len(GPU_TABLE) + ["kernels"] * len(GPU_TABLE)
    for entry in entries:
        assert entry["dtype"] == "bfloat16"
        for result in entry["variants"].values():
            assert {"time_us", "device_us"} & set(result)
            assert "failed" not in result
    assert "by kernels on cuda" in capsys.readouterr().err
    assert main([*argv, "--op", "pkt"]) == 2
    assert "--table has no shape of pkt" in capsys.readouterr().err


def test_a_cpu_has_no_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cpu", "--mode", "graph"]) == 2
    assert "--mode graph needs a GPU, got the device cpu" in capsys.readouterr().err
    assert main(["bench", "--device", "cpu", "--table"]) == 2
    assert "--table needs a GPU, got the device cpu" in capsys.readouterr().err
