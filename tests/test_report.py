# SPDX-License-Identifier: Apache-2.0
"""What benchmarks/report.py makes of records."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kdkernels.testing.gpu_table import GPU_TABLE
from kdkernels.testing.opinfo import opinfos

ROOT = Path(__file__).parents[1]


def _report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _entry(**result: Any) -> dict[str, Any]:
    result = {
        "time_us": {"p20": 1.0, "p50": 2000.0, "p80": 3.0},
        "error": {"loss": 0.0, "dx": 1e-7},
        **result,
    }
    return {
        "op": "gram_mse",
        "shape": {"name": "pooled", "sizes": {"B": 8, "D": 4}},
        "dtype": "float32",
        "mode": "fwd_bwd",
        "device": "cpu",
        "variants": {"cpu": result, "eager": {"skipped": "needs about 99 GiB"}},
        "environment": {"cpu": "A CPU", "cores": 2, "threads": 2, "torch": "2"},
        "commit": "abc",
        "dirty": False,
        "date": "2000-01-01",
    }


def test_report_shows_records_and_verdicts() -> None:
    report = _report()
    same = {
        "op": "gram_mse",
        "shape": "pooled",
        "dtype": "float32",
        "mode": "fwd_bwd",
        "device": "cpu",
    }
    targets = [
        {**same, "backend": "cpu", "quantity": "times_mm", "at_most": 0.9},
        {**same, "backend": "cpu", "quantity": "speedup_over_eager", "at_least": 12},
        {**same, "backend": "triton", "quantity": "time_ms", "at_most": 1},
    ]
    text = report.render([("r.json", _entry(times_mm=0.8, speedup_over_eager=3.0))], targets)
    verdicts = [
        line.rsplit("|", 2)[1].strip()
        for line in text.splitlines()
        if line.startswith("| `gram_mse` pooled")
    ]
    assert verdicts == ["met", "missed", "not measured"]
    row = "| `gram_mse` | pooled 8x4 | float32 | fwd_bwd | cpu | 2 |"
    assert f"{row} 3.00 | 0.80 | 1.0e-07 | - |" in text
    assert "needs about 99 GiB" in text
    assert "| eager |" in text
    brief = report.summary([("r.json", _entry(times_mm=0.8))])
    assert f"{row} - | 0.80 | 1.0e-07 | - |" in brief
    assert "eager |" not in brief.replace("x eager |", "")
    assert "A CPU, 2 cores" in text
    assert "`benchmarks/results/r.json`" in text
    assert "**GPU**: not measured." in text


def test_report_says_what_failed_and_prefers_graphs() -> None:
    report = _report()
    gpu = {"device": "cuda", "environment": {"gpu": "A GPU", "torch": "2"}}
    failed = {"failed": "graph: RuntimeError: a | b\n" + "c" * 500}
    entries = [
        {**_entry(times_mm=mm), **gpu, "timing": timing}
        for timing, mm in (("graph", 0.5), ("call", 0.7))
    ]
    entries[0]["variants"]["eager"] = failed
    profiled = {"launches": 3, "device_us": 2.0}
    entries.append({**entries[0], "timing": "kernels", "variants": {"cpu": profiled}})
    same = {"op": "gram_mse", "shape": "pooled", "dtype": "float32", "mode": "fwd_bwd"}
    target = {**same, "device": "cuda", "backend": "cpu", "quantity": "times_mm", "at_most": 0.6}
    text = report.render([("r.json", entry) for entry in entries], [target])
    assert text.count("fwd_bwd, by graph | cpu |") == 1
    assert text.count("fwd_bwd | cpu |") == 1
    assert "| graph: RuntimeError: a \\| b ccc" in text
    assert "c" * 200 not in text
    assert "| 0.5 | met |" in text


def test_the_table_of_a_gpu_is_that_of_the_targets() -> None:
    targets = json.loads((ROOT / "benchmarks" / "targets.json").read_text())["targets"]
    of_gpus = [target for target in targets if target["device"] == "cuda"]
    assert {(target["op"], target["shape"], target["mode"]) for target in of_gpus} == set(GPU_TABLE)
    assert {target["dtype"] for target in of_gpus} == {"bfloat16"}


def test_report_replaces_only_what_is_between_the_markers() -> None:
    report = _report()
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    new = report.replaced(text, "new")
    assert new == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.replaced(new, "new") == new
    with pytest.raises(ValueError, match="must hold"):
        report.replaced("no markers", "new")


def test_targets_name_what_exists() -> None:
    shapes = {(info.name, shape.name) for info in opinfos() for shape in info.bench}
    targets = json.loads((ROOT / "benchmarks" / "targets.json").read_text())["targets"]
    assert {(target["op"], target["shape"]) for target in targets} <= shapes
