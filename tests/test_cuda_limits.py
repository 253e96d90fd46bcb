# SPDX-License-Identifier: Apache-2.0
"""Which GPUs the CUDA kernels accept: by compute capability, and by shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from cases import Case, assert_within_budget, each_case, gradients, leaves
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kdkernels import _dispatch, _gpu, _native
from kdkernels.cuda import gram_mse
from kdkernels.testing.opinfo import Sample, opinfos
from kdkernels.testing.opinfos import _key_bank

pytestmark = [
    pytest.mark.xdist_group("cuda on the host"),
    pytest.mark.skipif(
        not _native.cuda_host_library(), reason="the CUDA kernels do not run on the host here"
    ),
]
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Tensor]:
    """A tensor on a GPU that has the properties asked for."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**request.param)
    )
    monkeypatch.setattr(_native, "cuda_host_library", lambda: None)
    _gpu.refuse_device.cache_clear()
    with FakeTensorMode():
        yield torch.empty(4, 4, device="cuda")
    _gpu.refuse_device.cache_clear()


@pytest.mark.parametrize(
    ("gpu", "old"),
    [
        ({"major": major, "minor": minor}, major < 8)
        for major, minor in ((7, 0), (7, 5), (8, 0), (8, 6), (12, 0))
    ],
    indirect=["gpu"],
)
def test_gpus_without_the_tensor_cores_are_refused(gpu: Tensor, old: bool) -> None:
    for op in {info.op for info in opinfos()}:
        found = _dispatch.implementation(op, "cuda")
        if isinstance(found, str):
            continue
        reason = found.rejects([gpu])
        if old:
            assert reason is not None
            assert "from compute capability 8.0 on, and this one has 7." in reason
        else:
            assert reason is None


@pytest.mark.parametrize(
    ("gpu", "fits"),
    [({"shared_memory_per_block_optin": kib << 10}, kib >= 128) for kib in (99, 163)],
    indirect=["gpu"],
)
def test_blocks_that_do_not_fit_a_gpu_are_refused_before_the_launch(
    gpu: Tensor, fits: bool
) -> None:
    reason = gram_mse.supports(gpu, gpu, "streamed")
    assert reason is None if fits else "this GPU gives a block 99" in reason
    assert gram_mse.supports(gpu, gpu, "resident") is None


@each_case(dtypes=(torch.float16, torch.bfloat16, torch.float32), backends=("cuda",))
def test_every_block_fits_99_kib_or_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a launch asks for more than GPUs for graphics give a block, the host reports it."""

    def run() -> list[Tensor]:
        args = leaves(case)
        value = case.call(*args)
        return [value.detach(), *gradients(value, args)]

    wanted = run()
    monkeypatch.setenv("KDKERNELS_CUDA_HOST_SHARED_KIB", "99")
    reason = case.why_not()
    if reason is not None:
        assert "streamed" in case.operator_args()
        assert "need 128 KiB of shared memory, and this GPU gives a block 99" in reason
        return
    assert all(torch.equal(a, b) for a, b in zip(run(), wanted, strict=True))


@pytest.mark.parametrize("widths", [(21, 21), (20, 70)], ids=["one_bank", "two_banks"])
def test_fewer_stages_where_four_do_not_fit(
    widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles of rows and of keys; steps of one tile more and fewer than the stages."""
    monkeypatch.setenv("KDKERNELS_CUDA_HOST_SHARED_KIB", "99")
    banks = (x.to(torch.bfloat16) for x in _key_bank.draw(70, *widths, 300))
    student, teacher, keys, teacher_keys = banks
    args = (student, teacher, keys, *(() if widths[0] == widths[1] else (teacher_keys,)))
    info = next(info for info in opinfos() if info.name == "relational_kl")
    case = Case(info, "cuda", CPU, torch.bfloat16, Sample("several_tiles", args, {}))
    assert_within_budget(case, case.errors())
