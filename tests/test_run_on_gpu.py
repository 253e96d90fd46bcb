# SPDX-License-Identifier: Apache-2.0
"""benchmarks/run_on_gpu.sh without a GPU: the dry run of all its stages, and what it does when one
of them fails, hangs, or is interrupted.

The commands are the script's own, in a copy of the repository. tests/dry_run has what takes the
place of a GPU: the tools of CUDA, and what every Python process there believes (pretended_gpu.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DRY_RUN = ROOT / "tests" / "dry_run"
SCRIPT = "benchmarks/run_on_gpu.sh"
STUB = str(DRY_RUN / "bin" / "stub-python")

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts the script in a copy of the repository, with the results in tmp_path/out."""
    copy = tmp_path / "repository"
    copy.mkdir()
    for name in ("benchmarks", "kdkernels", "tests"):
        ignore = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)

    def run(**variables: str) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {
            "OUT": str(tmp_path / "out"),
            "PATH": f"{DRY_RUN / 'bin'}{os.pathsep}{environment['PATH']}",
            "PYTHON": sys.executable,
        }
        return subprocess.Popen(
            ["bash", copy / SCRIPT],
            env={**environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


def _plan() -> list[tuple[str, int, bool]]:
    """Stages with their limits, and whether they share the time of the next one."""
    printed = subprocess.run(
        ["bash", ROOT / SCRIPT, "--plan"], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split() for line in printed.splitlines()]
    return [(row[0], int(row[1]), row[2:] == ["beside"]) for row in rows]


def _became(summary: str) -> dict[str, str]:
    """Of each stage the first word of what became of it."""
    return dict(re.findall(r"^(\w+): (\w+)", summary, re.MULTILINE))


def _archived(out: Path) -> dict[str, str]:
    with tarfile.open(out / "results.tar.gz") as archive:
        files = [member for member in archive.getmembers() if member.isfile()]
        return {
            member.name.removeprefix("./"): archive.extractfile(member).read().decode()
            for member in files
        }


def test_the_plan_takes_580_seconds_and_has_the_table_by_minute_five() -> None:
    plan = _plan()
    ends, now = {}, 0
    for (name, seconds, beside), (_, of_next, _) in pairwise([*plan, ("", 0, False)]):
        assert not beside or seconds <= of_next
        now += 0 if beside else seconds
        ends[name] = now
    assert now <= 580
    assert ends["table"] <= 300


def test_the_script_is_valid_bash() -> None:
    shells = [ROOT / SCRIPT, *(DRY_RUN / "bin").iterdir()]
    for shell in shells:
        assert os.access(shell, os.X_OK), shell
        subprocess.run(["bash", "-n", shell], check=True)


def test_a_stage_that_hangs_is_stopped_and_the_next_ones_run(start: Start, tmp_path: Path) -> None:
    script = start(PYTHON=STUB, LIMIT_SECONDS="20")
    printed, _ = script.communicate(timeout=60)
    assert script.returncode == 0, printed
    became = _became((tmp_path / "out" / "summary.txt").read_text())
    wanted = {name: "ok" for name, *_ in _plan()[:-1]}
    assert became == wanted | {"check_cuda": "stopped", "racecheck": "failed"}
    archived = _archived(tmp_path / "out")
    assert json.loads(archived["check_cuda.jsonl"]) == {"sample": "first"}
    assert archived["check_cuda.log"] == "hangs\n"


def test_an_interrupted_run_keeps_what_it_has(start: Start, tmp_path: Path) -> None:
    script = start(PYTHON=STUB)
    log = tmp_path / "repository" / "build" / "gpu-results" / "check_cuda.log"
    until = time.monotonic() + 30
    while not (log.exists() and log.read_text()):
        assert time.monotonic() < until
        time.sleep(0.05)
    script.send_signal(signal.SIGTERM)
    printed, _ = script.communicate(timeout=30)
    assert script.returncode == 130, printed
    assert "interrupted after" in (tmp_path / "out" / "summary.txt").read_text()
    assert json.loads(_archived(tmp_path / "out")["check_cuda.jsonl"]) == {"sample": "first"}
