# SPDX-License-Identifier: Apache-2.0
"""Which GPUs the Triton kernels accept: by compute capability, and by shared memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, each_case, few

pytest.importorskip("triton")

from kdkernels import _dispatch
from kdkernels.triton.common.launch import Arch, assume_arch

T4 = Arch("sm_75", 40, 4 << 20, 64 << 10)
RTX_3090 = Arch("sm_86", 82, 6 << 20, 99 << 10)
NARROW = replace(RTX_3090, shared_bytes=98 << 10)

of_every_op = each_case(lambda found: few(found)[:1], backends=("triton",))


def _on_gpu(case: Case) -> tuple[Any, ...]:
    """Arguments of the forward operator, as a GPU would have them."""
    return tuple(
        replace(arg, device=torch.device("cuda", 0))
        if isinstance(arg, _dispatch.TensorForm)
        else arg
        for arg in case.operator_args()
    )


@of_every_op
def test_graphics_gpus_run_every_op(case: Case) -> None:
    with assume_arch(RTX_3090):
        assert _dispatch.select_name(case.info.op, "auto", _on_gpu(case)) == "triton"


@of_every_op
@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        (T4, "from compute capability 8.0 on, and this one has 7.5"),
        (NARROW, "take up to 99 KiB of shared memory, and sm_86 gives a program 98"),
    ],
    ids=["old", "narrow"],
)
def test_a_gpu_that_cannot_is_refused_by_name(case: Case, arch: Arch, reason: str) -> None:
    """Before the forward runs, and then `auto` takes the definition."""
    with assume_arch(arch):
        assert _dispatch.select_name(case.info.op, "auto", _on_gpu(case)) == "reference"
        with pytest.raises(_dispatch.BackendUnavailableError, match=reason):
            _dispatch.select_name(case.info.op, "triton", _on_gpu(case))
