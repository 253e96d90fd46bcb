# SPDX-License-Identifier: Apache-2.0
"""The console script: what it reports, what it writes, and with which status it exits."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from console import exit_code, output_of

import kdkernels as kd
from kdkernels import _dispatch, _gpu
from kdkernels._progress import Progress
from kdkernels.cli import env
from kdkernels.cli.main import SUBCOMMANDS, main
from kdkernels.cli.table import Table, write_json
from kdkernels.reference import _gram_mse as reference

ROOT = Path(__file__).parents[1]
QUICK_CHECK = [
    "check",
    "--quick",
    "--backend",
    "reference",
    "--dtype",
    "float32",
    "--device",
    "cpu",
]


def test_help_teaches_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    overview = capsys.readouterr().out
    for name in SUBCOMMANDS:
        assert name in overview
        assert exit_code(name, "--help") == 0
        assert f"usage: kdkernels {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert kd.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["train"],
        ["check", "--op", "gram_mle"],
        ["check", "--dtype", "int8"],
        ["demo", "--losses", "mse"],
        ["demo", "--epochs", "0"],
        ["demo", "--batch-size", "many"],
    ],
)
def test_unknown_words_are_wrong_usage(argv: list[str]) -> None:
    assert exit_code(*argv) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check", "--device", "warp"], "--device warp cannot be used"),
        (
            ["check", "--backend", "cpu", "--device", "meta", "--quick"],
            "--backend cpu can run nothing of this on meta",
        ),
        (
            ["demo", "--data", "digits", "--batch-size", "1000000"],
            "--batch-size must be at most the 1438 training samples",
        ),
        (
            ["env", "--json", "/no/such/directory/env.json"],
            "--json must name a file that can be written",
        ),
    ],
)
def test_what_cannot_be_done_is_wrong_usage(
    argv: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert message in capsys.readouterr().err


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "collect", interrupted)
    assert main(["env"]) == 130
    assert "kdkernels env: interrupted" in capsys.readouterr().err


def test_runs_as_a_module() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "kdkernels"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert "COMMAND" in done.stderr


def test_commands_for_everyone_need_no_extra() -> None:
    """`env` and `check` run where nothing but torch can be imported."""
    program = (
        "import sys\n"
        "for name in ('rich', 'matplotlib', 'sklearn', 'mnist1d', 'pytest'):\n"
        "    sys.modules[name] = None\n"
        "from kdkernels.cli.main import main\n"
        f"sys.exit(main(['env']) or main({QUICK_CHECK!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_env_reports_what_dispatch_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    record = output_of(capsys, "env")
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["kdkernels"] == kd.__version__
    assert set(record["backends"]) == set(_dispatch.BACKENDS)
    assert record["backends"]["reference"] is None
    assert {device["name"] for device in record["devices"]} >= {"cpu"}
    for op in record["ops"]:
        x = torch.ones(4, 3, device=op["device"])
        if op["function"] == "gram_mse":
            assert op["backend"] == kd.explain("gram_mse", x, x).backend
        assert set(op["rejected"]) == set(_dispatch.BACKENDS) - {op["backend"]}
        assert re.search(rf"{op['function']} +{op['device']}", text)
    for reason in filter(None, record["libraries"].values()):
        assert reason in text
    assert bool(record["build"]) == (record["libraries"]["kdkernels._C"] is None)


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False)])
def test_env_says_which_gpus_are_refused(
    capability: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = capability
    gpu = SimpleNamespace(
        name="Tesla T4", major=major, minor=minor, total_memory=16 << 30, multi_processor_count=40,
        L2_cache_size=4 << 20, shared_memory_per_block_optin=64 << 10,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    _gpu.refuse_device.cache_clear()
    text = env._description(torch.device("cuda", 0))
    _gpu.refuse_device.cache_clear()
    limits = "16.0 GiB, 40 processors, 4 MiB of L2, 64 KiB of shared memory for a block"
    assert text.startswith(f"Tesla T4, sm_{major}{minor}, {limits}")
    assert ("capability 8.0 on, and this one has 7.5" in text) == refused


def test_env_says_that_the_requested_backend_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    with kd.use_backend("cuda"):
        record = output_of(capsys, "env")
    cpu = next(op for op in record["ops"] if op["device"] == "cpu")
    assert cpu["backend"] is None
    assert "got 'cuda'" in cpu["error"]


def test_check_passes_and_reports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*QUICK_CHECK, "--json", str(tmp_path / "check.json")]) == 0
    text = capsys.readouterr().out
    assert re.search("gram_mse +reference +float32", text)
    assert "PASS" in text
    record = json.loads((tmp_path / "check.json").read_text())
    assert record["failed"] == 0
    assert record["passed"] == len(record["samples"]) > 0
    assert all(sample["error"] <= sample["budget"] for sample in record["samples"])
    assert main([*QUICK_CHECK, "--verbose"]) == 0
    verbose = capsys.readouterr().out
    assert all(f"float32  {sample['sample']}" in verbose for sample in record["samples"])


def test_check_lists_what_cannot_run_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "check",
        "--quick",
        "--backend",
        "reference",
        "cuda",
        "--dtype",
        "float64",
        "--device",
        "cpu",
    ]
    assert main(argv) == 2
    x = torch.ones(2, 2, dtype=torch.float64)
    reason = _dispatch.why_not("lsh_bce", "cuda", (x, x, None))
    assert "--backend cuda can run nothing of this on cpu" in (text := capsys.readouterr().err)
    assert reason in text


def test_check_fails_on_a_wrong_gradient(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = reference.gram_mse_bwd

    def wrong(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        dstudent, dteacher = right(*args)
        return dstudent, dteacher * 1.001

    monkeypatch.setattr(reference, "gram_mse_bwd", wrong)
    assert main(QUICK_CHECK) == 1
    text = capsys.readouterr().out
    assert "FAIL gram_mse reference float32" in text
    assert "dteacher[" in text


def test_check_reports_a_crash_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, calls = reference.gram_mse_fwd, []

    def crashing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise ZeroDivisionError("of this test")
        return right(*args)

    monkeypatch.setattr(reference, "gram_mse_fwd", crashing)
    assert main(QUICK_CHECK) == 1
    assert len(calls) > 2
    text = capsys.readouterr().out
    assert "ZeroDivisionError: of this test" in text
    assert "1 failed" in text


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_check_writes_a_line_for_each_sample(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def no_compiler(*args: Any) -> Any:
        raise RuntimeError("ptxas of this test")

    monkeypatch.setattr(reference, "gram_mse_bwd", no_compiler)
    argv = [*QUICK_CHECK, "--op", "gram_mse", "pkt", "--lines", str(tmp_path / "check.jsonl")]
    assert main([*argv, "--json", str(tmp_path / "check.json")]) == 1
    about, *samples, end = _lines(tmp_path / "check.jsonl")
    assert about["device"] == "cpu"
    for sample in samples:
        assert sample.pop("seconds") > 0
    assert samples == json.loads((tmp_path / "check.json").read_text())["samples"]
    failed = [sample for sample in samples if not sample["ok"]]
    assert {sample["op"] for sample in failed} == {"gram_mse"}
    assert {sample["message"] for sample in failed} == {"RuntimeError: ptxas of this test"}
    assert end == {
        "ended": True,
        "passed": len(samples) - len(failed),
        "failed": len(failed),
        "not_reached": 0,
    }
    assert "FAIL gram_mse reference float32" in capsys.readouterr().out


def test_a_killed_check_leaves_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "check.jsonl"
    command = [sys.executable, "-m", "kdkernels", "check", "--device", "cpu"]
    options = ["--backend", "reference", "--lines", str(path)]
    with subprocess.Popen(
        [*command, *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as process:
        while process.poll() is None and (not path.exists() or len(_lines(path)) < 4):
            time.sleep(0.02)
        process.kill()
        assert process.stdout.read() == b""  # its tables come at the end
    assert process.returncode == -signal.SIGKILL
    about, *samples = _lines(path)
    assert about["command"] == "check"
    assert len(samples) >= 3
    assert all(sample["ok"] for sample in samples)


def test_check_selects_samples_and_parts(tmp_path: Path) -> None:
    base = [*QUICK_CHECK[2:], "--op", "gram_mse", "pkt", "--lines", str(tmp_path / "lines")]

    def names(*options: str) -> list[tuple[str, str]]:
        assert main(["check", *base, *options]) == 0
        return [(line["op"], line["sample"]) for line in _lines(tmp_path / "lines")[1:-1]]

    every = names("--sample", "one_*", "aligned")
    assert {name for _, name in every} == {"one_row", "one_col", "aligned"}
    parts = [names("--sample", "one_*", "aligned", "--shard", f"{i}/4") for i in (1, 2, 3, 4)]
    assert all(parts)
    assert sorted(itertools.chain(*parts)) == sorted(every)
    assert len(set(map(len, parts))) <= 2
    assert main(["check", *base, "--sample", "nothing"]) == 2
    for shard in ("0/4", "5/4", "1", "a/b"):
        assert exit_code("check", "--shard", shard) == 2


def test_check_says_what_its_limit_left_out(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "lines"
    argv = [*QUICK_CHECK, "--op", "pkt", "--limit", "1e-9", "--lines", str(path)]
    assert main(argv) == 0
    _, late, end = _lines(path)
    reason = "the limit of 1e-09 s was over"
    key = {"op": "pkt", "backend": "reference", "dtype": "float32"}
    assert late == {**key, "samples": late["samples"], "not_reached": reason}
    assert end["passed"] == 0
    assert end["not_reached"] == late["samples"] > 0
    text = capsys.readouterr().out
    assert reason in text
    assert f"0 passed, 0 failed, {late['samples']} not reached" in text


def test_table_aligns_and_wraps_its_last_column() -> None:
    table = Table("name", "count", "why", title="Things", right=("count",))
    table.add("a", 10, "one two three four five six seven")
    table.add("long", 7, "")
    lines = table.render(width=40).splitlines()
    assert lines[:2] == ["Things", "name  count  why"]
    assert lines[3] == "a        10  one two three four five six"
    assert lines[4] == "             seven"
    assert lines[5] == "long      7"
    with pytest.raises(ValueError, match="cells must have 3 entries like the header, got 1"):
        table.add("a")


def test_json_holds_no_infinity(tmp_path: Path) -> None:
    write_json({"error": float("inf"), "list": [float("nan"), 1.5]}, str(tmp_path / "x.json"))
    assert json.loads((tmp_path / "x.json").read_text()) == {"error": None, "list": [None, 1.5]}


@pytest.mark.parametrize("with_rich", [True, False])
def test_progress_on_a_terminal(
    with_rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if with_rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress(3, "begin") as progress:
        progress.step("working")
        progress.note("half way [2/3]")
    written = capsys.readouterr().err
    assert "half way [2/3]\n" in written
    assert "working" in written
