# SPDX-License-Identifier: Apache-2.0
"""The harness that times the ops: what it records, what it refuses, and what the report makes of
it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import each_info
from torch.utils.flop_counter import FlopCounterMode

from kdkernels.cli import bench as command
from kdkernels.cli.main import main
from kdkernels.ops.pkt import pkt
from kdkernels.reference import _lsh_bce as reference
from kdkernels.reference import _pkt as reference_of_pkt
from kdkernels.testing import bench, numerics, peak, record
from kdkernels.testing.clock import HostClock
from kdkernels.testing.opinfo import OpInfo, opinfos

CPU = torch.device("cpu")
INFOS = {info.name: info for info in opinfos()}
ROOT = Path(__file__).parents[1]


def _tiny(info: OpInfo) -> Any:
    shape = info.bench[0]
    return dataclasses.replace(
        shape, sizes={name: min(size, 24) for name, size in shape.sizes.items()}
    )


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def seconds(self: HostClock, call: bench.Call, first: int, count: int) -> float:
        assert count == 1  # a call of a second is a block of its own
        call(first)
        return 1.0

    monkeypatch.setattr(HostClock, "seconds", seconds)
    calls = {name: (lambda i, name=name: made.append(name)) for name in "abc"}
    timings = bench.measure(calls, seconds=0.0, device=CPU, min_rounds=4, max_rounds=4)
    assert timings == dict.fromkeys("abc", bench.Timing(1e6, 1e6, 1e6, 4))
    # two calls each to warm up; then rounds that begin with another variant each time
    assert "".join(made) == "aabbcc" + "abc" + "bca" + "cab" + "abc"


@pytest.mark.parametrize("mode", bench.MODES)
@each_info()
def test_record(info: OpInfo, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure", functools.partial(bench.measure, warm_up_seconds=0.0))
    told: list[str] = []
    entry = record.run(
        info,
        _tiny(info),
        torch.float32,
        mode,
        device=CPU,
        variants=("reference", "cuda", "eager", "mm"),
        rounds=5,
        memory=False,
        progress=lambda what, share: told.append(what),
    )
    json.dumps(entry, allow_nan=False)
    assert {"error", "time"} <= set(told)
    sample = info.bench_sample(_tiny(info), CPU, torch.float32)
    assert entry["variants"]["cuda"].get("skipped") == bench.rejection(info, sample, "cuda")
    assert entry["oracle"] == "definition in fp64"
    for name in ("reference", "eager"):
        result = entry["variants"][name]
        assert result["rounds"] == 5
        assert 0 < result["time_us"]["p20"] <= result["time_us"]["p80"]
        assert all(
            error < torch.finfo(torch.float32).eps ** 0.5 for error in result["error"].values()
        )
        assert ("percent_of_limit" in result) == (mode == "fwd_bwd")
    eager = entry["variants"]["eager"]
    assert eager["speedup_over_eager"] == 1.0
    assert eager["times_mm"] == pytest.approx(
        eager["time_us"]["p50"] / entry["variants"]["mm"]["time_us"]["p50"], abs=2e-2, rel=1e-2
    )
    assert not any(str(value).startswith("/") for value in entry["environment"].values())


@each_info()
def test_eager_computes_what_the_op_defines(info: OpInfo) -> None:
    sample = info.bench_sample(_tiny(info), CPU, torch.float64)
    hi, hi_gradients = numerics.value_and_grads(
        lambda *args: info.define(sample, args), sample.args, 1
    )
    prepared = bench.variant_sample(info, sample, "eager")
    function = bench.variant_function(info, sample, "eager")
    out, gradients = numerics.value_and_grads(function, prepared.args, 1)
    for what, computed, wanted in (("loss", out, hi), ("gradient", gradients[0], hi_gradients[0])):
        error = numerics.compare(what, computed, wanted, wanted, torch.float64)
        assert error.ok, error.detail


def test_eager_of_lsh_bce_is_given_float_targets() -> None:
    info = INFOS["lsh_bce"]
    sample = info.bench_sample(_tiny(info), CPU, torch.float32)
    for name in ("eager", "compile"):
        prepared = bench.variant_sample(info, sample, name)
        student, targets, weight = prepared.args
        assert student is sample.args[0]
        assert weight is sample.args[2]
        assert targets.dtype == torch.float32
        assert torch.equal(reference.pack(targets.bool()), sample.args[1])
    assert bench.variant_sample(info, sample, "reference") is sample
    summed = dataclasses.replace(sample, kwargs={"reduction": "sum"})
    with pytest.raises(ValueError, match="sample must have no option"):
        bench.variant_function(info, summed, "eager")


@pytest.mark.parametrize("op", ["gram_mse", "lsh_bce"])
def test_the_product_and_a_part_of_it(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = INFOS[op]
    monkeypatch.setattr(bench, "PART_ROWS", 5)
    sample = info.bench_sample(_tiny(info), CPU, torch.float32)
    flops = {}
    for name in ("mm", "mm_part"):
        prepared = bench.variant_sample(info, sample, name)
        x, *rest = prepared.args
        product = bench.variant_function(info, sample, name)(*prepared.args)
        with FlopCounterMode(display=False) as counter:
            expected = x @ x.mT if op == "gram_mse" else x @ rest[1].mT @ rest[1]
        assert torch.equal(product, expected)
        flops[name] = info.product.flops(*prepared.args)
        assert flops[name] == counter.get_total_flops()
    assert len(product) == 5
    # where the full product is skipped, the part gives the rate
    ask = {"device": CPU, "variants": ("reference", "mm"), "rounds": 5, "memory": False}
    entry = record.run(info, _tiny(info), torch.float32, "fwd_bwd", **ask, memory_limit=0.0)
    assert {name for name, result in entry["variants"].items() if "time_us" in result} == {
        "mm_part"
    }
    part = entry["variants"]["mm_part"]
    rate = flops["mm_part"] / part["time_us"]["p50"] * 1e-3
    assert part["gflops_per_second"] == pytest.approx(rate, rel=2e-2, abs=0.1)


@each_info()
def test_what_needs_too_much_memory_is_skipped_before_it_starts(info: OpInfo) -> None:
    huge = dataclasses.replace(info.bench[0], sizes={**info.bench[0].sizes, "B": 1 << 20})
    assert info.memory is not None
    sample = info.bench_sample(_tiny(info), CPU, torch.float32)
    limit = min(8 * bench.GIB, info.memory(huge, torch.float32, "eager") / 2)
    reason = bench.why_skip(info, huge, sample, "eager", torch.float32, limit)
    assert reason is not None
    assert "GiB allowed" in reason
    assert bench.why_skip(info, _tiny(info), sample, "eager", torch.float32, limit) is None


def test_resident_memory_is_seen() -> None:
    program = (
        "from kdkernels.testing import resident\n"
        "print(resident.extra_bytes(lambda: b'1' * (32 * 2**20)))\n"
        "print(resident.extra_bytes(lambda: None))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    block, nothing = map(int, done.stdout.split())
    assert 31 * 2**20 < block < 34 * 2**20
    assert 0 <= nothing < 2**20


@each_info()
def test_memory_of_eager_is_estimated_within_a_factor_of_two(info: OpInfo) -> None:
    shape = info.bench[0]
    # as many classes, or the triplets of some losses would be too many; angles are as many
    rows = 700 if "mining" in shape.kwargs else 300 if info.name == "rkd_angle" else 3000
    sizes = {**shape.sizes, "B": rows, "D": 16}
    shape = dataclasses.replace(shape, sizes=sizes)
    measured = peak.extra_mib(info.name, shape, torch.float32, "fwd_bwd", "eager", CPU)
    estimated = info.memory(shape, torch.float32, "eager") / peak.MIB
    assert estimated / 2 < measured < estimated * 2


@each_info()
def test_the_gate_refuses_wrong_results(info: OpInfo) -> None:
    assert bench.gate(info, "reference", CPU, torch.float32) == []

    @functools.wraps(info.function)
    def function(*args: Any, **kwargs: Any) -> Any:
        return info.function(*args, **kwargs) * 1.01

    wrong = dataclasses.replace(info, function=function)
    failures = bench.gate(wrong, "reference", CPU, torch.float32)
    assert failures
    assert "loss" in failures[0]


def _raising(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("planted")


def test_the_gate_reports_what_raises_and_goes_on() -> None:
    raising = dataclasses.replace(INFOS["pkt"], function=functools.wraps(pkt)(_raising))
    failures = bench.gate(raising, "reference", CPU, torch.float32)
    assert [text.rpartition(", ")[2] for text in failures] == [
        f"{name}: OutOfMemoryError: planted" for name in ("aligned", "ragged_all", "wide")
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


QUICK = ["bench", "--device", "cpu", "--shape", "small", "--rounds", "5", "--no-memory"]


def test_what_is_red_is_not_timed_and_all_else_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "measure", functools.partial(bench.measure, warm_up_seconds=0.0))
    monkeypatch.setattr(
        bench, "gate", lambda info, *args: ["planted"] if info.name == "pkt" else []
    )
    monkeypatch.setattr(reference_of_pkt, "pkt_fwd", lambda *args: pytest.fail("timed"))
    path = tmp_path / "lines.jsonl"
    argv = [*QUICK, "--op", "pkt", "correlation", "--backend", "reference", "eager"]
    assert main([*argv, "--lines", str(path)]) == 1
    assert "FAIL planted" in capsys.readouterr().err
    gates = [line for line in _lines(path) if "gate" in line]
    entries = [line for line in _lines(path) if "gate" not in line]
    key = {"backend": "reference", "dtype": "fp32"}
    assert gates == [
        {"gate": True, "op": "correlation", **key, "wrong": []},
        {"gate": False, "op": "pkt", **key, "wrong": ["planted"]},
    ]
    right, wrong = (entry["variants"] for entry in entries)
    assert wrong["reference"] == {"failed": "a result is wrong: planted"}
    assert wrong["eager"]["time_us"]["p50"] > 0
    assert right["reference"]["time_us"]["p50"] > 0


def test_what_raises_while_it_is_timed_is_a_record(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "measure", functools.partial(bench.measure, warm_up_seconds=0.0))
    monkeypatch.setattr(bench, "gate", lambda *args: [])
    right, calls = reference_of_pkt.pkt_fwd, []

    def of_a_full_device(*args: Any) -> Any:
        calls.append(args)
        return right(*args) if len(calls) < 4 else _raising()

    monkeypatch.setattr(reference_of_pkt, "pkt_fwd", of_a_full_device)
    path = tmp_path / "lines.jsonl"
    argv = [*QUICK, "--op", "pkt", "--backend", "reference", "eager", "--lines", str(path)]
    assert main(argv) == 1
    (entry,) = (line for line in _lines(path) if "gate" not in line)
    failed = entry["variants"]["reference"]
    assert failed["failed"] == "call: OutOfMemoryError: planted"
    assert set(failed["error"]) == {"loss", "dstudent"}  # what was found before
    assert "time_us" not in failed
    assert entry["variants"]["eager"]["rounds"] == 5
    assert "call: OutOfMemoryError: planted" in capsys.readouterr().err


def test_what_a_limit_left_out_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "gate", lambda *args: pytest.fail("begun"))
    path = tmp_path / "lines.jsonl"
    argv = [*QUICK, "--op", "pkt", "rkd_angle", "--limit", "1e-9", "--lines", str(path)]
    assert main(argv) == 0
    entries = _lines(path)
    assert [entry["op"] for entry in entries] == ["pkt", "rkd_angle"]
    for entry in entries:
        assert entry["not_reached"] == "the limit of 1e-09 s was over"
        assert entry["variants"] == {}
    assert "not_reached: the limit of 1e-09 s was over" in capsys.readouterr().err


def test_command_writes_records_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(command, "SWEEP_ROWS", (8, 16))
    monkeypatch.setattr(command, "SWEEP_WIDTH", 8)
    argv = [
        "bench",
        "--device",
        "cpu",
        "--backend",
        "reference",
        "eager",
        "mm",
        "--rounds",
        "5",
        "--no-memory",
    ]
    assert main([*argv, "--sweep", "--op", "gram_mse", "--output", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "sweep_cpu.json").read_text())["records"]
    assert [entry["shape"]["sizes"] for entry in records] == [{"B": 8, "D": 8}, {"B": 16, "D": 8}]
    (plot,) = tmp_path.glob("*.png")
    assert plot.stat().st_size > 5000


def test_command_lists_every_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    text = capsys.readouterr().out
    for info in opinfos():
        assert all(shape.name in text and shape.workload in text for shape in info.bench)
