# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for GPUs that need not be here, as it should.

No spills, no more shared memory than there is, and tensor cores where a product is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

pytest.importorskip("triton")

from kdkernels.testing import triton_targets
from kdkernels.testing.triton_targets import SHARED_KIB, TARGETS, Compiled, variant_names

pytestmark = pytest.mark.xdist_group("triton targets")  # which would compile them once each

# enumerated here, where kernels may be interpreted; compiled by processes where they are not
CASES = [(target, name) for target in TARGETS for name in variant_names(target)]


@pytest.fixture(scope="session")
def compilations(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[list[Compiled]]]]:
    """One compiling process per target, two at a time."""
    cache = request.config.cache.mkdir("kdkernels-triton")
    pool = ThreadPoolExecutor(2)
    yield {target: pool.submit(triton_targets.compile_target, target, cache) for target in TARGETS}
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def compiled(compilations: dict[str, Future[list[Compiled]]], target: str, name: str) -> Compiled:
    return next(entry for entry in compilations[target].result() if entry.name == name)


@pytest.mark.parametrize(
    ("target", "name"), CASES, ids=[f"{name}-{target}" for target, name in CASES]
)
def test_kernel_compiles_without_spills_and_fits(compiled: Compiled, target: str) -> None:
    assert compiled.spilled == 0, (
        f"{compiled.name} on {target} spills ({compiled.registers} registers)"
    )
    assert compiled.shared <= SHARED_KIB[target] * 1024
    # where none is expected, one would round fp32 operands that were to be multiplied as they are
    found = compiled.instructions or "no tensor-core instruction"
    assert bool(compiled.instructions) == compiled.expects_tensor_core, f"{compiled.name}: {found}"


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_of_every_op_is_covered(
    compilations: dict[str, Future[list[Compiled]]], target: str
) -> None:
    covered = {entry.kernel for entry in compilations[target].result()}
    assert covered >= triton_targets.kernels_of_all_ops()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_hopper_products_use_warp_group_instructions(
    compilations: dict[str, Future[list[Compiled]]], dtype: str
) -> None:
    products = [
        e
        for e in compilations["sm_90"].result()
        if e.expects_tensor_core and e.name.endswith(dtype)
    ]
    assert products
    without = [e.name for e in products if "wgmma.mma_async" not in e.instructions]
    assert not without
