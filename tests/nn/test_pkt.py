# SPDX-License-Identifier: Apache-2.0
"""PKTLoss: its presets, by the definition."""

from __future__ import annotations

import torch
from modules import maps

import kdkernels as kd
from kdkernels.reference import _pkt as pkt_reference

PKT = kd.nn.PKTLoss


def test_pkt_of_repdistiller() -> None:
    student, teacher = maps(6, 3, 4), maps(6, 20)
    expected = 30000 * pkt_reference.pkt(student.flatten(1), teacher)
    torch.testing.assert_close(PKT()(student, teacher), expected)
    torch.testing.assert_close(PKT(2)([student] * 2, [teacher] * 2), expected / 7500)


def test_pkt_of_information_flow_adds_both_kernels() -> None:
    student, teacher = maps(6, 4), maps(6, 20)
    expected = sum(
        pkt_reference.pkt(student, teacher, kernel=kernel, divergence="jeffreys")
        for kernel in ("cosine", "student_t")
    )
    torch.testing.assert_close(PKT(preset="information_flow")(student, teacher), expected)
