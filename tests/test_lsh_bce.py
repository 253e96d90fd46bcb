# SPDX-License-Identifier: Apache-2.0
"""What is special about lsh_bce: published values, the order of the bits, hyperplanes, masks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, Calls, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from values import BIAS, STUDENT, TEACHER, WEIGHT, assert_same

import kdkernels as kd
from kdkernels import _dispatch
from kdkernels.reference import _lsh_bce as reference
from kdkernels.testing import numerics, peak
from kdkernels.testing.opinfo import BenchShape, Sample, opinfos, randn

(INFO,) = (info for info in opinfos() if info.name == "lsh_bce")
CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


CODES = reference.lsh_encode(TEACHER, WEIGHT, BIAS)


def each_backend(
    *dtypes: torch.dtype, backends: tuple[str, ...] = _dispatch.BACKENDS
) -> pytest.MarkDecorator:
    """Parametrise a test by a case on the matrices above, moved to a device and a dtype."""
    params = []
    for backend in backends:
        for device in DEVICES:
            for dtype in dtypes or (torch.float64,):
                args = [x.to(device, dtype) for x in (STUDENT, WEIGHT, BIAS)]
                args.insert(1, CODES.to(device))
                sample = Sample("here", tuple(args))
                params.append(
                    pytest.param(
                        Case(INFO, backend, device, dtype, sample),
                        id=f"{backend}-{device.type}-{str(dtype)[6:]}",
                        marks=[pytest.mark.gpu] if device.type == "cuda" else [],
                    )
                )
    return pytest.mark.parametrize("case", params)


def value_and_gradients(case: Case, *args: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Loss, and its gradients by the floating-point arguments."""
    args = tuple(
        x.detach().requires_grad_() if x.is_floating_point() else x
        for x in (args or case.sample.args)
    )
    value = case.call(*args, **options)
    sources = [x for x in args if x.requires_grad]
    return value.detach(), *torch.autograd.grad(value.sum(), sources)


def encode(case: Case, *args: Tensor) -> Tensor:
    return kd.lsh_encode(*args, backend=case.backend)


# The value is that of the authors' public implementation, evaluated in fp64.
@each_backend()
def test_value_of_the_published_loss(case: Case) -> None:
    student, codes, weight, bias = case.sample.args
    teacher = TEACHER.to(case.device)
    assert torch.equal(encode(case, teacher, weight, bias), codes)
    student = student.detach().requires_grad_()
    loss = case.call(student, codes, weight, bias) + (student - teacher).square().mean()
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(loss.item() - 1.9420417119) < numerics.FP64_RELATIVE
    assert abs(gradient.norm().item() - 0.456880893269) < numerics.FP64_RELATIVE


@each_backend(*DTYPES)
def test_bit_n_is_bit_n_mod_8_of_byte_n_div_8(case: Case) -> None:
    """Row i of the features lies on the positive side of direction i alone."""
    N = 21
    identity = torch.eye(N, device=case.device, dtype=case.dtype)
    expected = torch.zeros(N, 3, dtype=torch.uint8)
    for n in range(N):
        expected[n, n // 8] = 1 << n % 8
    codes = encode(case, 2 * identity - 1, identity)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.cpu(), expected)
    everything = encode(case, identity[:1] * 0, identity, torch.ones_like(identity[0]))
    assert everything.tolist() == [[255, 255, 0b11111]]  # what lies beyond N is 0


@each_backend(*DTYPES)
def test_a_point_on_a_hyperplane_gets_0(case: Case) -> None:
    """Small integers, so every product and sum is exact; sums of all signs, many of them 0."""
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        drawn = torch.randint(-2, 3, shape, generator=generator)
        return drawn.to(case.device, case.dtype)

    features, weight, bias = integers(37, 5), integers(45, 5), integers(45)
    exact = features.double() @ weight.double().T + bias.double()
    assert (exact == 0).any(), "no point lies on a hyperplane"
    assert torch.equal(encode(case, features, weight, bias), reference.pack(exact > 0))
    least = torch.finfo(case.dtype).smallest_normal
    ones = torch.ones(1, 1, device=case.device, dtype=case.dtype)
    assert encode(case, torch.stack([least * ones[0], -least * ones[0]]), ones).tolist() == [
        [1],
        [0],
    ]


@each_backend(*DTYPES)
def test_what_is_not_a_number_gets_0(case: Case) -> None:
    features = torch.tensor([[torch.nan], [torch.inf], [-torch.inf]])
    features = features.to(case.device, case.dtype)
    assert encode(case, features, features.new_ones(1, 1)).tolist() == [[0], [1], [0]]


@each_backend(torch.float32, torch.float64, torch.bfloat16)
@settings(deadline=None, max_examples=12, database=None, derandomize=True)
@given(B=st.integers(0, 20), D=st.integers(0, 24), N=st.integers(0, 50), bias=st.booleans())
def test_bits_are_those_of_exact_projections(
    case: Case, B: int, D: int, N: int, bias: bool
) -> None:
    features, weight, b = (
        randn(*shape, seed=seed, device=case.device, dtype=case.dtype)
        for seed, shape in enumerate(((B, D), (N, D), (N,)))
    )
    codes = encode(case, features, weight, b if bias else None)
    assert codes.shape == (B, (N + 7) // 8)
    exact = F.linear(features.double(), weight.double(), b.double() if bias else None)
    # sums of D + 1 terms in the accumulation dtype, whatever their order
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    sizes = F.linear(features.double().abs(), weight.double().abs(), b.double().abs())
    clear = exact.abs() > (D + 1) * torch.finfo(acc).eps * sizes
    bits = reference.unpack(codes, N)
    assert torch.equal(bits[clear], exact[clear] > 0)
    assert torch.equal(reference.pack(bits), codes), "bits beyond N"


@each_backend()
def test_bits_beyond_the_last_direction_are_ignored(case: Case) -> None:
    student, codes, weight, bias = case.sample.args
    weight, bias = weight[:27], bias[:27]
    clean = reference.pack(reference.unpack(codes, 27))
    dirty = clean.clone()
    dirty[:, -1] |= 0b11111000
    assert not torch.equal(clean, dirty)
    results = [value_and_gradients(case, student, c, weight, bias) for c in (clean, dirty)]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_backend()
def test_a_mask_is_a_smaller_batch(case: Case, reduction: str) -> None:
    student, codes, weight, bias = case.sample.args
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool, device=case.device)
    masked = value_and_gradients(case, sample_mask=mask, reduction=reduction)
    fewer = value_and_gradients(case, student[mask], codes[mask], weight, bias, reduction=reduction)
    torch.testing.assert_close(masked[0] if reduction != "none" else masked[0][mask], fewer[0])
    torch.testing.assert_close(masked[1][mask], fewer[1])
    for got, wanted in zip(masked[2:], fewer[2:], strict=True):
        torch.testing.assert_close(got, wanted)
    assert masked[1][~mask].eq(0).all()
    if reduction == "none":
        assert masked[0][~mask].eq(0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_backend(torch.float32)
def test_no_sample_gives_zero_with_a_gradient_of_zero(case: Case, reduction: str) -> None:
    mask = torch.zeros(8, dtype=torch.bool, device=case.device)
    for result in value_and_gradients(case, sample_mask=mask, reduction=reduction):
        assert result.eq(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_backend(torch.float32)
def test_samples_that_do_not_count_may_hold_anything(case: Case, bad: float) -> None:
    student, codes, weight, bias = case.sample.args
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool, device=case.device)
    spoilt = student.where(mask[:, None], bad)
    results = [
        value_and_gradients(case, s, codes, weight, bias, sample_mask=mask)
        for s in (student, spoilt)
    ]
    for clean, got in zip(*results, strict=True):
        assert torch.equal(clean, got)


@each_backend()
def test_reductions_agree(case: Case) -> None:
    mean, total, each = (
        value_and_gradients(case, reduction=reduction) for reduction in ("mean", "sum", "none")
    )
    assert_same(each[0].mean(), mean[0])
    assert_same(total[0] / CODES.numel() / 8, mean[0])
    for m, t, e in zip(mean[1:], total[1:], each[1:], strict=True):
        torch.testing.assert_close(e / len(STUDENT), m)
        torch.testing.assert_close(t / CODES.numel() / 8, m)


@each_backend(torch.float32)
def test_the_forward_computes_a_gradient_only_for_a_student_that_asks(case: Case) -> None:
    student, codes, weight, bias = case.sample.args

    def sizes(*needs: bool) -> tuple[int, ...]:
        """Elements of dloss in the forward, and of the results of the backward."""
        args = [
            x.detach().requires_grad_(n)
            for x, n in zip((student, weight, bias), needs, strict=True)
        ]
        with Calls() as calls:
            value = case.call(args[0], codes, *args[1:])
            if value.requires_grad:
                value.backward()
        return tuple(result.numel() for _, _, results in calls.made for result in results[-3:])[1:]

    assert sizes(False, False, False) == (0,)
    assert sizes(True, False, False) == (student.numel(), student.numel(), 0, 0)
    assert sizes(False, True, False) == (0, 0, weight.numel(), 0)
    assert sizes(False, False, True) == (0, 0, 0, bias.numel())
    leaf = student.detach().requires_grad_()
    with torch.no_grad(), Calls() as calls:
        case.call(leaf, codes, weight, bias)
    assert calls.made[0][2][1].numel() == 0


@pytest.mark.parametrize("bit", [0, 1])
@each_backend(torch.float32, backends=("cpu", "triton"))
def test_small_losses_keep_their_digits(case: Case, bit: int) -> None:
    """Cross-entropies and derivatives far on the right side, where z y and the logarithm, or the
    sigmoid and y, would cancel."""
    z = torch.tensor([8.0, 15.0, 30.0, 60.0], device=case.device)
    codes = torch.full((4, 1), bit, dtype=torch.uint8, device=case.device)
    args = ((z if bit else -z)[:, None], codes, torch.ones(1, 1, device=case.device))
    value, gradient, _ = value_and_gradients(case, *args, reduction="none")
    e = torch.exp(-z.double())
    eps = torch.finfo(torch.float32).eps
    loss, slope = torch.log1p(e), e / (1 + e) * (-1 if bit else 1)
    assert ((value.double() - loss).abs() <= 8 * eps * loss).all()
    assert ((gradient[:, 0].double() - slope).abs() <= 8 * eps * slope.abs()).all()


@each_backend(torch.float32, backends=("cpu",))
def test_series_are_within_their_bounds(case: Case) -> None:
    """With one feature and a direction of 1, z is the student itself."""
    z = torch.linspace(-80, 80, 100_001, device=case.device)
    roundoff = torch.finfo(torch.float32).eps / 2
    for bit in (0, 1):
        codes = torch.full((len(z), 1), bit, dtype=torch.uint8, device=case.device)
        args = (z[:, None], codes, torch.ones(1, 1, device=case.device))
        value, gradient, _ = value_and_gradients(case, *args, reduction="none")
        wrong = (1 - 2 * bit) * z.double()  # positive where sign and bit disagree
        e = torch.exp(-wrong.abs())
        loss = wrong.clamp_min(0) + torch.log1p(e)
        slope = torch.where(wrong >= 0, 1 / (1 + e), e / (1 + e)) * (1 - 2 * bit)
        assert ((value.double() - loss).abs() <= 6 * roundoff * loss).all()
        assert ((gradient[:, 0].double() - slope).abs() <= 4 * roundoff * slope.abs()).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("B", "N"), [(700, 1100), (3, 9001), (5000, 9)])
@each_backend(torch.float32, torch.float64, backends=("cpu",))
def test_several_blocks_of_rows_and_directions(case: Case, B: int, N: int, masked: bool) -> None:
    """More than one tile along each axis, and axes that are cut into pieces for threads to
    share."""
    student, weight, bias = (
        randn(*shape, seed=seed, device=case.device, dtype=case.dtype)
        for seed, shape in enumerate(((B, 3), (N, 3), (N,)))
    )
    codes = reference.lsh_encode(-student.double(), weight.double())
    assert torch.equal(encode(case, -student.double(), weight.double()), codes)
    options = {"sample_mask": torch.arange(B, device=case.device) % 3 != 1} if masked else {}
    sample = Sample("blocks", (student, codes, weight, bias), {**options, "reduction": "none"})
    errors = numerics.check_sample(INFO, sample, case.dtype, case.backend)
    assert all(error.ok for error in errors), [error.detail for error in errors]


@each_backend(torch.float32, torch.bfloat16)
def test_agreement_without_limit_is_a_loss_of_zero(case: Case) -> None:
    student, _, weight, bias = case.sample.args
    student = 1e4 * student
    codes = encode(case, student, weight, bias)
    value, gradient, *_ = value_and_gradients(case, student, codes, weight, bias)
    assert value.item() < torch.finfo(torch.float32).eps ** 0.5
    assert gradient.isfinite().all()


def test_codes_of_a_compiled_function_are_those_of_eager_mode() -> None:
    features, weight = (
        randn(9, 5, seed=1, device=CPU, dtype=torch.float32),
        WEIGHT[:, :5].float(),
    )
    compiled = torch.compile(kd.lsh_encode, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, weight), kd.lsh_encode(features, weight))


def test_codes_need_no_gradient() -> None:
    features = STUDENT.clone().requires_grad_()
    assert not kd.lsh_encode(features, WEIGHT.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("autocast", [False, True])
def test_encoding_takes_the_widest_dtype(autocast: bool) -> None:
    narrow = STUDENT.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        codes = kd.lsh_encode(narrow, WEIGHT.float(), BIAS.double())
    assert torch.equal(codes, kd.lsh_encode(narrow.double(), WEIGHT.float().double(), BIAS))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((STUDENT[0], WEIGHT), ValueError, "features must have at least 2 dimensions"),
        (
            (STUDENT, WEIGHT[:, :3]),
            ValueError,
            "weight must have 16 columns like features, got 3",
        ),
        (
            (STUDENT.long(), WEIGHT),
            TypeError,
            "features must be float16, bfloat16, float32 or",
        ),
        (
            (STUDENT, WEIGHT, BIAS[:3]),
            ValueError,
            "bias must have shape [32] like the rows of",
        ),
        ((STUDENT, WEIGHT.to("meta")), ValueError, "weight must be on cpu like features"),
    ],
)
def test_encoding_refuses_what_does_not_fit(
    args: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with Calls() as calls, pytest.raises(error, match=re.escape(message)):
        kd.lsh_encode(*args)
    assert calls.made == []


def test_explain_says_where_the_gradient_is_computed() -> None:
    student = STUDENT.clone().requires_grad_()
    answer = kd.explain("lsh_bce", student, CODES, WEIGHT, BIAS)
    assert "forward sweep" in answer.choices["gradient"]
    assert kd.explain("lsh_bce", STUDENT, CODES, WEIGHT).choices["gradient"].startswith("none")
    assert kd.explain("lsh_encode", STUDENT, WEIGHT, backend="reference").backend == "reference"


def test_no_matrix_of_projections_is_allocated() -> None:
    """Peak resident memory of a process that makes the call: native scratch goes around torch's
    allocator."""
    B, D, N = 2048, 16, 16384
    reason = peak.why_not(CPU)
    assert reason is None, reason
    shape = BenchShape("memory", {"B": B, "D": D, "N": N}, "")
    extra = peak.extra_mib("lsh_bce", shape, torch.float32, "fwd_bwd", "cpu", CPU)
    projections = B * N * 4 / peak.MIB
    assert extra < projections / 8, f"{extra} MiB, the projections have {projections}"
