# SPDX-License-Identifier: Apache-2.0
"""benchmarks/run_on_gpu.sh without a GPU: the dry run of all its stages, and what it does when one
of them fails, hangs, or is interrupted.

The commands are the script's own, in a copy of the repository. tests/dry_run has what takes the
place of a GPU: the tools of CUDA, and what every Python process there believes (pretended_gpu.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import cuda_host
import pytest
import torch

ROOT = Path(__file__).parents[1]
DRY_RUN = ROOT / "tests" / "dry_run"
SCRIPT = "benchmarks/run_on_gpu.sh"
STUB = str(DRY_RUN / "bin" / "stub-python")

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts the script in a copy of the repository, with the results in tmp_path/out."""
    copy = tmp_path / "repository"
    copy.mkdir()
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in ("benchmarks", "csrc", "kdkernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("CMakeLists.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, copy)

    def run(**variables: str) -> subprocess.Popen[str]:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {
            "OUT": str(tmp_path / "out"),
            "PATH": f"{DRY_RUN / 'bin'}{os.pathsep}{environment['PATH']}",
            "PYTHON": sys.executable,
        }
        script = subprocess.Popen(
            ["bash", copy / SCRIPT],
            env={**environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(script)
        return script

    started: list[subprocess.Popen[str]] = []
    yield run
    for script in started:
        script.terminate()  # which ends the stages too
        script.wait()


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


def test_without_a_gpu_nothing_is_begun(start: Start, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    smi.chmod(0o755)
    script = start(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", PYTHON=STUB)
    printed, _ = script.communicate(timeout=30)
    assert script.returncode == 2
    assert printed == "no GPU: no devices were found\n"


def test_a_stage_that_hangs_is_stopped_and_the_next_ones_run(start: Start, tmp_path: Path) -> None:
    script = start(PYTHON=STUB, LIMIT_SECONDS="20")
    printed, _ = script.communicate(timeout=60)
    assert script.returncode == 0, printed
    became = _became((tmp_path / "out" / "summary.txt").read_text())
    wanted = {name: "ok" for name, *_ in _plan()[:-1]}
    assert became == wanted | {"check_cuda": "stopped", "racecheck": "failed"}
    archived = _archived(tmp_path / "out")
    assert json.loads(archived["check_cuda-1.jsonl"]) == {"sample": "first"}
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
    assert json.loads(_archived(tmp_path / "out")["check_cuda-1.jsonl"]) == {"sample": "first"}


def test_dry_run(start: Start, tmp_path: Path) -> None:
    """Every stage does a little of its work, by its own command; racecheck finds an error."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: run the script itself")
    reason = cuda_host.obstacle()
    if reason is not None:
        pytest.skip(f"the C++ libraries cannot be built: {reason}")
    _pack_libraries(tmp_path / "repository")
    script = start(
        PYTHONPATH=str(DRY_RUN),
        PYTEST_ADDOPTS="-k test_nothing_waits",
        TRITON_CACHE_DIR=str(tmp_path / "triton"),
        OMP_NUM_THREADS="1",
        LIMIT_SECONDS="5800",  # on a machine that does other work too
    )
    printed, _ = script.communicate(timeout=600)
    archived = _archived(tmp_path / "out")
    summary = (tmp_path / "out" / "summary.txt").read_text()
    wanted = {name: "ok" for name, *_ in _plan()[:-1]}
    assert _became(summary) == wanted | {"racecheck": "failed"}, printed
    assert "racecheck: failed with status 99" in summary
    for name in wanted:
        assert archived[f"{name}.log"], name
    assert "132 processors, 60 MiB of L2, 227 KiB of shared memory" in archived["versions.log"]
    assert "gpu-libraries/ is installed" in archived["libraries.log"]
    assert "kernels for sm_90" in archived["warm.log"]
    for name in ("check_cuda-1", "check_triton-1", "memcheck"):
        assert {line["ok"] for line in _samples(archived[f"{name}.jsonl"])} == {True}
    _assert_times(archived)
    (counted,) = _lines(archived["counters.jsonl"])
    assert counted["kernel"] == "pretended_kernel"
    assert counted["counters"]["lts__t_bytes.sum"] == "1,234.5 unit"
    assert any("speedup" in line for line in _lines(archived["tiles.jsonl"]))


def _pack_libraries(repository: Path) -> None:
    """As benchmarks/gpu_libraries.py does, from the libraries that are there. In place of the CUDA
    library, which a dry run does not load, a file without content will do."""
    path = ROOT / "benchmarks" / "gpu_libraries.py"
    spec = importlib.util.spec_from_file_location("gpu_libraries", path)
    gpu_libraries = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_libraries)
    packed = repository / gpu_libraries.PACKED.name
    packed.mkdir()
    for name in gpu_libraries.LIBRARIES:
        built = ROOT / "kdkernels" / name
        if built.exists():
            (packed / name).symlink_to(built)
        else:
            (packed / name).touch()
    origin = {"sources": gpu_libraries.sources_hash(), "architectures": "90-real"}
    (packed / gpu_libraries.ORIGIN).write_text(json.dumps(origin))


def _lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def _samples(text: str) -> list[dict[str, Any]]:
    found = [line for line in _lines(text) if "ok" in line]
    assert found
    return found


def _assert_times(archived: dict[str, str]) -> None:
    """Each call of the table that the dry run has, each way of timing, each variant."""
    found = _lines(archived["table.jsonl"]) + _lines(archived["kernels.jsonl"])
    records = [line for line in found if "timing" in line]
    assert {line["timing"] for line in records} == {"graph", "call", "kernels"}
    for line in records:
        missing = {
            name: result
            for name, result in line["variants"].items()
            if not {"time_us", "device_us", "skipped"} & set(result)
        }
        assert not missing
