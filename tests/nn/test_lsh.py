# SPDX-License-Identifier: Apache-2.0
"""LSHFeatureMimickingLoss: its forms, the bias fitted to a data set, and its state."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from values import BIAS, STUDENT, TEACHER, WEIGHT

import kdkernels as kd
from kdkernels.nn import _lsh_bias
from kdkernels.testing import numerics

MASK = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)


def module(form: str = "lshl2", **options: Any) -> nn.Module:
    """With the directions and the bias of the published value."""
    defaults = {"weight": 1.0, "hash_bits": 32, "std": 1.0, "bias": "zero"}
    if form == "l2":
        defaults = {"weight": 1.0}
    made = kd.nn.LSHFeatureMimickingLoss(16, form=form, **{**defaults, **options}).double()
    if form != "l2":
        made.hash_weight.copy_(WEIGHT)
        made.hash_bias.copy_(BIAS)
    return made


def parts(student: Tensor = STUDENT) -> tuple[Tensor, Tensor]:
    """(squared difference, cross-entropy) per sample."""
    y = (F.linear(TEACHER, WEIGHT, BIAS) > 0).double()
    entropy = F.binary_cross_entropy_with_logits(
        F.linear(student, WEIGHT, BIAS), y, reduction="none"
    )
    return (student - TEACHER).square().mean(1), entropy.mean(1)


def test_published_value_and_gradient() -> None:
    student = STUDENT.clone().requires_grad_()
    loss = module()(student, TEACHER)
    loss.backward()
    assert abs(loss.item() - 1.9420417119) < numerics.FP64_RELATIVE
    assert abs(student.grad.norm().item() - 0.456880893269) < numerics.FP64_RELATIVE


@pytest.mark.parametrize("form", ["lsh", "lshl2", "l2", "lsh_s", "lshl2_s"])
def test_forms(form: str) -> None:
    student = STUDENT.clone().requires_grad_()
    squares, entropies = parts(student)
    each = squares * ("l2" in form) + entropies * ("lsh" in form)
    options = {"sample_mask": MASK} if form.endswith("_s") else {}
    expected = 3 * (each[MASK] if options else each).mean()
    loss = module(form, weight=3.0)(student, TEACHER, **options)
    torch.testing.assert_close(loss, expected)
    for got, wanted in zip(
        torch.autograd.grad(loss, student), torch.autograd.grad(expected, student), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("form", ["lsh_s", "lshl2_s"])
def test_a_batch_in_which_no_sample_counts(form: str) -> None:
    student = STUDENT.clone().requires_grad_()
    loss = module(form)(student, TEACHER, sample_mask=torch.zeros(8, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0
    assert student.grad.eq(0).all()


def test_samples_that_do_not_count_may_hold_anything() -> None:
    grads = []
    for spoilt in (STUDENT, STUDENT.where(MASK[:, None], torch.nan)):
        student = spoilt.clone().requires_grad_()
        module("lshl2_s")(student, TEACHER, sample_mask=MASK).backward()
        grads.append(student.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("form", ["lsh", "lshl2"])
def test_codes_stand_for_the_teacher_s_bits(form: str) -> None:
    made = module(form)
    codes = made.encode(TEACHER)
    assert torch.equal(codes, kd.lsh_encode(TEACHER, WEIGHT, BIAS))
    teacher = None if form == "lsh" else TEACHER
    assert torch.equal(made(STUDENT, teacher, codes=codes), made(STUDENT, TEACHER))


def test_maps_are_flattened_and_an_adapter_is_trained() -> None:
    made = module(student_dim=12)
    student = torch.linspace(-1, 1, 96, dtype=torch.float64).reshape(8, 3, 4)
    teacher = TEACHER.reshape(8, 16, 1, 1)
    loss = made(student, teacher)
    loss.backward()
    squares, entropies = parts(F.linear(student.flatten(1), *made.adapter.parameters()))
    torch.testing.assert_close(loss, (squares + entropies).mean())
    assert set(dict(made.named_parameters())) == {"adapter.weight", "adapter.bias"}
    assert made.adapter.weight.grad.ne(0).any()
    assert made.adapter.bias.grad.ne(0).any()


def test_directions_are_normal_and_reproducible() -> None:
    def made(seed: int, **options: Any) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        return kd.nn.LSHFeatureMimickingLoss(64, generator=generator, **options)

    weight = made(1, std=0.06).hash_weight
    assert weight.shape == (2048, 64)
    n = weight.numel()  # within six standard deviations of the two estimates
    assert abs(weight.std().item() / 0.06 - 1) < 6 / (2 * n) ** 0.5
    assert abs(weight.mean().item()) < 6 * 0.06 / n**0.5
    assert torch.equal(weight, made(1, std=0.06).hash_weight)
    assert not torch.equal(weight, made(2, std=0.06).hash_weight)
    classifier = torch.randn(10, 64) * 0.1
    expected = made(1, std=1.0).hash_weight * classifier.std(correction=1)
    torch.testing.assert_close(made(1, classifier_weight=classifier).hash_weight, expected)


def features(n: int, D: int = 16) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(n)) + 0.3


def batches(x: Tensor, size: int = 7) -> Iterator[Tensor]:
    """Once only, as a generator over a loader."""
    yield from x.split(size)


@pytest.mark.parametrize("n", [1, 2, 30, 101])
def test_median_is_the_lower_median_of_each_projection(n: int) -> None:
    made = kd.nn.LSHFeatureMimickingLoss(16, std=0.5, hash_bits=24)
    data = features(n)
    made.fit_bias(data)
    expected = -F.linear(data, made.hash_weight).median(0).values
    torch.testing.assert_close(made.hash_bias, expected)
    bits = _unpacked(made.encode(data), 24)
    assert (bits.sum(0) - n // 2).abs().max() <= 1  # the median itself may fall on either side


def _unpacked(codes: Tensor, N: int) -> Tensor:
    return (codes.unsqueeze(-1) >> torch.arange(8) & 1).flatten(1)[:, :N]


@pytest.mark.parametrize("bias", ["median", "mean"])
def test_batches_give_the_bias_of_the_whole(bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lsh_bias, "ROWS", 13)
    made = kd.nn.LSHFeatureMimickingLoss(16, std=0.5, hash_bits=24, bias=bias)
    data = features(101)
    made.fit_bias(data)
    whole = made.hash_bias
    made.fit_bias(batches(data))
    torch.testing.assert_close(made.hash_bias, whole)
    centre = F.linear(data, made.hash_weight)
    expected = centre.mean(0) if bias == "mean" else centre.median(0).values
    torch.testing.assert_close(whole, -expected)


def test_blocks_of_directions_give_the_same_median() -> None:
    weight, data = torch.randn(50, 16), features(333)
    whole = _lsh_bias.median_projection(data, weight, 1 << 30)
    for memory in (1, 333 * 16 * 7):
        torch.testing.assert_close(_lsh_bias.median_projection(data, weight, memory), whole)


def test_memory_of_the_median_is_bounded() -> None:
    """Measured on the blocks: projections of all directions would take 60 times as much."""
    sizes = []

    class Recorded(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = super().__torch_function__(func, types, args, kwargs or {})
            if isinstance(result, Tensor):
                sizes.append(result.numel())
            return result

    weight, data = torch.randn(600, 4), features(1000, 4)
    memory = 1000 * 16 * 10  # for ten directions
    _lsh_bias.median_projection(data, weight.as_subclass(Recorded), memory)
    assert max(sizes) == 1000 * 10


@pytest.mark.parametrize("form", ["lshl2", "lshl2_s", "l2"])
def test_state_survives_a_round_trip(form: str) -> None:
    def made() -> nn.Module:
        hashed = {} if form == "l2" else {"std": 0.5, "hash_bits": 24}
        return kd.nn.LSHFeatureMimickingLoss(16, form=form, student_dim=5, **hashed)

    first, second = made(), made()
    if form != "l2":
        first.fit_bias(features(50))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    options = {"sample_mask": MASK} if form.endswith("_s") else {}
    student, teacher = features(8, 5), features(8)
    assert torch.equal(first(student, teacher, **options), second(student, teacher, **options))


def test_an_unfitted_bias_is_not_used() -> None:
    made = kd.nn.LSHFeatureMimickingLoss(16, form="lsh", std=0.5, hash_bits=24)
    for call in (lambda: made(features(8), features(8)), lambda: made.encode(features(8))):
        with pytest.raises(RuntimeError, match=r"fit_bias\(features\) must be called"):
            call()


def test_compiles_without_a_graph_break() -> None:
    made = module("lshl2_s")
    results = []
    for call in (made, torch.compile(made, fullgraph=True, backend="aot_eager")):
        student = STUDENT.clone().requires_grad_()
        loss = call(student, TEACHER, sample_mask=MASK)
        loss.backward()
        results.append((loss.detach(), student.grad))
    torch.testing.assert_close(results[1], results[0])


def test_half_precision_under_autocast() -> None:
    made = module().float()
    student = STUDENT.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = made(student, TEACHER.float())
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad.isfinite().all()


def test_not_a_number_stays_one() -> None:
    student = STUDENT.clone()
    student[1] = torch.nan
    assert module()(student, TEACHER).isnan()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0, "std": 1.0}, ValueError, "dim must be from 1 to"),
        ({"std": 1.0, "form": "l1"}, ValueError, "form must be one of"),
        ({"std": 1.0, "bias": "0"}, ValueError, "bias must be one of"),
        ({"std": 1.0, "weight": -1.0}, ValueError, "weight must be a finite number that is not"),
        ({}, ValueError, "std or classifier_weight must be given, one of the two, got neither"),
        (
            {"std": 1.0, "classifier_weight": torch.ones(2, 2)},
            ValueError,
            "one of the two, got both",
        ),
        ({"std": 0.0}, ValueError, "std must be a positive finite number"),
        (
            {"classifier_weight": torch.ones(2, 2)},
            ValueError,
            "std of classifier_weight must be a positive finite number",
        ),
        ({"std": 1.0, "hash_bits": 0}, ValueError, "hash_bits must be from 1 to"),
        ({"form": "l2", "std": 1.0}, ValueError, "std must be left out with form='l2'"),
        ({"std": 1.0, "student_dim": 0}, ValueError, "student_dim must be from 1 to"),
        ({"std": 1.0, "backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        kd.nn.LSHFeatureMimickingLoss(**{"dim": 16, **options})


CODES = kd.lsh_encode(TEACHER, WEIGHT, BIAS)


@pytest.mark.parametrize(
    ("form", "args", "options", "message"),
    [
        ("lshl2", (STUDENT,), {}, "teacher must be given with form='lshl2'"),
        ("lsh", (STUDENT,), {}, "teacher or codes must be given with form='lsh'"),
        ("lshl2", (STUDENT,), {"codes": CODES}, "teacher must be given with form='lshl2'"),
        ("l2", (STUDENT, TEACHER), {"codes": CODES}, "codes must be left out with form='l2'"),
        ("lsh", (STUDENT, TEACHER), {"sample_mask": MASK}, "sample_mask must be left out"),
        ("lsh_s", (STUDENT, TEACHER), {}, "sample_mask must be given with form='lsh_s'"),
        ("lshl2_s", (STUDENT, TEACHER), {"sample_mask": MASK[:7]}, "sample_mask must have shape"),
        ("lsh", (STUDENT[:, :9], TEACHER), {}, "student must have 16 features per sample, got 9"),
        ("lshl2", (STUDENT, TEACHER[:, :9]), {}, "teacher must have 16 features per sample"),
        ("lshl2", (STUDENT, TEACHER[:7]), {}, "teacher must have 8 rows like student, got 7"),
        ("lsh", (STUDENT,), {"codes": CODES[:, :1]}, "codes must have shape [8, 4]"),
    ],
)
def test_bad_calls(
    form: str, args: tuple[Tensor, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        module(form)(*args, **options)


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        ({"bias": "zero", "std": 1.0}, features(9), "bias must be 'median' or 'mean'"),
        ({"form": "l2"}, features(9), "form not 'l2' to be fitted"),
        ({"std": 1.0}, features(9, 5), "features must have 16 columns like hash_weight, got 5"),
        ({"std": 1.0}, features(0), "features must have at least 1 row"),
        ({"std": 1.0}, [], "features must have at least 1 row"),
        ({"std": 1.0, "bias": "mean"}, [], "features must have at least 1 row"),
        ({"std": 1.0}, features(9) * torch.nan, "features must be finite"),
    ],
)
def test_bad_data_to_fit(options: dict[str, Any], data: Any, message: str) -> None:
    made = kd.nn.LSHFeatureMimickingLoss(
        16, **{"hash_bits": 8, **options} if options.get("form") != "l2" else options
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        made.fit_bias(data)
