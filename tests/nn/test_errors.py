# SPDX-License-Identifier: Apache-2.0
"""The modules: every argument that does not fit raises, naming it."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from modules import BASES, congruence
from torch import nn

import kdkernels as kd

SP, IUSP, CC = (
    kd.nn.SimilarityPreservingLoss,
    kd.nn.IntraUtteranceSimilarityLoss,
    kd.nn.CorrelationCongruenceLoss,
)


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (
            SP,
            {"preset": "mine"},
            ValueError,
            "preset must be one of 'paper', 'torchdistill', got 'mine'",
        ),
        (
            SP,
            {"weight": -1},
            ValueError,
            "weight must be a finite number that is not negative, got -1",
        ),
        (
            SP,
            {"weight": math.nan},
            ValueError,
            "weight must be a finite number that is not negative, got nan",
        ),
        (SP, {"weight": "3000"}, TypeError, "weight must be a number, got str"),
        (SP, {"algorithm": "fast"}, ValueError, "algorithm must be one of"),
        (
            SP,
            {"preset": "torchdistill", "algorithm": "factored"},
            ValueError,
            "algorithm must be 'tiled' or 'auto'",
        ),
        (SP, {"backend": "gpu"}, ValueError, "backend must be one of"),
        (IUSP, {"algorithm": "fast"}, ValueError, "algorithm must be one of"),
        (IUSP, {"weight": math.inf}, ValueError, "weight must be a finite number"),
        (
            CC,
            {"preset": "tf"},
            ValueError,
            "preset must be one of 'paper', 'torchdistill', 'repdistiller', got 'tf'",
        ),
        (CC, {"student_dim": 4}, ValueError, "student_dim must be left out with preset='paper'"),
        (CC, {"feature_dim": 4}, ValueError, "feature_dim must be left out with preset='paper'"),
        (
            CC,
            {"preset": "torchdistill", "teacher_dim": 4},
            ValueError,
            "student_dim must be given with preset=",
        ),
        (
            CC,
            {"preset": "repdistiller", "student_dim": 4},
            ValueError,
            "teacher_dim must be given with preset=",
        ),
        (
            CC,
            {"preset": "repdistiller", "gamma": 0.4},
            ValueError,
            "gamma must be left out with preset='repdistiller'",
        ),
        (
            CC,
            {"preset": "torchdistill", "student_dim": 0, "teacher_dim": 4},
            ValueError,
            "student_dim must be from 1 to",
        ),
        (CC, {"gamma": -1.0}, ValueError, "gamma must be a positive finite number, got -1.0"),
        (CC, {"order": 9}, ValueError, "order must be from 1 to 8, got 9"),
        (
            kd.nn.PKTLoss,
            {"preset": "paper"},
            ValueError,
            "preset must be one of 'repdistiller', 'infor",
        ),
        (kd.nn.PKTLoss, {"weight": -1}, ValueError, "weight must be a finite number"),
        (kd.nn.PKTLoss, {"backend": "gpu"}, ValueError, "backend must be one of"),
        (
            kd.nn.DISTLoss,
            {"preset": "coco"},
            ValueError,
            "preset must be one of 'imagenet', 'cifar'",
        ),
        (kd.nn.DISTLoss, {"beta": -1.0}, ValueError, "beta must be a finite number"),
        (kd.nn.DISTLoss, {"temperature": 0.0}, ValueError, "temperature must be a positive finite"),
        (
            kd.nn.CorrelationDistanceLoss,
            {"preset": "dist"},
            ValueError,
            "preset must be one of 'r2kd', 'cmkd'",
        ),
        (
            kd.nn.CorrelationDistanceLoss,
            {"rank": "exact"},
            ValueError,
            "rank must be one of 'none', 'hard', 'soft'",
        ),
        (
            kd.nn.CorrelationDistanceLoss,
            {"rank_weight": "1"},
            TypeError,
            "rank_weight must be a number, got str",
        ),
        (
            kd.nn.CorrelationDistanceLoss,
            {"regularization_strength": 0},
            ValueError,
            "regularization_strength must",
        ),
        (
            kd.nn.ComparativeLoss,
            {"weight": None},
            TypeError,
            "weight must be a number, got NoneType",
        ),
    ],
)
def test_bad_options(
    make: type[nn.Module], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        make(**options)
    assert message in str(raised.value)


x, y = torch.ones(6, 12), torch.ones(6, 20)


@pytest.mark.parametrize(
    ("module", "student", "teacher", "error", "message"),
    [
        (SP(), x, y[:5], ValueError, "teacher must have 6 rows like student, got 5"),
        (SP(), x[0], y, ValueError, "student must have at least 2 dimensions, got shape [12]"),
        (SP(), [x, x], [y], ValueError, "teacher must have 2 layers like student, got 1"),
        (SP(), [], [], ValueError, "student must have at least 1 layer, got none"),
        (
            SP(),
            [x],
            y,
            TypeError,
            "teacher must be a list or tuple of layers like student, got Tensor",
        ),
        (
            SP(),
            3.0,
            y,
            TypeError,
            "student must be a torch.Tensor, or a list, tuple or dict of them, got float",
        ),
        (SP(), [x, x], [y, None], TypeError, "teacher[1] must be a torch.Tensor, got NoneType"),
        (
            SP(),
            [x, x],
            [y, y[:5]],
            ValueError,
            "teacher[1] must have 6 rows like student[1], got 5",
        ),
        (
            SP(),
            [x, x.long()],
            [y, y],
            TypeError,
            "student[1] must be float16, bfloat16, float32 or float64",
        ),
        (
            IUSP(),
            x,
            y,
            ValueError,
            "student must be [utterances, frames, features], got shape [6, 12]",
        ),
        (
            IUSP(),
            x[None],
            y[None, :5],
            ValueError,
            "teacher must have 6 frames like student, got 5",
        ),
        (
            IUSP(),
            x.expand(2, 6, 12),
            y[None],
            ValueError,
            "teacher must have 2 utterances like student, got 1",
        ),
        (CC(), x, [y], TypeError, "teacher must be a torch.Tensor like student, got list"),
        (
            congruence("torchdistill"),
            [x, x],
            [y, y],
            ValueError,
            "student must be one layer with preset='torchdistill'",
        ),
        (SP(), x, None, TypeError, "teacher must be a torch.Tensor, or a list, tuple or dict"),
        (SP(), {"a": x}, [y], TypeError, "teacher must be a dict of layers like student, got list"),
        (
            SP(),
            {"a": x, "b": x},
            {"a": y},
            ValueError,
            "teacher must have the layers ['a', 'b'] like student, got ['a']",
        ),
        (SP(), {"a": x}, {"a": None}, TypeError, "teacher['a'] must be a torch.Tensor, got None"),
        (
            kd.nn.DISTLoss(),
            x[None],
            x[None],
            ValueError,
            "student must be [B, C] or [B, C, H, W], got shape [1, 6, 12]",
        ),
        (
            kd.nn.DISTLoss(),
            [x, x],
            [x, x[:5]],
            ValueError,
            "teacher[1] must have shape [6, 12] like student[1], got [5, 12]",
        ),
        (CC(), x, y[:5], ValueError, "teacher must have 6 rows like student, got 5"),
        (
            congruence("torchdistill"),
            y.double(),
            y.double(),
            ValueError,
            "student must have 12 features per sample",
        ),
    ],
)
def test_bad_features(
    module: nn.Module, student: Any, teacher: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as raised:
        module(student, teacher)
    assert message in str(raised.value)


def numbers() -> list[Any]:
    """(class, options, name of a number, its kind), by the annotations of constructors."""
    found = []
    for make, base in BASES:
        for name, parameter in inspect.signature(make).parameters.items():
            kind = str(parameter.annotation).removesuffix(" | None")
            refused = "preset" in base and name in {
                "sskd": {"student_dim", "teacher_dim", "queue_size"},
                "compress": {"views", "share_of_wrong"},
            }.get(base["preset"], set())
            alone = make is CC and not base and name.endswith("_dim")
            if kind in ("int", "float") and not refused and not alone:
                found.append(pytest.param(make, base, name, kind, id=f"{make.__name__}-{name}"))
    return found


def test_every_module_has_its_numbers_tried() -> None:
    classes = {getattr(kd.nn, name) for name in kd.nn.__all__}
    modules = {found for found in classes if isinstance(found, type)} - {kd.nn.CodeCache}
    assert {make for make, _ in BASES} == modules


def described(module: nn.Module) -> tuple[str, dict[str, list[int]]]:
    return repr(module), {name: list(x.shape) for name, x in module.state_dict().items()}


@pytest.mark.parametrize(("make", "base", "name", "kind"), numbers())
def test_numbers_of_any_kind_are_taken(
    make: type[nn.Module], base: dict[str, Any], name: str, kind: str
) -> None:
    value = 3 if kind == "int" else 0.5
    wanted = described(make(**{**base, name: value}))
    kinds: tuple[Any, ...] = (np.int64, np.int32, np.array, torch.tensor)
    if kind == "float":
        kinds = (np.float32, np.float64, np.array, torch.tensor)
    for convert in kinds:
        given = convert(value)
        module = make(**{**base, name: given})
        assert described(module) == wanted
        assert all(value is not given for value in vars(module).values())
    bad: list[Any] = [True, np.True_, "3", torch.ones(2), torch.tensor(True)]
    if kind == "float":
        bad.append(torch.tensor(0.5, requires_grad=True))
    for given in bad:
        with pytest.raises((TypeError, ValueError), match=rf"^{name} must "):
            make(**{**base, name: given})
