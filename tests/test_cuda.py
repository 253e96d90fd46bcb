# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels without a GPU: run on the host, with and without sanitizers, and what nvcc made
of them. What every op must do is in the generic tests, which run them too (docs/cuda.md)."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import cuda_host
import pytest
import torch
from cases import Case, assert_within_budget, gradients, leaves
from torch import Tensor

from kdkernels import _native
from kdkernels.testing.fp32 import fp32_products
from kdkernels.testing.opinfo import Sample, opinfos, randn
from kdkernels.testing.opinfos import _key_bank, lsh_bce

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ORDERS = ("forward", "reverse", "shuffle-1", "shuffle-2")
# Kernels that multiply, which have to use tensor cores: one tile each, two blocks of 256 threads on
# a multiprocessor for operands of 16 bits; or two tiles, one block.
ONE_TILE = re.compile(r"(product|encode|project)_kernel")
PRODUCT = re.compile(rf"{ONE_TILE.pattern}|pair_sums_kernel|kernel_pair_weights")
HALF = re.compile(r"4MathE[01]")  # as a template argument in a mangled name
IEEE = "4MathE3"  # without tensor cores

# One process builds them, one after another.
pytestmark = [
    pytest.mark.xdist_group("cuda on the host"),
    pytest.mark.skipif(
        not _native.cuda_host_library() or cuda_host.obstacle() is not None,
        reason="the CUDA kernels do not run on the host here",
    ),
]


# Samples of several tiles, splits and chunks, whose edges fill neither a tile nor a vector.
LARGE: dict[str, Callable[[torch.dtype], Sample]] = {
    "lsh_bce": lambda dtype: Sample("several_tiles", lsh_bce._draw(150, 72, 309, CPU, dtype)),
    "gram_mse-resident": lambda dtype: _gram_mse(150, 401, 163, dtype),
    "gram_mse-streamed": lambda dtype: _gram_mse(401, 40, 21, dtype, normalize="row_l1"),
    "gram_mse-feature": lambda dtype: _gram_mse(
        260, 30, 21, dtype, normalize="feature", algorithm="tiled"
    ),
    "triplet_loss-batch_hard": lambda dtype: _triplet_loss(300, 0, 40, dtype, mining="batch_hard"),
    "relational_kl": lambda dtype: _relational_kl(130, 21, 21, 600, dtype, exclude=True),
    "relational_kl-two_banks": lambda dtype: _relational_kl(40, 20, 70, 400, dtype),
    "info_nce": lambda dtype: _info_nce(30, 150, 1100, dtype),
    "triplet_loss-references": lambda dtype: _triplet_loss(
        140, 270, 21, dtype, mining="batch_semihard"
    ),
    "pairwise-in_batch": lambda dtype: _pairwise((300, 41), None, "euclidean", dtype),
    "pairwise-pair": lambda dtype: _pairwise((139, 24), 268, "rbf", dtype),
    "pairwise-groups": lambda dtype: _pairwise((3, 30, 261), 33, "sqeuclidean", dtype),
    "pairwise-cosine": lambda dtype: _pairwise((2, 150, 9), None, "cosine", dtype),
    "pairwise-dot": lambda dtype: _pairwise((139, 21), 270, "dot", dtype),
    "triplet_loss_all-batch": lambda dtype: _triplet_loss_all(260, 0, dtype, mining="batch_all"),
    "triplet_loss_all-references": lambda dtype: _triplet_loss_all(
        40, 600, dtype, mining="pair_semihard"
    ),
    "triplet_loss_all-soft": lambda dtype: _triplet_loss_all(
        7, 600, dtype, mining="batch_all", soft=True, distance="euclidean", margin=20.0
    ),
}


def _gram_mse(B: int, D_s: int, D_t: int, dtype: torch.dtype, **options: str) -> Sample:
    sides = (randn(B, D, seed=D, device=CPU, dtype=torch.float64) / D**0.25 for D in (D_s, D_t))
    return Sample("several_tiles", tuple(x.to(dtype) for x in sides), options)


def _relational_kl(
    B: int, D: int, E: int, K: int, dtype: torch.dtype, exclude: bool = False
) -> Sample:
    student, teacher, keys, teacher_keys = (x.to(dtype) for x in _key_bank.draw(B, D, E, K))
    banks = (keys,) if D == E else (keys, teacher_keys)
    options = {"exclude": torch.arange(B) * 7 % K} if exclude else {}
    return Sample("several_tiles", (student, teacher, *banks), options)


def _info_nce(B: int, D: int, K: int, dtype: torch.dtype) -> Sample:
    queries, _, keys, _ = (x.to(dtype) for x in _key_bank.draw(B, D, D, K))
    few = K // 3  # some blocks have no key
    options = {"num_keys": torch.tensor(few)}
    return Sample("several_tiles", (queries, keys, torch.arange(B) * 5 % few), options)


def _triplet_loss(B: int, M: int, D: int, dtype: torch.dtype, **options: Any) -> Sample:
    """Classes of one to a dozen rows, in no order; references if M > 0."""
    x, r = (randn(n, D, seed=n, device=CPU, dtype=dtype) for n in (B, M))
    labels, reference_labels = (torch.arange(n) ** 2 % 61 for n in (B, M))
    if M > 0:
        options |= {"references": r, "reference_labels": reference_labels}
    return Sample("several_tiles", (x, labels), options)


def _pairwise(shape: tuple[int, ...], M: int | None, metric: str, dtype: torch.dtype) -> Sample:
    """Every seventh row is close to every other such one; the rows of x alone if M is None."""
    sizes = (shape, *(() if M is None else ((*shape[:-2], M, shape[-1]),)))
    sides = tuple(
        randn(*size, seed=seed, device=CPU, dtype=dtype) for seed, size in enumerate(sizes)
    )
    centre = sides[0][..., :1, :].clone()
    for x in sides:
        x[..., ::7, :] = centre + x[..., ::7, :] / 16
    return Sample("several_tiles", sides, {"metric": metric, "gamma": 0.02})


def _triplet_loss_all(B: int, M: int, dtype: torch.dtype, **options: Any) -> Sample:
    """Clusters of whole numbers, whose squared distances are exact, so that rounding decides
    nothing; some of the losses are above 0. Tiles with close rows and without. Of M > 0 references
    half are of one class, more than a block ranks at once."""
    D, generator = 21, torch.Generator().manual_seed(1)
    centres, spread = (
        torch.randint(-high, high + 1, (n, D), generator=generator)
        for high, n in ((8, 61), (1, max(B, M)))
    )

    def side(n: int, labels: Tensor) -> tuple[Tensor, Tensor]:
        return (centres[labels] + spread[:n]).to(dtype), labels

    rows = torch.arange(max(B, M)) ** 2 % 61
    if M > 0:
        names = ("references", "reference_labels")
        options |= dict(zip(names, side(M, rows * (torch.arange(M) % 2)), strict=True))
    unlike = {"normalize_embeddings": False, "distance": "sqeuclidean", "margin": 700.25}
    return Sample("several_tiles", side(B, rows[:B]), unlike | options)


def _large(name: str, dtype: torch.dtype) -> Case:
    info = next(info for info in opinfos() if info.name == name.partition("-")[0])
    return Case(info, "cuda", CPU, dtype, LARGE[name](dtype))


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.float32, "ieee"), (torch.float32, "tf32"), (torch.bfloat16, "ieee")],
    ids=["fp32-ieee", "fp32-tf32x3", "bf16"],
)
@pytest.mark.parametrize("name", LARGE)
def test_several_tiles(name: str, dtype: torch.dtype, precision: Literal["ieee", "tf32"]) -> None:
    case = _large(name, dtype)
    with fp32_products(precision):
        assert_within_budget(case, case.errors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", LARGE)
def test_the_order_of_threads_and_blocks_makes_no_difference(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, runs = _large(name, dtype), []
    for order in ORDERS:
        monkeypatch.setenv("KDKERNELS_CUDA_HOST_ORDER", order)
        args = leaves(case)
        value = case.call(*args)
        runs.append([value.detach(), *gradients(value, args)])
    for run in runs[1:]:
        assert all(torch.equal(first, other) for first, other in zip(runs[0], run, strict=True))


def _planted(path: Path, which: int, faulty: bool) -> tuple[list[float], str]:
    """Results and error of a kernel of tests/cpp/planted.cu."""
    out, error = (ctypes.c_float * 64)(), ctypes.create_string_buffer(256)
    library = ctypes.CDLL(str(path))
    library.planted(ctypes.c_int(which), ctypes.c_bool(faulty), out, error)
    return list(out), error.value.decode()


BARRIER, BOUNDS, DIVERGENCE, COPY, COLLECTIVE = range(5)
NUMBERS = [float(i) for i in range(64)]
VOTES = [float(i % 3 == 0) for i in range(64)]
RIGHT = {BARRIER: NUMBERS[::-1], DIVERGENCE: NUMBERS, COPY: NUMBERS, COLLECTIVE: VOTES}


@pytest.fixture(scope="module")
def plain() -> Path:
    cuda_host.build("planted_plain")
    return cuda_host.library("planted_plain")


@pytest.mark.parametrize("which", RIGHT)
def test_kernels_without_a_fault_are_right_in_every_order(
    plain: Path, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for order in ORDERS:
        monkeypatch.setenv("KDKERNELS_CUDA_HOST_ORDER", order)
        assert _planted(plain, which, False) == (RIGHT[which], "")


def test_a_missing_barrier_shows_in_the_order(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = set()
    for order in ORDERS:
        monkeypatch.setenv("KDKERNELS_CUDA_HOST_ORDER", order)
        results.add(repr(_planted(plain, BARRIER, True)))
    assert len(results) > 1


def test_a_copy_without_a_wait_is_not_there(plain: Path) -> None:
    results, _ = _planted(plain, COPY, True)
    assert all(x != x for x in results)


def test_threads_that_miss_a_barrier_are_an_error(plain: Path) -> None:
    _, error = _planted(plain, DIVERGENCE, True)
    assert "32 of 64 threads wait at a barrier" in error


def test_lanes_in_different_collectives_are_an_error(plain: Path) -> None:
    _, error = _planted(plain, COLLECTIVE, True)
    assert error.endswith("lanes of a warp are in __ballot_sync and in __shfl_sync")


def _sanitized(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    compiler = os.environ.get("CXX", "g++")
    runtime = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # Python allocates most: few frames are kept of each allocation, and little of what was freed
    options = "detect_leaks=0:malloc_context_size=4:quarantine_size_mb=16"
    environment |= {"LD_PRELOAD": runtime, "ASAN_OPTIONS": options}
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("faulty", [False, True])
def test_an_access_out_of_bounds_is_found(faulty: bool) -> None:
    cuda_host.build("planted_sanitized")
    path = cuda_host.library("planted_sanitized")
    code = (
        "import ctypes; out, error = (ctypes.c_float * 64)(), ctypes.create_string_buffer(256)\n"
        f"ctypes.CDLL({str(path)!r}).planted({BOUNDS}, ctypes.c_bool({faulty}), out, error)"
    )
    done = _sanitized("-c", code)
    assert ("heap-buffer-overflow" in done.stderr) == faulty, done.stderr
    assert (done.returncode != 0) == faulty


@pytest.mark.sanitize
def test_every_kernel_under_the_sanitizers() -> None:
    cuda_host.build("kdkernels_cuda_sanitized")
    library = str(cuda_host.library("kdkernels_cuda_sanitized"))
    command = [
        "-m",
        "kdkernels",
        "check",
        "--backend",
        "cuda",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "bfloat16",
    ]
    done = _sanitized(*command, KDKERNELS_CUDA_HOST=library)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(r"\d+ passed, 0 failed", done.stdout)


@dataclass(frozen=True)
class Resources:
    architecture: str
    kernel: str  # mangled
    registers: int
    local_bytes: int  # stack and spills
    tensor_core: int  # instructions
    slow_divisions: int  # fp32 divisions that may call the slow path of IEEE division


@cache
def _tool() -> str:
    """cuobjdump of the toolkit, or the one in triton's wheel."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip("triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


def _resources(path: Path, architecture: str) -> Iterator[Resources]:
    def output(option: str) -> str:
        return subprocess.run(
            [_tool(), "--gpu-architecture", architecture, option, str(path)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    counts: dict[str, tuple[int, int]] = {}
    for part in re.split(r"\n\s*Function : ", output("-sass"))[1:]:
        counts[part.split()[0]] = len(re.findall(r"\bHMMA\b", part)), _slow_divisions(part)
    found = re.findall(
        r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", output("-res-usage")
    )
    for kernel, registers, stack, local in found:
        yield Resources(architecture, kernel, int(registers), int(stack) + int(local),
                        *counts[kernel])  # fmt: skip


def _slow_divisions(sass: str) -> int:
    """Calls of a kernel to subroutines that take an fp32 reciprocal. Those of integers convert
    them, those of fp64 take the high word's."""
    code = {int(at, 16): text for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?) ;", sass)}
    places, calls = sorted(code), 0
    for text in code.values():
        if (call := re.search(r"\bCALL\S* 0x([0-9a-f]+)", text)) is None:
            continue
        body = []
        for at in places[places.index(int(call[1], 16)) :]:
            body.append(code[at])
            if code[at].startswith("RET"):
                break
        words = " ".join(body)
        calls += "MUFU.RCP " in words and not re.search(r"64H|I2F", words)
    return calls


def _built(architecture: str) -> Path | None:
    """The installed library, if it has code for an architecture and nothing changed since."""
    library = Path(_native.__file__).parent / "libkdkernels_cuda.so"
    module = _native.build_module()
    if isinstance(module, str) or not library.exists():
        return None
    names = re.findall(r"\d+", module.build_info()["cuda_architectures"])
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cu")]
    newer = any(path.stat().st_mtime > library.stat().st_mtime for path in sources)
    return None if newer or architecture.removeprefix("sm_") not in names else library


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_100"])
def device_code(request: pytest.FixtureRequest) -> list[Resources]:
    library = _built(request.param)
    if library is not None:
        return list(_resources(library, request.param))
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc not found")
    cuda_host.build(request.param)
    files = sorted((cuda_host.BUILD / request.param).glob("*.cubin"))
    return [kernel for file in files for kernel in _resources(file, request.param)]


def test_device_code_spills_nothing_and_fits(device_code: list[Resources]) -> None:
    assert device_code
    for kernel in device_code:
        assert kernel.local_bytes == 0, kernel
        two_blocks = ONE_TILE.search(kernel.kernel) and HALF.search(kernel.kernel)
        assert kernel.registers <= (128 if two_blocks else 255), kernel


def test_products_use_tensor_cores_where_claimed(device_code: list[Resources]) -> None:
    products = [kernel for kernel in device_code if PRODUCT.search(kernel.kernel)]
    assert products
    for kernel in products:
        assert (kernel.tensor_core > 0) == (IEEE not in kernel.kernel), kernel


def test_epilogues_divide_without_a_slow_path(device_code: list[Resources]) -> None:
    """`kdk::quotient`, once per element; a division per row does no harm."""
    for kernel in device_code:
        per_row = "relational_kl_merge_kernel" in kernel.kernel
        assert kernel.slow_divisions <= (3 if per_row else 0), kernel


def test_the_library_names_where_the_current_stream_is() -> None:
    """Symbols of a library that torch has loaded are found only by who names it as needed."""
    library = Path(_native.__file__).parent / "libkdkernels_cuda.so"
    if not library.exists():
        pytest.skip("libkdkernels_cuda.so was not built")
    done = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    needed = re.findall(r"\(NEEDED\).*\[(lib\w+)\.so", done.stdout)
    assert {"libtorch_cpu", "libtorch_cuda"} <= set(needed)
