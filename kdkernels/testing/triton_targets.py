# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for GPUs that are not here, and reads what the compilers made of it.

    python -m kdkernels.testing.triton_targets > compiled.json
    python -m kdkernels.testing.triton_targets --record benchmarks/results/gpu_targets.json

runs in a process of its own, without TRITON_INTERPRET (under which kernels are not compilable). The
second form compiles every call for every target, and writes a summary as it goes. An op takes part
by a module `kdkernels/testing/aot/<op>.py`; see `recorder.py` beside it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kdkernels.testing import no_interpreter

PROCESSES = 2  # that compile
# Instructions of the tensor cores, by the assembly they appear in: PTX, or that of the AMD GPU.
TENSOR_CORE = {
    "sm_80": r"mma\.sync",
    "sm_86": r"mma\.sync",
    "sm_89": r"mma\.sync",
    "sm_90": r"wgmma\.mma_async|mma\.sync",
    "sm_100": r"tcgen05\.mma|mma\.sync",
    "sm_120": r"mma\.sync",
    "gfx942": r"v_mfma",
}
TARGETS = tuple(TENSOR_CORE)
# Triton makes one PTX for all GPUs of compute capability 8 (`_alike` looks), which the assembler
# turns into the code of each. So it is made once.
FAMILIES = (("sm_80", "sm_86", "sm_89"), ("sm_90",), ("sm_100",), ("sm_120",), ("gfx942",))
# What the record has and the tests leave out: the assembler gave sm_89 the registers and the stack
# of sm_86 in every variant.
RECORD_ONLY = ("sm_89",)
PTX_OF = {target: family[0] for family in FAMILIES for target in family}
TESTED = tuple(target for target in TARGETS if target not in RECORD_ONLY)
# Kernels that spill all the same: (target, name) -> (bytes of stack, why they stay).
EXCEPTIONS: dict[tuple[str, str], tuple[int, str]] = {
    ("sm_80", "relational_kl_derivatives_kernel-odd-bf16"): (
        32,
        "rows and keys that begin anywhere are loaded number by number, which takes all registers",
    ),
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
    text = no_interpreter.printed("-m", __spec__.name, TRITON_CACHE_DIR=str(cache_dir))
    found: dict[str, dict[str, list[Compiled]]] = {target: {} for target in TESTED}
    for target, op, entries in json.loads(text):
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
    amd = target.startswith("gfx")
    binary = _binary(variant, PTX_OF[target])
    text = binary.asm["amdgcn" if amd else "ptx"]
    if amd:
        registers, spilled = _amd_usage(text)
    elif PTX_OF[target] == target:
        registers, spilled = _nvidia_usage(binary.asm["cubin"])
    else:
        registers, spilled = _nvidia_usage(_assembled(text, target, dict(variant.options)))
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


def _binary(variant: Any, target: str) -> Any:
    import triton
    from triton.compiler import ASTSource

    names = list(variant.kernel.arg_names)
    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    return triton.compile(source, target=_gpu(target), options=dict(variant.options))


def _gpu(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


def _assembled(ptx: str, target: str, options: dict[str, Any]) -> bytes:
    """The code of a GPU, from PTX that was made for another of its family."""
    from triton.compiler.compiler import make_backend

    backend = make_backend(_gpu(target))
    text = re.sub(r"\.target sm_\w+", f".target {target}", ptx)
    return backend.make_cubin(text, {}, backend.parse_options(options), _gpu(target).arch)


def _alike(variant: Any, targets: tuple[str, ...]) -> None:
    """That one PTX is made for all of these targets."""

    def ptx(target: str) -> str:
        return re.sub(r"\.target sm_\w+", "", _binary(variant, target).asm["ptx"])

    if any(ptx(target) != ptx(targets[0]) for target in targets[1:]):
        raise RuntimeError(f"the PTX of {variant.name} is not the same for {', '.join(targets)}")


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


_work: list[tuple[Any, dict[str, list[Any]]]] = []  # op, variants by target of a family


def _do(index: int) -> list[tuple[str, str, list[dict[str, Any]]]]:
    op, by_target = _work[index]
    targets = tuple(by_target)
    if len(targets) > 1:
        _alike(by_target[targets[-1]][0], (targets[0], targets[-1]))
    return [
        (target, name_of(op), [asdict(_compile(variant, target)) for variant in variants])
        for target, variants in by_target.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, metavar="FILE", help="compile all, and summarise")
    record = parser.parse_args(arguments).record
    recorder = importlib.import_module("kdkernels.testing.aot.recorder")
    # made before the fork: variants hold functions, which cannot be sent
    for op in calls_of_ops():
        for family in FAMILIES:
            every = record is not None
            wanted = family if every else [target for target in family if target in TESTED]
            archs = {target: recorder.TARGETS[target] for target in wanted}
            found = {name: list(recorder.variants_of(a, op, every)) for name, a in archs.items()}
            _work.append((op, found))
    # the longest first, or all would wait for it
    _work.sort(key=lambda work: -sum(map(len, work[1].values())))
    done: list[tuple[str, str, list[dict[str, Any]]]] = []
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        for results in pool.imap_unordered(_do, range(len(_work))):
            done += results
            if record is not None:
                record.write_text(json.dumps(summary(done), indent=1) + "\n")
    if record is None:
        json.dump(done, sys.stdout)


def summary(done: list[tuple[str, str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """What the targets make of the kernels, for a record."""
    return {
        "what": "every Triton kernel, compiled ahead of time, not run",
        "triton": importlib.import_module("triton").__version__,
        "targets": {
            target: _of_target(target, {op: es for at, op, es in done if at == target})
            for target in TARGETS
            if any(at == target for at, _, _ in done)
        },
    }


def _of_target(target: str, ops: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    recorder = importlib.import_module("kdkernels.testing.aot.recorder")
    entries = [entry for found in ops.values() for entry in found]
    return {
        "shared_bytes_allowed": recorder.TARGETS[target].shared_bytes,
        "variants": len(entries),
        "shared_bytes": {op: max(e["shared"] for e in found) for op, found in sorted(ops.items())},
        "most_registers": max((entry["registers"] for entry in entries), default=0),
        "spills": {entry["name"]: entry["spilled"] for entry in entries if entry["spilled"]},
    }


if __name__ == "__main__":
    main()
