# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for GPUs that are not here, and reads what the compilers made of it.

    python -m kdkernels.testing.triton_targets sm_90 > sm_90.json

runs in a process of its own, without TRITON_INTERPRET (under which kernels are not compilable). An
op takes part by a module `kdkernels/triton/_<op>_ahead.py`; see `_ahead.py` beside it.
"""

from __future__ import annotations

import importlib
import json
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


def compile_target(target: str, cache_dir: str | Path) -> list[Compiled]:
    """Compile all kernels of all ops for one target, in a fresh process.

    Args:
        target: One of `TARGETS`.
        cache_dir: Of Triton; what is there and has not changed is not compiled again.

    Raises:
        RuntimeError: a kernel does not compile, with the compiler's words.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache_dir)
    done = subprocess.run(
        [sys.executable, "-m", "kdkernels.testing.triton_targets", target],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"compiling for {target} failed:\n{done.stderr[-4000:]}")
    return [Compiled(**entry) for entry in json.loads(done.stdout)]


def variant_names(target: str) -> list[str]:
    """Names of what `compile_target` compiles. Quick, and possible in the interpreter's process."""
    return [variant.name for variant in _variants(target)]


def kernels_of_all_ops() -> set[str]:
    """Names of all kernels in the package, compiled or not."""
    kernel = re.compile(r"_\w+_kernel(_\w+)?")
    return {name for module in _modules() for name in vars(module) if kernel.fullmatch(name)}


def _variants(target: str) -> list[Any]:
    arch = importlib.import_module("kdkernels.triton._common").TARGETS[target]
    variants_of = importlib.import_module("kdkernels.triton._ahead").variants_of
    return [variant for op in _modules("_ahead") for variant in variants_of(arch, op)]


def _modules(ending: str = "") -> list[ModuleType]:
    """The modules of `kdkernels.triton` that belong to an op, or those of a kind."""
    package = importlib.import_module("kdkernels.triton")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    return [
        importlib.import_module(f"{package.__name__}.{name}")
        for name in names
        if name.endswith(ending) and name != "_ahead"
    ]


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


def main(target: str) -> None:
    json.dump([asdict(_compile(variant, target)) for variant in _variants(target)], sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
