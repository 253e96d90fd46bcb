# SPDX-License-Identifier: Apache-2.0
"""Invariants of the repository itself: what a reader relies on and nobody checks by hand."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from kdkernels.testing.opinfo import opinfos

ROOT = Path(__file__).parents[1]
SPDX = "SPDX-License-Identifier: Apache-2.0"
SOURCES = {".py", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".sh", ".cmake"}
MOST_LINES = 420
DOCUMENTS = ("*.md", "docs/*.md", "docs/*/*.md", "examples/*.md", "benchmarks/*.md")
# A word in backticks that names a file or folder of the repository.
PATH = re.compile(
    r"^(?:(?:csrc|kdkernels|tests|docs|benchmarks|examples)/[\w./*<>{},-]*|[\w-]+\.(?:md|toml|py|txt))$"
)
# Built or written at run time, so no checkout has them.
GENERATED = ("benchmarks/results", ".so", "gpu-libraries", "gpu-results", "demo-results")


@cache
def files() -> tuple[Path, ...]:
    """What is tracked, or would be: untracked files that git does not ignore count too."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return tuple(ROOT / name for name in listed if (ROOT / name).is_file())


def sources() -> list[Path]:
    return [path for path in files() if path.suffix in SOURCES or path.name == "CMakeLists.txt"]


def documents() -> list[Path]:
    return [
        path
        for path in files()
        if any(path.relative_to(ROOT).match(pattern) for pattern in DOCUMENTS)
    ]


def test_every_source_file_names_its_licence() -> None:
    # the first line, or the second after a shebang; an empty __init__.py has nothing to license
    missing = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.read_text().strip() and SPDX not in "".join(path.read_text().splitlines()[:2])
    ]
    assert missing == []


def test_no_source_file_is_too_long() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources()
        if (count := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert long == {}


@pytest.mark.parametrize(("name", "op"), sorted({(info.public, info.op) for info in opinfos()}))
def test_every_op_is_documented(name: str, op: str) -> None:
    page = ROOT / "docs" / "ops" / f"{op}.md"
    assert page.is_file()
    assert name in page.read_text()
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|")]
    assert any(f"`{name}" in row for row in rows), f"README.md has no table row for {name}"


@pytest.mark.parametrize("op", sorted({info.op for info in opinfos()}))
def test_every_op_has_all_of_its_files(op: str) -> None:
    for path in (f"kdkernels/ops/{op}.py", f"kdkernels/reference/_{op}.py", f"tests/test_{op}.py"):
        assert (ROOT / path).is_file(), path


def test_every_module_has_its_test() -> None:
    """The test of kdkernels/nn/<module>.py is tests/nn/test_<module>.py; what several modules share
    is tested in test_modules.py, test_errors.py, test_arguments.py and test_state.py, and what
    loaders give in test_dataset_order.py."""
    modules = {path.stem for path in (ROOT / "kdkernels" / "nn").glob("[!_]*.py")}
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "nn").glob("*.py")}
    assert tests == modules | {"modules", "errors", "arguments", "state", "dataset_order"}


def _targets(text: str) -> list[str]:
    """Relative targets of Markdown links, without their anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [target.partition("#")[0] for target in found if not re.match(r"^(?:[a-z]+:|#)", target)]


def test_every_relative_link_leads_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in documents()
        for target in _targets(path.read_text())
        if not (path.parent / target).exists()
    ]
    assert broken == []


def _exists(name: str) -> bool:
    if any(part in name for part in GENERATED):
        return True
    pattern = re.sub(r"<\w+>", "*", name)
    alternatives = re.search(r"\{([^}]*)\}", pattern)
    if alternatives is not None:
        return all(
            _exists(pattern.replace(alternatives[0], part)) for part in alternatives[1].split(",")
        )
    return any(ROOT.glob(pattern.rstrip("/"))) or any(path.name == pattern for path in files())


def test_every_path_in_the_documents_exists() -> None:
    broken = []
    for path in documents():
        prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        words = [word for word in re.findall(r"`([^`\s]+)`", prose) if PATH.match(word)]
        broken += [f"{path.relative_to(ROOT)}: {word}" for word in words if not _exists(word)]
    assert broken == []


def test_linting_is_configured() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for setting in ("[tool.ruff", 'target-version = "py310"', "filterwarnings", "markers"):
        assert setting in text, setting
    for rules in ("E", "F", "I", "UP", "B"):
        assert f'"{rules}"' in text, f"ruff rules {rules}"


def test_documents_show_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    for path, block in report.blocks().items():
        text = path.read_text()
        assert report.replaced(text, block) == text, "run `python benchmarks/report.py --write`"


def test_records_name_no_machine_and_no_path() -> None:
    for path in (
        path
        for path in files()
        if path.parent == ROOT / "benchmarks" / "results" and path.suffix == ".json"
    ):
        text = path.read_text()
        assert not re.search(r'"(?:hostname|host|user|node)"', text), path.name
        assert not re.search(r'"/(?:home|work|root|tmp|usr)', text), path.name


def _tests() -> list[tuple[str, ast.AST]]:
    """Every node of every file of tests, with the place to name."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node)
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if hasattr(node, "lineno")
    ]


def _literals(node: ast.AST) -> list[float]:
    return [
        found.value
        for found in ast.walk(node)
        if isinstance(found, ast.Constant) and type(found.value) in (int, float)
    ]


def test_no_test_has_a_tolerance_of_its_own() -> None:
    """Tolerances are 0, names of kdkernels.testing.numerics, torch's, or units of torch.finfo.
    (pytest.approx, which knows no rtol and atol, is for the rounded numbers of records.)"""
    given = [
        place
        for place, node in _tests()
        if isinstance(node, ast.keyword)
        and node.arg in ("rtol", "atol")
        and any(_literals(node.value))
    ]
    compared = [
        place
        for place, node in _tests()
        if isinstance(node, ast.Compare)
        and any(isinstance(op, (ast.Lt, ast.LtE)) for op in node.ops)
        and any(
            isinstance(side, ast.Constant) and type(side.value) is float and 0 < side.value < 0.01
            for side in (node.left, *node.comparators)
        )
    ]
    assert given + compared == []


def test_what_is_not_run_is_named_and_nothing_is_expected_to_fail() -> None:
    """Cases of absent backends are deselected in conftest.py; every skip has its reason."""
    forbidden, unnamed = [], []
    for place, node in _tests():
        name = node.attr if isinstance(node, ast.Attribute) else None
        if name == "xfail" or (name == "skip" and ast.unparse(node).endswith("mark.skip")):
            forbidden.append(place)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        reason = node.args or [word for word in node.keywords if word.arg == "reason"]
        if called == "pytest.skip" and not reason:
            unnamed.append(place)
        if called.endswith("skipif") and not any(word.arg == "reason" for word in node.keywords):
            unnamed.append(place)
    assert forbidden == []
    assert unnamed == []
