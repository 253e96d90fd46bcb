# SPDX-License-Identifier: Apache-2.0
"""The layers of the package and the folders of its ops: which file may name which other one."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from kdkernels.testing.opinfo import opinfos

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "kdkernels"
OPS = frozenset(info.op for info in opinfos())

# Lowest first. A module may import what stands in its own row or in a row before it. The public
# front, `kdkernels/__init__.py`, imports from every row and is imported by users only.
LAYERS = (
    ("_version",),
    (
        "_allocation",
        "_checks",
        "_function",
        "_gpu",
        "_key_bank_call",
        "_mined_triplets",
        "_native",
        "_progress",
        "_similarity",
    ),
    ("_dispatch",),
    ("_library",),
    ("reference", "cpu", "triton", "cuda"),
    ("ops",),
    ("nn",),
    ("testing",),
    ("demo",),
    ("cli", "__main__"),
)
LEVEL = {name: level for level, row in enumerate(LAYERS) for name in row}
# The front passes two modules through, which users reach as `kd.<name>` and so may the top layers.
FRONT_USERS = ("testing", "demo", "cli", "__main__")


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, with the names it takes from each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("kdkernels"))
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert node.level == 0, f"{path}: imports are absolute"
            if module == "kdkernels" or module.startswith("kdkernels."):
                yield from (f"{module}.{alias.name}" for alias in node.names)


def top(name: str) -> str:
    """`_checks` of `kdkernels._checks.FLOATS`; empty for the package itself."""
    return name.split(".")[1] if "." in name else ""


def python_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_every_module_has_its_layer() -> None:
    modules = {
        path.stem if path.is_file() else path.name
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert modules - {"__init__"} == set(LEVEL)


def test_no_import_runs_upward() -> None:
    upward = []
    for path in python_files(PACKAGE):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports(path):
            target = top(name)
            if target in LEVEL:
                if LEVEL[target] > LEVEL[module]:
                    upward.append(f"{path.relative_to(ROOT)} imports {name}")
            elif module not in FRONT_USERS:
                upward.append(f"{path.relative_to(ROOT)} imports the front, kdkernels")
    assert upward == []


def owner(parts: tuple[str, ...]) -> str | None:
    """The op that a file or module below a folder of ops belongs to; None for what all share."""
    name = parts[0].removesuffix(".py")
    return name if name in OPS else None


def test_no_op_of_the_triton_backend_imports_another() -> None:
    folder = PACKAGE / "triton"
    across = []
    for path in python_files(folder):
        mine = owner(path.relative_to(folder).parts)
        for name in imports(path):
            parts = tuple(name.split(".")[2:])
            if top(name) == "triton" and parts and owner(parts) not in (None, mine):
                across.append(f"{path.relative_to(ROOT)} imports {name}")
    assert across == []


def test_every_module_of_kernels_sees_the_language() -> None:
    """Triton's interpreter refuses a kernel whose module has no `tl`, unless tests patch it."""
    blind = [
        str(path.relative_to(ROOT))
        for path in python_files(PACKAGE / "triton")
        if "@triton.jit" in (text := path.read_text())
        and "import triton.language as tl" not in text
    ]
    assert blind == []


def test_the_backends_import_no_other_backend() -> None:
    across = [
        f"{path.relative_to(ROOT)} imports {name}"
        for backend in LAYERS[LEVEL["reference"]]
        for path in python_files(PACKAGE / backend)
        for name in imports(path)
        if LEVEL.get(top(name)) == LEVEL["reference"] and top(name) != backend
    ]
    assert across == []


def test_ops_and_modules_reach_backends_through_the_dispatcher_only() -> None:
    direct = [
        f"{path.relative_to(ROOT)} imports {name}"
        for layer in ("ops", "nn")
        for path in python_files(PACKAGE / layer)
        for name in imports(path)
        if LEVEL.get(top(name)) == LEVEL["reference"]
    ]
    assert direct == []


def test_no_op_of_the_native_code_includes_another() -> None:
    folder = ROOT / "csrc"
    across = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cpp", ".cu")):
        mine = owner(path.relative_to(folder).parts)
        for target in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE):
            found = (path.parent / target).resolve()
            if not found.is_relative_to(folder):
                continue  # the host's stand-in for CUDA's header
            if owner(found.relative_to(folder).parts) not in (None, mine):
                across.append(f"{path.relative_to(ROOT)} includes {target}")
    assert across == []
