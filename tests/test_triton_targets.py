# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for GPUs that need not be here, as it should.

No spills but named ones, no more shared memory than GPUs are asked for, and tensor cores where a
product is claimed.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

import kdkernels.triton
from kdkernels.testing import triton_targets
from kdkernels.testing.aot import recorder
from kdkernels.testing.triton_targets import EXCEPTIONS, TARGETS, TESTED, Compiled
from kdkernels.triton.common.launch import shared_kib

pytestmark = pytest.mark.xdist_group("triton targets")  # which would compile them once each

Compilations = dict[str, dict[str, list[Compiled]]]
RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu_targets.json"


@pytest.fixture(scope="session")
def compilations(request: pytest.FixtureRequest) -> Compilations:
    return triton_targets.compile_all(request.config.cache.mkdir("kdkernels-triton"))


def _every(compilations: Compilations, target: str) -> list[Compiled]:
    return list(itertools.chain(*compilations[target].values()))


@pytest.mark.parametrize("target", TESTED)
@pytest.mark.parametrize("op", triton_targets.op_names())
def test_kernels_compile_without_spills_and_fit(
    compilations: Compilations, op: str, target: str
) -> None:
    assert compilations[target][op]
    wrong = []
    for kernel in compilations[target][op]:
        found = kernel.instructions or "no tensor-core instruction"
        if kernel.spilled > EXCEPTIONS.get((target, kernel.name), (0, ""))[0]:
            wrong.append(f"{kernel.name} spills {kernel.spilled} ({kernel.registers} registers)")
        if kernel.shared > shared_kib(recorder.TARGETS[target]) << 10:
            wrong.append(f"{kernel.name} takes {kernel.shared} bytes of shared memory")
        # where none is expected, one would round fp32 operands that were to be multiplied as they
        # are
        if bool(kernel.instructions) != kernel.expects_tensor_core:
            wrong.append(f"{kernel.name}: {found}")
    assert not wrong, "\n".join(wrong)


def test_the_record_is_of_these_targets() -> None:
    record = json.loads(RECORD.read_text())
    assert record["what"].endswith("not run")
    assert {"sm_80", "sm_86", "sm_89", "sm_120"} <= set(record["targets"]) <= set(TARGETS)
    for target, found in record["targets"].items():
        assert shared_kib(recorder.TARGETS[target]) << 10 <= found["shared_bytes_allowed"]
        assert max(found["shared_bytes"].values()) <= shared_kib(recorder.TARGETS[target]) << 10
        named = {name: most for (at, name), (most, _) in EXCEPTIONS.items() if at == target}
        assert found["spills"] == named
    # the tests compile for the first of these alone
    of = [record["targets"][target] for target in ("sm_86", "sm_89")]
    for field in ("shared_bytes", "most_registers", "spills"):
        assert of[0][field] == of[1][field]


def test_kernels_are_found_wherever_they_are_defined() -> None:
    root = Path(kdkernels.triton.__file__).parent
    kernel = re.compile(r"^def (_\w+_kernel(?:_\w+)?)\(", re.MULTILINE)
    defined = {name for path in root.rglob("*.py") for name in kernel.findall(path.read_text())}
    assert defined
    assert triton_targets.kernels_of_all_ops() == defined


@pytest.mark.parametrize("target", TESTED)
def test_every_kernel_of_every_op_is_covered(compilations: Compilations, target: str) -> None:
    covered = {entry.kernel for entry in _every(compilations, target)}
    assert covered >= triton_targets.kernels_of_all_ops()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_hopper_products_use_warp_group_instructions(
    compilations: Compilations, dtype: str
) -> None:
    products = [
        e for e in _every(compilations, "sm_90") if e.expects_tensor_core and e.name.endswith(dtype)
    ]
    assert products
    without = [e.name for e in products if "wgmma.mma_async" not in e.instructions]
    assert not without
