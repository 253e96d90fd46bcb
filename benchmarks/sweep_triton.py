# SPDX-License-Identifier: Apache-2.0
"""Times candidate tiles of the Triton kernels of gram_mse on this GPU, one kernel at a time.

    python benchmarks/sweep_triton.py --shape pooled huge_512 --dtype bf16 --seconds 120 --output
    sweep.jsonl

Each candidate replaces one tile of the configuration that `pick_config` chooses and takes turns
with the default in one run; each line of the output is one candidate. A change of `pick_config`
brings these lines with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from kdkernels.ops.gram_mse import choose_algorithm, weight_of_factored
from kdkernels.testing import bench, oracle, record
from kdkernels.testing.opinfo import BenchShape, OpInfo, Sample, opinfos

FIELDS = {
    "factored": ("product", "row", "factored"),
    "resident": ("product", "weighted"),
    "streamed": ("pair", "pair_weights", "weighted"),
}
SQUARE = ("product", "pair")  # their tiles are mirrored
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SIZES, STEPS, WARPS, STAGES = (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4)
MOST_ELEMENTS = 256 * 128  # of an output tile: more accumulators than registers hold


class Override:
    """Stands in for `pick_config`: the default, with one tile replaced while a candidate runs."""

    def __init__(self) -> None:
        from kdkernels.triton.gram_mse import call

        self._default: Callable[..., Any] = call.pick_config
        self.tile: tuple[str, Any] | None = None
        call.pick_config = self.pick

    def pick(self, *args: Any, **kwargs: Any) -> Any:
        config = self._default(*args, **kwargs)
        if self.tile is None:
            return config
        field, tile = self.tile
        config = replace(config, **{field: tile})
        # rows per launch, streamed: a multiple of the tile
        return replace(
            config, chunk=max(config.pair.m, config.chunk // config.pair.m * config.pair.m)
        )

    def during(self, tile: tuple[str, Any] | None, call: bench.Call) -> bench.Call:
        def run(i: int) -> Any:
            self.tile = tile
            return call(i)

        return run


def candidates(field: str, default: Any) -> Iterator[Any]:
    """Tiles to try in place of the default, nearest first."""
    found = [
        replace(default, m=m, n=n, k=k, num_warps=num_warps, num_stages=num_stages)
        for m, n, k, num_warps, num_stages in itertools.product(SIZES, SIZES, STEPS, WARPS, STAGES)
        if m * n <= MOST_ELEMENTS and (m == n or field not in SQUARE)
    ]

    def distance(tile: Any) -> int:
        return sum(value != asdict(default)[name] for name, value in asdict(tile).items())

    yield from sorted((tile for tile in found if tile != default), key=distance)


def sweep(
    info: OpInfo, shape: BenchShape, dtype: torch.dtype, seconds: float, file: TextIO
) -> None:
    from triton.runtime.errors import OutOfResources

    device = torch.device("cuda")
    sample: Sample = info.bench_sample(shape, device, dtype)
    rows, width = sample.args[0].shape[-2:]
    algorithm = choose_algorithm(
        rows, width, sample.args[1].shape[-1], normalize="row_l2", kernel="linear",
        algorithm=sample.kwargs.get("algorithm", "auto"),
        factored_counts=weight_of_factored(dtype, device, "triton"),
    )  # fmt: skip
    function = bench.variant_function(info, sample, "triton")
    call = bench.timed(function, bench.input_sets(sample, device), "fwd_bwd", "triton")
    truth = oracle.oracle(info, shape, sample, device)
    override = Override()
    default = _picked(override, function, sample)
    fields = FIELDS[algorithm]
    for number, field in enumerate(fields):
        end = time.monotonic() + seconds / len(fields)
        for tile in candidates(field, getattr(default, field)):
            if time.monotonic() > end:
                break
            line: dict[str, Any] = {
                "shape": shape.name,
                "sizes": shape.sizes,
                "dtype": str(dtype).removeprefix("torch."),
                "algorithm": algorithm, "field": field, "tile": asdict(tile),
                "default": asdict(getattr(default, field)),
            }  # fmt: skip
            override.tile = (field, tile)
            try:
                line["error"] = oracle.relative_errors(function, sample, truth, info.diff_args[0])
            except (
                OutOfResources
            ) as refusal:  # an answer, not a failure: this tile does not fit the device
                line["does_not_fit"] = str(refusal)
            else:
                times = bench.measure(
                    {
                        "default": override.during(None, call),
                        "candidate": override.during((field, tile), call),
                    },
                    seconds=0.2,
                    device=device,
                    warm_up_seconds=0.05,
                )
                line["time_us"] = {name: asdict(timing) for name, timing in times.items()}
                line["speedup"] = times["default"].p50 / times["candidate"].p50
                print(
                    f"{shape.name} {field} {tile}: x{line['speedup']:.3f} of the default",
                    flush=True,
                )
            line |= {"environment": record.environment("cuda"), **record.version()}
            file.write(json.dumps(line) + "\n")
            file.flush()
        print(f"{shape.name}: {field} done ({number + 1} of {len(fields)})", flush=True)


def _picked(override: Override, function: Callable[..., Any], sample: Sample) -> Any:
    """The default configuration of a sample, as the launcher picks it."""
    seen = []
    pick = override._default

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(pick(*args, **kwargs))
        return seen[-1]

    override._default = spy
    with torch.no_grad():
        function(*sample.args)
    override._default = pick
    return seen[0]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", default=["pooled", "layer4"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="of the whole sweep (default: 120)"
    )
    parser.add_argument("--output", type=Path, default=Path("sweep_triton.jsonl"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("sweep_triton: torch sees no GPU", file=sys.stderr)
        return 2
    (info,) = (info for info in opinfos() if info.name == "gram_mse")
    shapes = [shape for shape in info.bench if shape.name in args.shape]
    if len(shapes) != len(args.shape):
        parser.error(
            f"--shape must be of {', '.join(shape.name for shape in info.bench)}, got {args.shape}"
        )
    share = args.seconds / (len(shapes) * len(args.dtype))
    with args.output.open("w") as file:
        for shape in shapes:
            for dtype in args.dtype:
                sweep(info, shape, DTYPES[dtype], share, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
