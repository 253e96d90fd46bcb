# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for GPUs that are not here, and reads what the compilers made of it.

    python -m kdkernels.testing.triton_targets > compiled.json

runs in a process of its own, without TRITON_INTERPRET (under which kernels are not compilable). An
op takes part by a module `kdkernels/testing/aot/<op>.py`; see `recorder.py` beside it.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # that one program may have
TARGETS = tuple(SHARED_KIB)
PROCESSES = 2  # that compile
# Instructions of the tensor cores, by the assembly they appear in: PTX, or that of the AMD GPU.
TENSOR_CORE = {
    "sm_80": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "gfx942": r"v_mfma",
}


@dataclass(frozen=True)
class Compiled:
    """What became of one variant on one target."""

    name: str
    kernel: str
    expects_tensor_core: bool
    registers: int
    spilled: int  # bytes of stack (NVIDIA), registers spilled (AMD)
    shared: int  # bytes
    instructions: dict[str, int]  # tensor-core instruction -> how often


def compile_all(cache_dir: str | Path) -> dict[str, dict[str, list[Compiled]]]:
    """Compile all kernels for all targets, in a fresh process that imports once and forks.

    Args:
        cache_dir: Of Triton; what is there and has not changed is not compiled again.

    Returns:
        What became of the variants, by target and op.

    Raises:
        RuntimeError: a kernel does not compile, with the compiler's words.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache_dir)
    done = subprocess.run(
        [sys.executable, "-m", "kdkernels.testing.triton_targets"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"compiling failed:\n{done.stderr[-4000:]}")
    found: dict[str, dict[str, list[Compiled]]] = {target: {} for target in TARGETS}
    for target, op, entries in json.loads(done.stdout):
        found[target][op] = [Compiled(**entry) for entry in entries]
    return found


def op_names() -> list[str]:
    """The ops that take part."""
    return [name_of(op) for op in calls_of_ops()]


def kernels_of_all_ops() -> set[str]:
    """Names of all kernels in the package, compiled or not."""
    kernel = re.compile(r"_\w+_kernel(_\w+)?")
    modules = _modules("kdkernels.triton")
    return {name for module in modules for name in vars(module) if kernel.fullmatch(name)}


def _modules(package_name: str) -> list[ModuleType]:
    """All modules of a package, those of its packages included."""
    package = importlib.import_module(package_name)
    found = pkgutil.walk_packages(package.__path__, f"{package_name}.")
    return [importlib.import_module(name) for name in sorted(info.name for info in found)]


def calls_of_ops() -> list[ModuleType]:
    return [module for module in _modules("kdkernels.testing.aot") if hasattr(module, "call")]


def name_of(op: ModuleType) -> str:
    return op.__name__.rpartition(".")[2]


def _compile(variant: Any, target: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    amd = target.startswith("gfx")
    gpu = (
        GPUTarget("hip", target, 64)
        if amd
        else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    )
    binary = triton.compile(source, target=gpu, options=dict(variant.options))
    text = binary.asm["amdgcn" if amd else "ptx"]
    registers, spilled = _amd_usage(text) if amd else _nvidia_usage(binary.asm["cubin"])
    instructions: dict[str, int] = {}
    for found in re.findall(TENSOR_CORE[target], text):
        instructions[found] = instructions.get(found, 0) + 1
    return Compiled(
        name=variant.name,
        kernel=variant.kernel.__name__,
        expects_tensor_core=variant.tensor_core,
        registers=registers,
        spilled=spilled,
        shared=binary.metadata.shared,
        instructions=instructions,
    )


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) from the cubin, by the tool in triton's wheel."""
    triton = importlib.import_module("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", report)
    if usage is None:
        raise ValueError(f"cuobjdump -res-usage said nothing about registers:\n{report}")
    return int(usage[1]), int(usage[2]) + int(usage[3])


def _amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers, registers and bytes spilled) from the metadata of the assembly."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise ValueError(f"the assembly has no field .{name}")
        return int(found[1])

    spilled = (
        field("vgpr_spill_count") + field("sgpr_spill_count") + field("private_segment_fixed_size")
    )
    return field("vgpr_count"), spilled


_work: list[tuple[str, Any, list[Any]]] = []  # target, op, variants


def _do(index: int) -> tuple[str, str, list[dict[str, Any]]]:
    target, op, variants = _work[index]
    return target, name_of(op), [asdict(_compile(variant, target)) for variant in variants]


def main() -> None:
    recorder = importlib.import_module("kdkernels.testing.aot.recorder")
    # made before the fork: variants hold functions, which cannot be sent
    _work.extend(
        (target, op, list(recorder.variants_of(recorder.TARGETS[target], op)))
        for op in calls_of_ops()
        for target in TARGETS
    )
    _work.sort(key=lambda work: -len(work[2]))  # the longest first, or all would wait for it
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        json.dump(pool.map(_do, range(len(_work)), chunksize=1), sys.stdout)


if __name__ == "__main__":
    main()
