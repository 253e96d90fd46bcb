# SPDX-License-Identifier: Apache-2.0
"""Times the named shapes of every op on two checkouts of this repository, in turns, in one run.

    python benchmarks/paired.py ../before . --output benchmarks/results/paired_cpu.json

Each checkout runs in a process of its own, with its native libraries built. The two processes take
turns block by block, so what disturbs the machine disturbs both; the one that waits sleeps. A ratio
above 1 says that the second checkout is slower. Two equal checkouts show how far noise reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

BLOCK_SECONDS = 0.03


class Checkout:
    """A process that measures one checkout, a line of JSON at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        environment = os.environ | {
            "PYTHONPATH": str(self.folder),
            "OMP_WAIT_POLICY": "passive",  # threads of the waiting process must not spin
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self.folder} ended at {request}")
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def work() -> None:
    """Answers requests: the shapes there are, a shape to prepare, a block of calls to time."""
    import torch

    from kdkernels.testing import bench, record
    from kdkernels.testing.opinfo import opinfos

    device, dtype = torch.device("cpu"), torch.float32
    infos = {info.name: info for info in opinfos()}
    call: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["what"] == "facts":
            shapes = [
                (info.name, shape.name, shape.sizes)
                for info in infos.values()
                for shape in info.bench
                if shape.device in (None, device.type)
            ]
            facts = record.environment(device.type) | record.version()
            answer: Any = {"shapes": shapes, "environment": facts}
        elif request["what"] == "prepare":
            info = infos[request["op"]]
            (shape,) = (shape for shape in info.bench if shape.name == request["shape"])
            sample = info.bench_sample(shape, device, dtype)
            call = bench.timed(
                bench.variant_function(info, sample, "cpu"),
                bench.input_sets(sample, device),
                "fwd_bwd",
                "cpu",
            )
            answer = _seconds(call, 1)
        else:
            answer = _seconds(call, request["count"])
        print(json.dumps(answer), flush=True)


def _seconds(call: Any, count: int) -> float:
    begin = time.perf_counter()
    for i in range(count):
        call(i)
    return time.perf_counter() - begin


def compare(
    before: Checkout, after: Checkout, op: str, shape: str, seconds: float, longest: float
) -> dict | None:
    """Microseconds per call of both checkouts and their ratio; None for a shape too slow."""
    for checkout in (before, after):
        first = checkout.ask(what="prepare", op=op, shape=shape)
    if first > longest:
        return None
    one = min(checkout.ask(what="block", count=1) for checkout in (before, after))
    count = max(1, min(10_000, round(BLOCK_SECONDS / max(one, 1e-7))))
    taken: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    while len(taken[0]) < 7 or time.perf_counter() - begin < seconds:
        order = (0, 1) if len(taken[0]) % 2 else (1, 0)
        for side in order:
            spent = (before, after)[side].ask(what="block", count=count)
            taken[side].append(spent / count * 1e6)
    ratios = [b / a for a, b in zip(*taken, strict=True)]
    return {
        "before_us": _middle(taken[0]),
        "after_us": _middle(taken[1]),
        "ratio": {key: round(value, 4) for key, value in _middle(ratios, 6).items()},
        "rounds": len(ratios),
    }


def _middle(values: list[float], digits: int = 2) -> dict[str, float]:
    values = sorted(values)
    return {
        f"p{percent}": round(values[min(len(values) - 1, len(values) * percent // 100)], digits)
        for percent in (20, 50, 80)
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, nargs="?", help="a checkout with built libraries")
    parser.add_argument("after", type=Path, nargs="?", default=Path("."), help="default: this one")
    parser.add_argument("--op", nargs="+", help="ops to time (default: all)")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each shape (default: 4)")
    parser.add_argument(
        "--longest",
        type=float,
        default=3.0,
        help="seconds of a call beyond which a shape is left out",
    )
    parser.add_argument("--output", type=Path, help="a JSON file to write")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return 0
    if args.before is None:
        parser.error("before: name a checkout to compare with")
    before, after = Checkout(args.before), Checkout(args.after)
    facts = [checkout.ask(what="facts") for checkout in (before, after)]
    rows = []
    for op, shape, sizes in facts[1]["shapes"]:
        if (args.op and op not in args.op) or [op, shape, sizes] not in facts[0]["shapes"]:
            continue
        found = compare(before, after, op, shape, args.seconds, args.longest)
        row = {"op": op, "shape": shape, "sizes": sizes, **(found or {"skipped": "too slow"})}
        rows.append(row)
        if found is None:
            print(f"{op:24} {shape:16} left out: a call takes more than {args.longest:g} s")
            continue
        ratio = found["ratio"]
        print(
            f"{op:24} {shape:16} {found['before_us']['p50']:12.1f} us "
            f"{found['after_us']['p50']:12.1f} us   x{ratio['p50']:.3f} "
            f"({ratio['p20']:.3f} to {ratio['p80']:.3f})",
            flush=True,
        )
    before.close()
    after.close()
    if args.output:
        result = {
            "what": "float32, forward and backward, backend cpu; ratio = after / before",
            "before": facts[0]["environment"],
            "after": facts[1]["environment"],
            "pairs": rows,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
