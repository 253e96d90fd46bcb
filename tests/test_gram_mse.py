# SPDX-License-Identifier: Apache-2.0
"""What is special about gram_mse: published values, the choice of algorithm, and the symmetries of
the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, Case, assert_within_budget
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from values import STUDENT, assert_same
from values import WIDE_TEACHER as TEACHER

import kdkernels as kd
from kdkernels import _dispatch
from kdkernels.ops.gram_mse import choose_algorithm
from kdkernels.testing import numerics, peak
from kdkernels.testing.fp32 import fp32_products
from kdkernels.testing.opinfo import BenchShape, Sample, opinfos, randn

(INFO,) = (info for info in opinfos() if info.name == "gram_mse")
CPU = torch.device("cpu")
ALGORITHMS = ("tiled", "factored")


def case(
    backend: str,
    *args: Tensor,
    dtype: torch.dtype = torch.float64,
    device: torch.device = CPU,
    **kw: Any,
) -> Case:
    moved = tuple(arg.to(device, dtype) for arg in args)
    name = "-".join(["here", *(str(value) for value in kw.values())])
    return Case(INFO, backend, device, dtype, Sample(name, moved, kw))


def each_backend(
    *args: Tensor,
    dtypes: tuple[torch.dtype, ...] = (torch.float64,),
    algorithms: tuple[str, ...] = (),
    **kwargs: Any,
) -> pytest.MarkDecorator:
    args = args or (STUDENT, TEACHER)
    options = [{"algorithm": algorithm} for algorithm in algorithms] or [{}]
    params = [
        pytest.param(
            case(backend, *args, dtype=dtype, device=device, **kwargs, **option),
            id="-".join([backend, device.type, str(dtype)[6:], *option.values()]),
            marks=[pytest.mark.gpu] if device.type == "cuda" else [],
        )
        for backend in _dispatch.BACKENDS
        for device in DEVICES
        for dtype in dtypes
        for option in options
    ]
    return pytest.mark.parametrize("case", params)


def value_and_gradient(
    case: Case, student: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    student = (case.sample.args[0] if student is None else student).detach().requires_grad_()
    value = case.call(student, case.sample.args[1], **options)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


# The values are those of the papers' public implementations, evaluated in fp64 on STUDENT and
# TEACHER.
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@each_backend()
def test_value_of_similarity_preserving(case: Case, algorithm: str) -> None:
    value, gradient = value_and_gradient(case, algorithm=algorithm)
    assert abs(value.item() - 0.101637673251) < numerics.FP64_RELATIVE
    assert abs(gradient.norm().item() - 0.029002256694) < numerics.FP64_RELATIVE


@each_backend()
def test_value_of_the_l1_form(case: Case) -> None:
    value, _ = value_and_gradient(case, normalize="row_l1")
    assert abs(value.item() - 0.015451082562) < numerics.FP64_RELATIVE


@pytest.mark.parametrize(
    ("B", "D_s", "D_t", "chosen"),
    [
        (64, 16384, 16384, "resident"),
        (256, 25088, 25088, "resident"),
        (64, 128, 128, "resident"),
        (8192, 128, 128, "factored"),
        (8192, 512, 512, "factored"),
        (65536, 256, 256, "factored"),
        (64, 64, 8, "resident"),
    ],
)
def test_auto_picks_the_algorithm(B: int, D_s: int, D_t: int, chosen: str) -> None:
    assert (
        choose_algorithm(B, D_s, D_t, normalize="row_l2", kernel="linear", algorithm="auto")
        == chosen
    )


@pytest.mark.parametrize(
    "options",
    [{"normalize": "row_l1", "kernel": "linear"}, {"normalize": "feature", "kernel": "rbf_taylor"}],
    ids=["row_l1", "rbf_taylor"],
)
def test_auto_never_factors_what_has_no_factors(options: dict[str, str]) -> None:
    assert choose_algorithm(8192, 64, 64, algorithm="auto", **options) == "streamed"
    assert choose_algorithm(64, 64, 64, algorithm="auto", **options) == "resident"
    with pytest.raises(ValueError, match="algorithm must be"):
        choose_algorithm(8192, 64, 64, algorithm="factored", **options)


def test_explain_says_which_algorithm_and_why() -> None:
    student, teacher = torch.empty(8192, 512, device="meta"), torch.empty(8192, 512, device="meta")
    choice = kd.explain("gram_mse", student, teacher).choices["algorithm"]
    assert choice.startswith("factored (")
    assert "multiply-adds" in choice
    asked = kd.explain("gram_mse", student, teacher, algorithm="tiled").choices["algorithm"]
    assert asked == "tiled, streamed (asked for)"
    l1 = kd.explain("gram_mse", student, teacher, normalize="row_l1").choices["algorithm"]
    assert l1.startswith("tiled, streamed (")
    assert "row_l1" in l1


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_auto_takes_what_the_backend_has_kernels_for(backend: str) -> None:
    """Factors of fp32 features are fp64, unless torch allows tf32: Triton has no such products, and
    CUDA has none with factors at all."""
    found = _dispatch.implementation("gram_mse", backend)
    if isinstance(found, str):
        pytest.skip(found)
    student, teacher = (
        randn(130, 6, seed=seed, device=DEVICES[-1], dtype=torch.float32) for seed in (1, 2)
    )
    sample = Sample("tall", (student, teacher), {})
    assert kd.explain("gram_mse", student, teacher).choices["algorithm"].startswith("factored")
    choice = kd.explain("gram_mse", student, teacher, backend=backend).choices["algorithm"]
    assert choice.startswith(f"tiled, streamed ({backend} has no kernel for factors of float32")
    moved = Case(INFO, backend, student.device, torch.float32, sample)
    assert_within_budget(moved, moved.errors())
    with kd.use_backend(backend):
        assert kd.explain("gram_mse", student, teacher).choices["algorithm"] == choice
        assert kd.gram_mse(student, teacher) == moved.call(student, teacher)
    with pytest.raises(kd.BackendUnavailableError, match="factored"):
        kd.gram_mse(student, teacher, algorithm="factored", backend=backend)


@pytest.mark.parametrize("normalize", ["row_l2", "feature", "none"])
def test_triton_has_factors_of_fp32_features_where_tf32_is_allowed(normalize: str) -> None:
    found = _dispatch.implementation("gram_mse", "triton")
    if isinstance(found, str):
        pytest.skip(found)
    device = DEVICES[-1]
    options = {"normalize": normalize, "algorithm": "factored"}
    with fp32_products("tf32"):
        for shape in ((71, 13, 29), (2, 83, 11, 5)):
            sides = (
                randn(*shape[:-2], D, seed=seed, device=device, dtype=torch.float32)
                for seed, D in enumerate(shape[-2:])
            )
            moved = Case(INFO, "triton", device, torch.float32, Sample("tall", (*sides,), options))
            assert_within_budget(moved, moved.errors())
        choice = kd.explain("gram_mse", torch.empty(130, 6), torch.empty(130, 6), backend="triton")
        assert choice.choices["algorithm"].startswith("factored (")


@pytest.mark.parametrize("normalize", ["row_l2", "feature", "none"])
@each_backend(
    randn(40, 11, seed=1, device=CPU, dtype=torch.float64),
    randn(40, 7, seed=2, device=CPU, dtype=torch.float64),
)
def test_tiled_and_factored_agree(case: Case, normalize: str) -> None:
    tiled, factored = (
        value_and_gradient(case, normalize=normalize, algorithm=algorithm)
        for algorithm in ALGORITHMS
    )
    assert_same(factored[0], tiled[0])
    assert_same(factored[1], tiled[1])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@each_backend()
def test_row_l2_ignores_the_scale_of_either_side(case: Case, algorithm: str) -> None:
    student, teacher = case.sample.args
    value, gradient = value_and_gradient(case, algorithm=algorithm)
    scaled, scaled_gradient = value_and_gradient(case, 7.5 * student, algorithm=algorithm)
    assert_same(scaled, value)
    assert_same(7.5 * scaled_gradient, gradient)
    assert_same(case.call(student, teacher / 3, algorithm=algorithm), value)


@pytest.mark.parametrize("normalize", ["row_l2", "row_l1", "feature", "none"])
@each_backend()
def test_rotation_of_the_features_changes_nothing(case: Case, normalize: str) -> None:
    student, _teacher = case.sample.args
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0].to(
        student
    )
    value, gradient = value_and_gradient(case, normalize=normalize)
    rotated, rotated_gradient = value_and_gradient(case, student @ rotation, normalize=normalize)
    assert_same(rotated, value)
    assert_same(rotated_gradient, gradient @ rotation)


@pytest.mark.parametrize("normalize", ["row_l2", "row_l1", "feature", "none"])
@each_backend()
def test_the_order_of_the_rows_changes_nothing(case: Case, normalize: str) -> None:
    student, teacher = case.sample.args
    order = torch.randperm(len(student), generator=torch.Generator().manual_seed(0)).to(
        student.device
    )
    value, gradient = value_and_gradient(case, normalize=normalize)
    moved = student[order].detach().requires_grad_()
    permuted = case.call(moved, teacher[order], normalize=normalize)
    assert_same(permuted.detach(), value)
    (permuted_gradient,) = torch.autograd.grad(permuted, moved)
    assert_same(permuted_gradient, gradient[order])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@each_backend()
def test_feature_gradient_is_orthogonal_to_the_features(case: Case, algorithm: str) -> None:
    student = case.sample.args[0]
    _, gradient = value_and_gradient(case, normalize="feature", algorithm=algorithm)
    along = (gradient * student).sum(-1).abs() / (gradient.norm(dim=-1) * student.norm(dim=-1))
    assert along.max().item() < numerics.FP64_RELATIVE


@each_backend(dtypes=(torch.float32, torch.bfloat16), algorithms=ALGORITHMS)
def test_the_loss_is_never_negative(case: Case) -> None:
    """Also where rounding would make it so: the student is the teacher, up to one unit in the last
    place."""
    teacher = case.sample.args[1]
    for student in (teacher, teacher * (1 + torch.finfo(teacher.dtype).eps)):
        assert case.call(student, teacher).item() >= 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@each_backend()
def test_row_l2_is_at_most_four_over_b(case: Case, algorithm: str) -> None:
    student, _ = case.sample.args
    flipped = (
        student
        * torch.tensor([1.0, -1.0], dtype=student.dtype, device=student.device).repeat(4)[:, None]
    )
    value = case.call(student, flipped, algorithm=algorithm).item()
    assert 0 < value <= 4 / len(student)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@each_backend()
def test_a_repeated_batch_divides_the_loss(case: Case, algorithm: str) -> None:
    """k copies of every row: each Gram row norm grows by sqrt(k), so the mean over (k B)^2 entries
    is 1 / k of it."""
    student, teacher = case.sample.args
    value, gradient = value_and_gradient(case, algorithm=algorithm)
    moved = student.repeat(5, 1).requires_grad_()
    repeated = case.call(moved, teacher.repeat(5, 1), algorithm=algorithm)
    assert_same(5 * repeated.detach(), value)
    (repeated_gradient,) = torch.autograd.grad(repeated, moved)
    assert_same(25 * repeated_gradient, gradient.repeat(5, 1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_backend(
    STUDENT.expand(3, 8, 16) * torch.tensor([1.0, 2.0, 3.0])[:, None, None],
    TEACHER.expand(3, 8, 24),
)
def test_groups_are_independent(case: Case, reduction: str) -> None:
    student, teacher = case.sample.args
    each = torch.stack(
        [case.call(s, t, reduction="sum") for s, t in zip(student, teacher, strict=True)]
    )
    expected = {"mean": each.mean() / 64, "sum": each.sum(), "none": each / 64}[reduction]
    losses = case.call(student, teacher, reduction=reduction)
    for loss, wanted in zip(losses.reshape(-1), expected.reshape(-1), strict=True):
        assert_same(loss, wanted)


def literal(student: Tensor, teacher: Tensor) -> Tensor:
    """The paper's form, written with the norms rather than through F.normalize."""
    grams = [x @ x.T for x in (student, teacher)]
    s, t = (g / g.norm(dim=1, keepdim=True).clamp_min(1e-12) for g in grams)
    return (s - t).square().mean() if len(s) else s.sum()


@each_backend()
@settings(deadline=None, max_examples=15, database=None, derandomize=True)
@given(
    B=st.integers(0, 40),
    D_s=st.integers(1, 24),
    D_t=st.integers(1, 24),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    algorithm=st.sampled_from(["auto", *ALGORITHMS]),
)
def test_any_shape_is_the_paper_s_form(
    case: Case, B: int, D_s: int, D_t: int, scale: float, algorithm: str
) -> None:
    student, teacher = (
        randn(B, D, seed=seed, device=case.device, dtype=torch.float64) * scale
        for seed, D in ((3, D_s), (4, D_t))
    )
    drawn = case.having(student, teacher)
    student = student.requires_grad_()
    wanted = literal(student, teacher)
    (wanted_gradient,) = torch.autograd.grad(wanted, student)
    value, gradient = value_and_gradient(drawn, student, algorithm=algorithm)
    # 2 - 2 cos: the loss is a difference of numbers of size 2 / B
    size = 2 / max(B, 1)
    assert_same(value, wanted.detach(), size=size)
    # the gradient's terms are of that size over the features' size
    assert_same(gradient, wanted_gradient, size=size / scale)


@each_backend(dtypes=(torch.float32, torch.bfloat16))
def test_relu_maps_with_dead_samples(case: Case) -> None:
    """Feature maps after a ReLU, as the loss is used: sparse, non-negative, correlated."""
    base = randn(1, 96, seed=5, device=CPU, dtype=torch.float64)
    maps = [
        F.relu(base + randn(24, 96, seed=seed, device=CPU, dtype=torch.float64)) for seed in (6, 7)
    ]
    moved = case.having(*(x.to(case.device, case.dtype) for x in maps))
    assert_within_budget(moved, moved.errors())


def _memory_cases() -> list[Any]:
    """The cpu kernels in both algorithms; the reference only where its own products are small."""
    params = []
    for backend, algorithm in (("cpu", "factored"), ("cpu", "tiled"), ("reference", "factored")):
        made = case(backend, STUDENT, TEACHER, dtype=torch.float32, algorithm=algorithm)
        params.append(pytest.param(made, id=f"{backend}-{algorithm}"))
    return params


@pytest.mark.parametrize("case", _memory_cases())
def test_no_gram_of_the_batch_is_allocated(case: Case) -> None:
    """Peak resident memory of a process that makes the call: native scratch goes around torch's
    allocator."""
    B, D = 6000, 16
    reason = peak.why_not(CPU)
    assert reason is None, reason
    shape = BenchShape("memory", {"B": B, "D": D}, "", case.sample.kwargs)
    extra = peak.extra_mib("gram_mse", shape, torch.float32, "fwd_bwd", case.backend, CPU)
    gram_mib = B * B * 4 / peak.MIB
    assert extra < gram_mib / 4, f"{extra} MiB, one Gram has {gram_mib}"


@pytest.mark.parametrize(
    ("shape", "algorithm", "normalize"),
    [
        ((600, 10, 6, 7), "tiled", "row_l2"),
        ((24, 160, 160, 40), "tiled", "row_l2"),
        ((24, 180, 16, 24), "tiled", "row_l1"),
        ((24, 180, 16, 24), "factored", "row_l2"),
        ((24, 180, 16, 24), "factored", "feature"),
    ],
)
def test_many_groups_at_once(shape: tuple[int, ...], algorithm: str, normalize: str) -> None:
    """So many that they are shared among threads, each with scratch memory of its own."""
    G, B, D_s, D_t = shape
    args = (torch.randn(G, B, D_s), torch.randn(G, B, D_t))
    options = {"normalize": normalize, "algorithm": algorithm, "reduction": "none"}
    sample = Sample("groups", args, options)
    for error in numerics.check_sample(INFO, sample, torch.float32, "auto"):
        assert error.ok, error.detail


def test_one_tensor_on_both_sides() -> None:
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)

    def step(x: Tensor) -> Tensor:
        return kd.gram_mse(x, x)

    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        loss = call(x)
        (grad,) = torch.autograd.grad(loss, x)
        assert loss == 0
        assert torch.equal(grad, torch.zeros_like(grad))
