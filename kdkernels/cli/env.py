# SPDX-License-Identifier: Apache-2.0
"""Show versions, devices, compiled libraries, and which backend every op takes on each device, with
the reasons.

examples:
  kdkernels env
  kdkernels env --json env.json      the same for a bug report"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
from itertools import chain
from typing import Any

import torch

import kdkernels
from kdkernels import _dispatch, _native
from kdkernels._gpu import fp32_matmul, refuse_device
from kdkernels.cli.table import Table, report_stream, write_json
from kdkernels.testing.opinfo import OpInfo, Sample, opinfos

NAME = "env"
HELP = "versions, devices, compiled libraries, and the backend that each op takes here"

_PACKAGES = ("torch", "triton", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json", metavar="FILE", help='write the report as JSON too; "-" is standard output'
    )


def run(args: argparse.Namespace) -> int:
    record = collect()
    file = report_stream(args.json)
    _two_columns("software", record["versions"]).print(file)
    _two_columns("torch", record["torch"]).print(file)
    _two_columns(
        "devices", {device["name"]: device["description"] for device in record["devices"]}
    ).print(file)
    native = {name: reason or "loaded" for name, reason in record["libraries"].items()}
    _two_columns("compiled libraries", native | record["build"]).print(file)
    backends = {name: reason or "available" for name, reason in record["backends"].items()}
    _two_columns("backends", backends).print(file)
    _ops_table(record["ops"]).print(file)
    if args.json:
        write_json(record, args.json)
    return 0


def collect() -> dict[str, Any]:
    """Everything that the command reports, as the JSON record."""
    return {
        "versions": _versions(),
        "torch": {
            "threads": torch.get_num_threads(),
            "CPU capability": torch.backends.cpu.get_cpu_capability(),
            "fp32 products on a GPU": "tf32" if fp32_matmul() != "highest" else "fp32",
            "KDKERNELS_BACKEND": os.environ.get("KDKERNELS_BACKEND", "not set (auto)"),
        },
        "devices": [
            {"name": str(device), "description": _description(device)} for device in devices()
        ],
        "libraries": _libraries(),
        "build": _build(),
        "backends": {name: _backend_reason(name) for name in _dispatch.BACKENDS},
        "ops": [_op(info, device) for info in opinfos() for device in devices()],
    }


def devices() -> list[torch.device]:
    """The CPU and every CUDA device."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in cuda)]


def _versions() -> dict[str, str]:
    found = {
        "kdkernels": kdkernels.__version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
    }
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            found[name] = "not installed"
        else:
            found[name] = importlib.metadata.version(name)
    found["CUDA of torch"] = torch.version.cuda or "none (CPU build)"
    return found


def _description(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", 0)  # ROCm does not say
        facts = (
            properties.name,
            f"sm_{properties.major}{properties.minor}",
            f"{properties.total_memory / 2**30:.1f} GiB",
            f"{properties.multi_processor_count} processors",
            f"{properties.L2_cache_size / 2**20:.0f} MiB of L2",
            f"{shared / 2**10:.0f} KiB of shared memory for a block",
        )
        described = ", ".join(facts if shared else facts[:-1])
        reason = refuse_device(device)
        return described if reason is None else f"{described}; refused by triton and cuda: {reason}"
    return f"{platform.machine()}, {os.cpu_count()} logical cores"


def _libraries() -> dict[str, str | None]:
    module = _native.build_module()
    return {
        "libkdkernels_cpu": _native.load_error("kdkernels_cpu"),
        "libkdkernels_cuda": _native.cuda_load_error(),
        "kdkernels._C": module if isinstance(module, str) else None,
    }


def _build() -> dict[str, str]:
    module = _native.build_module()
    if isinstance(module, str):
        return {}
    return {**module.build_info(), "SIMD level in use": module.simd_level()}


def _backend_reason(backend: str) -> str | None:
    if importlib.util.find_spec(f"kdkernels.{backend}") is None:
        return f"this version has no {backend} kernels"
    return importlib.import_module(f"kdkernels.{backend}").unavailable()


def _smallest(info: OpInfo, device: torch.device) -> Sample:
    """The least sample that is not empty: a call that every part of a backend has to accept."""

    def elements(sample: Sample) -> int:
        values = chain(sample.args, sample.kwargs.values())
        return sum(value.numel() for value in values if isinstance(value, torch.Tensor))

    return min((s for s in info.samples(device, torch.float32) if elements(s)), key=elements)


def _op(info: OpInfo, device: torch.device) -> dict[str, Any]:
    sample = _smallest(info, device)
    base = {"function": info.name, "device": str(device)}
    try:
        answer = kdkernels.explain(info.public, *sample.args, **sample.kwargs)
    except kdkernels.BackendUnavailableError as error:
        # KDKERNELS_BACKEND names one that cannot run here
        return {**base, "backend": None, "error": str(error), "rejected": {}}
    return {**base, "backend": answer.backend, "error": None, "rejected": answer.rejected}


def _two_columns(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title, "")
    for name, value in rows.items():
        table.add(name, value)
    return table


def _ops_table(ops: list[dict[str, Any]]) -> Table:
    table = Table("op", "device", "backend", "why not the others")
    for op in ops:
        lines = [f"{name}: {reason}" for name, reason in op["rejected"].items()] or [
            op["error"] or ""
        ]
        table.add(
            op["function"],
            op["device"],
            op["backend"] or "none",
            lines[0],
            colour="" if op["backend"] else "red",
        )
        for line in lines[1:]:
            table.add("", "", "", line)
    return table
