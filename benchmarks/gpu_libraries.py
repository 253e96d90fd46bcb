# SPDX-License-Identifier: Apache-2.0
"""Native libraries that are built on one machine and used on another one, which has a GPU.

    python benchmarks/gpu_libraries.py pack       builds them for sm_90 in gpu-libraries/
    python benchmarks/gpu_libraries.py install    puts them into kdkernels/, or builds for this GPU

They are built on torch's stable ABI and know no Python, so another torch (2.11 or later) and
another Python load them. A file beside them says from which sources and for which GPUs they were
built: `install` takes no libraries of other sources or GPUs, and none that do not load.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKED = ROOT / "gpu-libraries"
LIBRARIES = ("libkdkernels_cpu.so", "libkdkernels_cuda.so")
ORIGIN = "origin.json"
LOAD = """
import sys
from kdkernels import _native
reasons = [_native.load_error("kdkernels_cpu"), _native.cuda_load_error()]
print(*(reason or "loaded" for reason in reasons), sep="; ")
sys.exit(any(reasons))
"""


def sources_hash() -> str:
    """Of all that the libraries are compiled from."""
    files = [ROOT / "CMakeLists.txt", *sorted((ROOT / "csrc").rglob("*"))]
    total = hashlib.sha256()
    for path in (file for file in files if file.is_file()):
        total.update(f"{path.relative_to(ROOT).as_posix()} {path.stat().st_size}\n".encode())
        total.update(path.read_bytes())
    return total.hexdigest()


def build(architectures: str, *arguments: str) -> int:
    environment = {"KDKERNELS_NATIVE": "1", "KDKERNELS_CUDA_ARCHITECTURES": architectures}
    command = [sys.executable, "setup.py", "build_ext", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode


def pack(architectures: str) -> int:
    shutil.rmtree(PACKED, ignore_errors=True)
    if build(architectures, "--build-lib", str(PACKED)):
        return 1
    for name in LIBRARIES:
        shutil.move(PACKED / "kdkernels" / name, PACKED / name)
    shutil.rmtree(PACKED / "kdkernels")  # what is left is for one version of Python
    origin = {"sources": sources_hash(), "architectures": architectures}
    (PACKED / ORIGIN).write_text(json.dumps(origin))
    print(f"packed {', '.join(LIBRARIES)} for {architectures} in {PACKED.name}/")
    return 0


def install() -> int:
    capability = _capability()
    reason = _why_not_packed(capability)
    if reason is None:
        for name in LIBRARIES:
            # a library that a process has loaded keeps its file
            (ROOT / "kdkernels" / name).unlink(missing_ok=True)
            shutil.copy2(PACKED / name, ROOT / "kdkernels" / name)
        if _load() == 0:
            print(f"{PACKED.name}/ is installed")
            return 0
        for name in LIBRARIES:
            (ROOT / "kdkernels" / name).unlink()
        reason = "its libraries do not load here"
    print(f"{PACKED.name}/ is not used: {reason}; building for {capability}", flush=True)
    return build(f"{capability}-real", "--inplace") or _load()


def _capability() -> str:
    """Of the first GPU, as "90", by what starts faster than torch."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    return subprocess.check_output(command, text=True).split()[0].replace(".", "")


def _why_not_packed(capability: str) -> str | None:
    missing = [name for name in (*LIBRARIES, ORIGIN) if not (PACKED / name).exists()]
    if missing:
        return f"it has no {' and no '.join(missing)}"
    origin = json.loads((PACKED / ORIGIN).read_text())
    if origin["sources"] != sources_hash():
        return "it was built from other sources"
    built_for = {one.partition("-")[0] for one in origin["architectures"].split(";")}
    if capability not in built_for:
        return f"it was built for {origin['architectures']}"
    return None


def _load() -> int:
    """Load the libraries in a process of its own and print what became of it."""
    return subprocess.run([sys.executable, "-c", LOAD], cwd=ROOT).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack")
    packing.add_argument(
        "--architectures", default="90-real", help="as KDKERNELS_CUDA_ARCHITECTURES"
    )
    commands.add_parser("install")
    args = parser.parse_args()
    return pack(args.architectures) if args.command == "pack" else install()


if __name__ == "__main__":
    sys.exit(main())
