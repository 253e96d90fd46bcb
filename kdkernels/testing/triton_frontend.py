# SPDX-License-Identifier: Apache-2.0
"""What the samples of all ops launch, specialised as Triton's JIT does and taken through its front
end; and how often batches of many sizes would be compiled. Nothing is compiled or run.

    python -m kdkernels.testing.triton_frontend > seen.json

runs in a process of its own, without TRITON_INTERPRET: the interpreter shows none of the errors
that the front end finds, such as a method of an integer that is constant where it is 1.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kdkernels import _dispatch
from kdkernels.testing import no_interpreter
from kdkernels.testing.opinfo import opinfos

ARCH = "sm_90"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Batches as training meets them: powers of two, other multiples of 16, the rest of an epoch, one.
BATCHES = (1, 2, 3, 5, 16, 17, 31, 32, 48, 63, 64, 100, 128, 129, 200, 256, 257, 300, 512, 1000)


@dataclass(frozen=True)
class Seen:
    """What the front end saw."""

    samples: int  # calls, each forward and backward
    variants: int  # kernels, specialised, that went through the front end
    failures: list[str]  # kernel, call, and what the front end says
    # op -> kernel -> how often it is compiled over BATCHES with one set of constants and dtypes, at
    # most
    compilations: dict[str, dict[str, int]]


def see() -> Seen:
    """All of it, in a fresh process.

    Raises:
        RuntimeError: a call fails before the front end, with its traceback.
    """
    return Seen(**json.loads(no_interpreter.printed("-m", __spec__.name)))


def _call(info: Any, sample: Any) -> bool:
    """Forward and backward with all gradients; False where the backend refuses the call."""
    plan = _dispatch.plan(info.public, *sample.args, **sample.kwargs, backend="triton")
    if _dispatch.why_not(info.op, "triton", plan.operator_args) is not None:
        return False
    places = info.places(sample.args).values()
    args = [
        arg.detach().clone().requires_grad_() if i in places and isinstance(arg, Tensor) else arg
        for i, arg in enumerate(sample.args)
    ]
    out = info.function(*args, **sample.kwargs, backend="triton")
    wanted = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    if out.requires_grad:
        torch.autograd.grad(out.sum(), wanted, allow_unused=True)
    return True


def _variants(recorder: Any) -> tuple[int, list[tuple[Any, str]]]:
    """The number of samples, and variants that they launch, each with the call that does: as many
    as show every two types or constants that meet in a launch."""
    arch, samples = recorder.TARGETS[ARCH], 0
    found: list[tuple[Any, str]] = []
    shown: set[Any] = set()
    for info in opinfos():
        for dtype in (dtype for dtype in DTYPES if dtype in info.dtypes):
            for sample in info.samples(torch.device("cpu"), dtype):
                with recorder.recorded(arch, dtype) as launched:
                    samples += _call(info, sample)
                for variant in dict.fromkeys(launched):
                    facets = [
                        # a kernel does the same with both 16-bit types, but for constants
                        *((arg, kind.replace("bf16", "fp16")) for arg, kind in variant.signature),
                        *(entry for entry in variant.constexprs if not _is_size(entry[0])),
                    ]
                    pairs = {(variant.kernel, *pair) for pair in combinations(facets, 2)}
                    if not pairs <= shown:
                        shown |= pairs
                        found.append((variant, f"{info.name}-{dtype}-{sample.name}"))
    return samples, found


def _is_size(constant: str) -> bool:
    """Whether it is one of a tile, which changes no type."""
    return constant.startswith(("BLOCK", "CLOSE_")) or constant in ("ROWS", "COLUMNS")


def _complaint(variant: Any) -> str | None:
    """Why a variant does not become Triton's intermediate representation; None if it does."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", int(ARCH.removeprefix("sm_")), 32)
    backend = make_backend(target)
    options = backend.parse_options(dict(variant.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(
        fn=variant.kernel, signature=dict(variant.signature), constexprs=dict(variant.constexprs)
    )
    try:
        source.make_ir(
            target,
            options,
            backend.get_codegen_implementation(options),
            backend.get_module_map(),
            context,
        )
    except Exception as error:  # of any kind: it is what this looks for
        return f"{type(error).__name__}: {error}, from {error.__cause__!r}"
    return None


def _compilations(recorder: Any) -> dict[str, dict[str, int]]:
    arch = recorder.TARGETS[ARCH]
    found: dict[str, dict[str, int]] = {}
    targets = importlib.import_module("kdkernels.testing.triton_targets")
    for op in targets.calls_of_ops():
        most = found[targets.name_of(op)] = {}
        for precision, labelled in op.EVERYWHERE.items():
            for arguments in labelled.values():
                compiled = {
                    replace(variant, name="")
                    for rows in BATCHES
                    for variant in recorder.launched(
                        arch, precision, op.call, (rows, *arguments[1:])
                    )
                }
                for asked, count in Counter(_asked(variant) for variant in compiled).items():
                    name = asked[0]
                    most[name] = max(most.get(name, 0), count)
    return found


def _asked(variant: Any) -> tuple[Any, ...]:
    """What a launcher asks for, whatever the sizes: a kernel, its constants, options and dtypes."""
    constants = {param.name for param in variant.kernel.params if param.is_constexpr}
    return (
        variant.kernel.__name__,
        tuple(entry for entry in variant.constexprs if entry[0] in constants),
        variant.options,
        tuple(entry for entry in variant.signature if entry[1].startswith("*")),
    )


def main() -> None:
    recorder = importlib.import_module("kdkernels.testing.aot.recorder")
    backend = importlib.import_module("kdkernels.triton")
    with mock.patch.object(backend, "rejects", return_value=None):  # there is no device
        samples, found = _variants(recorder)
    failures = []
    for variant, call in found:
        complaint = _complaint(variant)
        if complaint is not None:
            failures.append(f"{variant.kernel.__name__} of {call}: {complaint}")
    seen = Seen(samples, len(found), failures, _compilations(recorder))
    json.dump(vars(seen), sys.stdout)


if __name__ == "__main__":
    main()
