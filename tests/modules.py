# SPDX-License-Identifier: Apache-2.0
"""What the tests of several modules share: inputs, formulas with plain loops, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.nn._state import ProcessState


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def similarity_preserving(student: Tensor, teacher: Tensor, p: int) -> Tensor:
    """Entry by entry, with plain loops."""
    B, total = len(student), torch.zeros((), dtype=torch.float64)
    for i in range(B):
        rows = [
            torch.stack([torch.dot(x[i].flatten(), x[j].flatten()) for j in range(B)])
            for x in (student, teacher)
        ]
        rows = [row / row.abs().pow(p).sum().pow(1 / p) for row in rows]
        total = total + (rows[0] - rows[1]).pow(2).sum()
    return total / B**2


def unit(x: Tensor) -> Tensor:
    """Rows of norm 1."""
    return x / x.pow(2).sum(1, keepdim=True).sqrt()


def pair_loss(x: Tensor, r: Tensor, same: bool, margin: float) -> Tensor:
    """The contrastive loss of one pair of rows."""
    d = (x - r).norm()
    return (d if same else (margin - d).clamp_min(0)).square() / 2


def congruence(preset: str, **options: Any) -> nn.Module:
    dims = {} if preset == "paper" else {"student_dim": 12, "teacher_dim": 20, "feature_dim": 6}
    return kd.nn.CorrelationCongruenceLoss(preset=preset, **{**dims, **options}).double()


def assert_same_loss(loss: Tensor, expected: Tensor, *sources: Tensor) -> None:
    """Values, and gradients of the sources."""
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(
        *(torch.autograd.grad(of, sources, retain_graph=True) for of in (loss, expected)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


@dataclass(frozen=True)
class Case:
    """A module of `kdkernels.nn` with its arguments at any batch size; the first is the student."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    options: Callable[[int], dict[str, Any]] = lambda B: {}


def _sides(*student: int, teacher: tuple[int, ...] | None = None) -> Any:
    def made(B: int) -> tuple[Tensor, Tensor]:
        return maps(B, *student), maps(B, *(student if teacher is None else teacher))

    return made


def _labelled(B: int) -> tuple[Tensor, Tensor]:
    return maps(B, 5), torch.arange(B) % 3


def _labelled_sides(B: int) -> tuple[Tensor, Tensor, Tensor]:
    return maps(B, 5), maps(B, 5), torch.arange(B) % 3


def _of_samples(B: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return maps(B, 4), maps(B, 5), torch.randperm(60)[:B], torch.randint(60, (B, 7))


def _mask(B: int) -> dict[str, Tensor]:
    return {"sample_mask": torch.arange(B) % 2 == 0}


def _queued(**options: Any) -> nn.Module:
    return kd.nn.InfoNCELoss(queue=kd.nn.KeyQueue(30, 4), **options)


# every class of kdkernels.nn, in each of its forms that differ in what is computed
CASES: dict[str, Case] = {
    "SimilarityPreservingLoss": Case(kd.nn.SimilarityPreservingLoss, _sides(3, 4, teacher=(20,))),
    "SimilarityPreservingLoss torchdistill": Case(
        lambda: kd.nn.SimilarityPreservingLoss(preset="torchdistill"), _sides(12, teacher=(20,))
    ),
    "IntraUtteranceSimilarityLoss": Case(
        kd.nn.IntraUtteranceSimilarityLoss, _sides(6, 3, teacher=(6, 4))
    ),
    "RKDLoss": Case(kd.nn.RKDLoss, _sides(12, teacher=(20,))),
    "RKDLoss mmrazor": Case(lambda: kd.nn.RKDLoss(preset="mmrazor"), _sides(12, teacher=(20,))),
    **{
        f"CorrelationCongruenceLoss {preset}": Case(
            partial(congruence, preset), _sides(12, teacher=(20,))
        )
        for preset in ("paper", "torchdistill", "repdistiller")
    },
    "PKTLoss": Case(kd.nn.PKTLoss, _sides(5, teacher=(6,))),
    "PKTLoss information_flow": Case(
        lambda: kd.nn.PKTLoss(preset="information_flow"), _sides(5, teacher=(6,))
    ),
    "DISTLoss": Case(kd.nn.DISTLoss, _sides(5)),
    "CorrelationDistanceLoss": Case(kd.nn.CorrelationDistanceLoss, _sides(5)),
    "ComparativeLoss": Case(kd.nn.ComparativeLoss, _sides(5)),
    "BatchHardTripletLoss": Case(kd.nn.BatchHardTripletLoss, _labelled),
    "BatchHardTripletLoss hermans": Case(lambda: kd.nn.BatchHardTripletLoss("hermans"), _labelled),
    "BatchSemiHardTripletLoss": Case(kd.nn.BatchSemiHardTripletLoss, _labelled),
    "BatchSemiHardTripletLoss each": Case(
        lambda: kd.nn.BatchSemiHardTripletLoss("sentence-transformers"), _labelled
    ),
    "BatchAllTripletLoss": Case(kd.nn.BatchAllTripletLoss, _labelled),
    "ContrastiveLoss": Case(kd.nn.ContrastiveLoss, _labelled),
    **{
        f"TripletDistillationLoss {negatives}": Case(
            partial(kd.nn.TripletDistillationLoss, negatives=negatives), _labelled_sides
        )
        for negatives in ("random", "hardest", "semihard")
    },
    "PairDistillationLoss": Case(kd.nn.PairDistillationLoss, _labelled_sides),
    "CRDLoss": Case(lambda: kd.nn.CRDLoss(4, 5, 60, dim=3, num_negatives=7), _of_samples),
    "CRDLoss draws": Case(
        lambda: kd.nn.CRDLoss(4, 5, 60, dim=3, num_negatives=7), lambda B: _of_samples(B)[:3]
    ),
    **{
        f"RelationalRepresentationLoss {preset}": Case(
            partial(kd.nn.RelationalRepresentationLoss, 4, 5, dim=3, queue_size=30, preset=preset),
            _sides(4, teacher=(5,)),
        )
        for preset in ("2025", "2024")
    },
    **{
        f"SimilarityDistillationLoss {preset}": Case(
            partial(kd.nn.SimilarityDistillationLoss, 4, queue_size=30, preset=preset), _sides(4)
        )
        for preset in ("seed", "compress", "compress_1q")
    },
    "SimilarityDistillationLoss sskd": Case(
        lambda: kd.nn.SimilarityDistillationLoss(preset="sskd"), lambda B: _sides(4)(4 * B)
    ),
    "InfoNCELoss": Case(kd.nn.InfoNCELoss, _sides(4)),
    "InfoNCELoss own_keys": Case(
        kd.nn.InfoNCELoss, lambda B: (maps(B, 4), maps(9, 4)), lambda B: {"own_keys": maps(B, 4)}
    ),
    "NTXentLoss": Case(kd.nn.NTXentLoss, _sides(4)),
    "SupConLoss": Case(kd.nn.SupConLoss, _labelled),
    "CLIPLoss": Case(kd.nn.CLIPLoss, _sides(4)),
    "InfoNCELoss queue": Case(_queued, _sides(4)),
    "InfoNCELoss learns": Case(partial(_queued, learn_temperature=True), _sides(4)),
    "LSHFeatureMimickingLoss": Case(
        lambda: kd.nn.LSHFeatureMimickingLoss(5, std=1.0, bias="zero", hash_bits=12),
        _sides(5),
        _mask,
    ),
    "LSHFeatureMimickingLoss adapter": Case(
        lambda: kd.nn.LSHFeatureMimickingLoss(
            5, form="lshl2", std=1.0, bias="zero", hash_bits=12, student_dim=4
        ),
        _sides(4, teacher=(5,)),
    ),
    "LSHFeatureMimickingLoss l2": Case(
        lambda: kd.nn.LSHFeatureMimickingLoss(5, form="l2"), _sides(5)
    ),
}


# Each class with what it needs, in all settings in which it has further numbers.
BASES: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (kd.nn.SimilarityPreservingLoss, {}),
    (kd.nn.IntraUtteranceSimilarityLoss, {}),
    (kd.nn.CorrelationCongruenceLoss, {}),
    (
        kd.nn.CorrelationCongruenceLoss,
        {"preset": "torchdistill", "student_dim": 4, "teacher_dim": 5},
    ),
    (kd.nn.RKDLoss, {}),
    (kd.nn.PKTLoss, {}),
    (kd.nn.DISTLoss, {}),
    (kd.nn.CorrelationDistanceLoss, {}),
    (kd.nn.ComparativeLoss, {}),
    (kd.nn.BatchHardTripletLoss, {}),
    (kd.nn.BatchSemiHardTripletLoss, {}),
    (kd.nn.BatchAllTripletLoss, {}),
    (kd.nn.ContrastiveLoss, {}),
    (kd.nn.TripletDistillationLoss, {}),
    (kd.nn.PairDistillationLoss, {}),
    (kd.nn.CRDLoss, {"student_dim": 4, "teacher_dim": 5, "num_samples": 9}),
    (kd.nn.RelationalRepresentationLoss, {"student_dim": 4, "teacher_dim": 5, "queue_size": 9}),
    (kd.nn.SimilarityDistillationLoss, {"student_dim": 4, "queue_size": 9, "preset": "compress"}),
    (kd.nn.SimilarityDistillationLoss, {"preset": "sskd"}),
    (kd.nn.InfoNCELoss, {"learn_temperature": True, "temperature": 0.5}),
    (kd.nn.NTXentLoss, {}),
    (kd.nn.SupConLoss, {}),
    (kd.nn.CLIPLoss, {"temperature": 0.5}),
    (kd.nn.KeyQueue, {"size": 9, "dim": 4}),
    (kd.nn.LSHFeatureMimickingLoss, {"dim": 4, "std": 1.0}),
]


def stateful() -> list[str]:
    """The cases with state that a step moves."""
    return [
        name
        for name, case in CASES.items()
        if any(isinstance(module, ProcessState) for module in case.make().modules())
    ]


def process_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of this process by its name in state_dict."""
    return {
        f"{prefix}.{name}" if prefix else name: getattr(child, name)
        for prefix, child in module.named_modules()
        if isinstance(child, ProcessState)
        for name in child.state_names
        if getattr(child, name) is not None
    }
