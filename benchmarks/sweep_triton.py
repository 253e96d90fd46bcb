# SPDX-License-Identifier: Apache-2.0
"""Times candidate tiles of the Triton kernels on this GPU, one tile at a time.

    python benchmarks/sweep_triton.py --op gram_mse --shape layer4 --seconds 60 --output new.jsonl

By default the shapes are those of `kdkernels bench --table`. Each candidate replaces one tile of
those that the launchers choose. All are compiled before the first is timed, in as many processes as
there are cores. Then they take turns with the default, replayed as CUDA graphs, in the order of how
little they differ from it; each line of the output is one candidate. Its error is the difference
from the default's result, which `kdkernels check` judges. A change of a configuration brings these
lines with it.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from kdkernels.testing import bench, clock, record, tiles, warm
from kdkernels.testing.gpu_table import GPU_TABLE
from kdkernels.testing.opinfo import BenchShape, OpInfo, Sample, opinfos

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# By default; info_nce takes the tiles of relational_kl, and its shape of the table takes long.
OPS = ("gram_mse", "lsh_bce", "relational_kl", "triplet_loss")
COMPILING = 0.4  # share of the time that compilations may take
SECONDS = 0.2  # for a candidate and the default together
RESULT = tuple[Tensor, Tensor]  # value, gradient of the first argument


class Call(NamedTuple):
    """What is swept: a shape of an op in a dtype."""

    op: str
    shape: str
    dtype: str

    def find(self, device: torch.device) -> tuple[OpInfo, BenchShape, Sample]:
        (info,) = (info for info in opinfos() if info.name == self.op)
        (shape,) = (shape for shape in info.bench if shape.name == self.shape)
        return info, shape, info.bench_sample(shape, device, DTYPES[self.dtype])


@dataclass
class Candidate:
    """One tile in the place of another."""

    call: Call
    name: str  # of the tile
    tile: Any
    default: Any
    kernels: list[warm.Kernel] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def record_candidates(call: Call, device: warm.Device, most: int) -> list[Candidate]:
    """The candidates of a call, and the kernels that they have to compile."""
    info, _, sample = call.find(warm.CPU)
    chooser = tiles.CHOOSERS[info.op]
    with chooser.seen() as default:
        launched, _ = warm.record_samples(info, [sample], 1, device)
    found = []
    for name in default:
        for tile in chooser.candidates(name, default, most):
            with chooser.replaced(name, tile):
                kernels, failures = warm.record_samples(info, [sample], 1, device)
            new = [kernel for kernel in kernels if kernel not in launched]
            if new or failures:  # else the call does not use this tile
                found.append(Candidate(call, name, tile, default[name], new, failures))
    return found


def compile_candidates(
    pool: Any, candidates: Sequence[Candidate], device: warm.Device, end: float
) -> list[Candidate]:
    """Compile what candidates need. Those that were too late are left out."""
    pending = [
        (candidate, pool.apply_async(warm.compile_kernel, (kernel, device)))
        for candidate in candidates
        for kernel in candidate.kernels
    ]
    late = set()
    for candidate, compilation in pending:
        compilation.wait(max(end - time.monotonic(), 0.0))
        if compilation.ready():
            candidate.failures += compilation.get()
        else:
            late.add(id(candidate))
    return [candidate for candidate in candidates if id(candidate) not in late]


class Default:
    """A call with the tiles that the launchers choose: its result, and its graph."""

    def __init__(self, call: Call, device: torch.device) -> None:
        info, self.shape, sample = call.find(device)
        self.chooser = tiles.CHOOSERS[info.op]
        self._sets = bench.input_sets(sample, device)
        self._function = bench.variant_function(info, sample, "triton")
        self._clock = clock.of(device)
        self.result = self.run()
        self.graph = self.capture()

    def run(self) -> RESULT:
        first = self._sets[0][0].detach().requires_grad_()
        value = self._function(first, *self._sets[0][1:])
        return value.detach(), torch.autograd.grad(value.sum(), first)[0]

    def capture(self) -> clock.Graph:
        make = functools.partial(bench.timed, self._function, self._sets, "fwd_bwd", "triton")
        return self._clock.graph(make, len(self._sets))


def try_candidate(candidate: Candidate, default: Default, device: torch.device) -> dict[str, Any]:
    """The line of one candidate."""
    line: dict[str, Any] = {
        **candidate.call._asdict(), "sizes": default.shape.sizes, "name": candidate.name,
        "tile": asdict(candidate.tile), "default": asdict(candidate.default),
    }  # fmt: skip
    if candidate.failures:
        return line | {"failed": candidate.failures}
    from triton.runtime.errors import OutOfResources

    try:
        with default.chooser.replaced(candidate.name, candidate.tile):
            result = default.run()
            graph = default.capture()
    except OutOfResources as refusal:  # an answer: this tile does not fit the device
        return line | {"does_not_fit": str(refusal)}
    pairs = zip(("loss", "gradient"), result, default.result, strict=True)
    line["difference"] = {what: _difference(out, of) for what, out, of in pairs}
    times = bench.measure(
        {"default": default.graph.call, "candidate": graph.call},
        seconds=SECONDS,
        device=device,
        warm_up_seconds=SECONDS / 10,
        calls_of={"default": default.graph.calls, "candidate": graph.calls},
    )
    graph.release()
    line["time_us"] = {name: asdict(timing) for name, timing in times.items()}
    line["speedup"] = times["default"].p50 / times["candidate"].p50
    return line


def _difference(out: Tensor, default: Tensor) -> float | str:
    """Largest, over the largest magnitude; as a word where it is not finite, for JSON."""
    out, default = out.double(), default.double()
    found = ((out - default).abs().max() / default.abs().max().clamp_min(1e-300)).item()
    return found if found < float("inf") else str(found)


def in_turns(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """The nearest candidates of all tiles first."""
    groups: dict[tuple[Call, str], list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault((candidate.call, candidate.name), []).append(candidate)
    for row in zip_longest(*groups.values()):
        yield from (candidate for candidate in row if candidate is not None)


def sweep(candidates: Sequence[Candidate], end: float, file: TextIO) -> int:
    """Time candidates until the end; how many were."""
    device = torch.device("cuda")
    defaults: dict[Call, Default] = {}
    done = 0
    for candidate in in_turns(candidates):
        if time.monotonic() > end:
            break
        call = candidate.call
        if call not in defaults:
            defaults[call] = Default(call, device)
        line = try_candidate(candidate, defaults[call], device)
        file.write(json.dumps(line | {"environment": record.environment("cuda")}) + "\n")
        file.flush()
        became = f"x{line['speedup']:.3f} of the default" if "speedup" in line else "not timed"
        print(f"{' '.join(call)} {candidate.name} {candidate.tile}: {became}", flush=True)
        done += 1
    return done


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ops = [info.name for info in opinfos() if info.op in tiles.CHOOSERS]
    parser.add_argument("--op", nargs="+", choices=ops, default=[op for op in OPS if op in ops])
    parser.add_argument("--shape", nargs="+", help="default: those of the table")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--most", type=int, default=12, help="candidates of each tile")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="of the whole sweep (default: 120)"
    )
    parser.add_argument("--output", type=Path, default=Path("sweep_triton.jsonl"))
    args = parser.parse_args()
    begin = time.monotonic()
    in_table = {(op, shape) for op, shape, _ in GPU_TABLE}
    calls = [
        Call(info.name, shape.name, dtype)
        for info in opinfos()
        for shape in info.bench
        for dtype in args.dtype
        if info.name in args.op
        and (shape.name in args.shape if args.shape else (info.name, shape.name) in in_table)
    ]
    if not calls:
        parser.error(f"--shape must name shapes of {', '.join(args.op)}, got {args.shape}")
    processes = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(processes, warm.start) as pool:
        if not torch.cuda.is_available():  # asked after the fork, since this opens the GPU
            print("sweep_triton: torch sees no GPU", file=sys.stderr)
            return 2
        device = warm.present()
        recordings = [
            pool.apply_async(record_candidates, (call, device, args.most)) for call in calls
        ]
        candidates = [candidate for recording in recordings for candidate in recording.get()]
        ready = compile_candidates(pool, candidates, device, begin + COMPILING * args.seconds)
    print(f"{len(ready)} of {len(candidates)} candidates are compiled", flush=True)
    with args.output.open("w") as file:
        done = sweep(ready, begin + args.seconds, file)
    print(f"{done} of {len(candidates)} candidates of {len(calls)} calls tried")
    return 0


if __name__ == "__main__":
    sys.exit(main())
