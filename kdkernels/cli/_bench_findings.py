# SPDX-License-Identifier: Apache-2.0
"""What `kdkernels bench` is to measure and has found, which a new process can go on with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kdkernels import _dispatch
from kdkernels.cli.lines import Lines
from kdkernels.testing import clock
from kdkernels.testing.opinfo import BenchShape, OpInfo

DTYPE_NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
GATE, LOST = "a result is wrong: ", "it broke the device: "


def sizes(shape: BenchShape) -> str:
    """Of a shape, in a line of text."""
    return " ".join(f"{name}={size}" for name, size in shape.sizes.items())


@dataclass(frozen=True)
class Planned:
    """A measurement of one shape."""

    info: OpInfo
    shape: BenchShape
    dtype: str
    part: str  # of `bench.MODES`
    timings: tuple[str, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, DTYPE_NAMES[self.dtype])

    def __str__(self) -> str:
        what = f"{self.info.name} {self.shape.name} {sizes(self.shape)}"
        return f"{what} {self.dtype} {self.part} by {', '.join(self.timings)}"


class Findings:
    """What has been measured, as lines too; it begins with those that are gone on with."""

    def __init__(self, out: Lines) -> None:
        self._out = out
        self.gates = {
            (line["op"], line["backend"], line["dtype"]): line["wrong"]
            for line in out.before
            if "gate" in line
        }
        self.lost = [line for line in out.before if "lost_device" in line]
        self.records = [line for line in out.before if "timing" in line]

    def add(self, entry: dict[str, Any]) -> None:
        self.records.append(entry)
        self._out.write(entry)

    def add_gate(self, op: str, backend: str, dtype: str, wrong: list[str]) -> None:
        self.gates[op, backend, dtype] = wrong
        line = {"gate": not wrong, "op": op, "backend": backend, "dtype": dtype, "wrong": wrong}
        self._out.write(line)

    def lose(self, work: Planned, error: clock.DeviceLostError) -> None:
        line = {"lost_device": error.reason, "variant": error.variant}
        self.lost.append({**line, "op": work.info.name, "dtype": work.dtype, "during": str(work)})
        self._out.write(self.lost[-1])

    def refused(self, work: Planned) -> dict[str, str]:
        """What is not timed any more, and why."""
        here = work.info.name, work.dtype
        found = {
            backend: f"{GATE}{'; '.join(wrong)}"
            for (op, backend, dtype), wrong in self.gates.items()
            if (op, dtype) == here and wrong
        }
        return found | {
            line["variant"]: f"{LOST}{line['lost_device']}"
            for line in self.lost
            if (line["op"], line["dtype"]) == here
        }

    def missing(self, work: Planned) -> tuple[str, ...]:
        """Ways of timing that have no record."""
        key = work.info.name, work.shape.name, DTYPE_NAMES[work.dtype], work.part
        done = {
            entry["timing"]
            for entry in self.records
            if (entry["op"], entry["shape"]["name"], entry["dtype"], entry["mode"]) == key
        }
        return tuple(timing for timing in work.timings if timing not in done)

    def failures(self) -> list[str]:
        """All that is the fault of this package."""
        found = [text for wrong in self.gates.values() for text in wrong]
        found += [f"{line['during']}: {line['variant']} broke the device" for line in self.lost]
        for entry in self.records:
            found += _failures(entry)
        return list(dict.fromkeys(found))


def _failures(entry: dict[str, Any]) -> list[str]:
    """What went wrong in a record that is the fault of this package."""
    where = f"{entry['op']} {entry['shape']['name']} {entry['dtype']} {entry['timing']}"
    found = [f"{where}: {entry['failed']}"] if "failed" in entry else []
    for name, result in entry["variants"].items():
        reason = result.get("failed") or result.get("error_failed")
        if name in _dispatch.BACKENDS and reason and not reason.startswith((GATE, LOST)):
            found.append(f"{where} on {name}: {reason}")
    return found
