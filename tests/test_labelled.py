# SPDX-License-Identifier: Apache-2.0
"""What the losses over labelled embeddings have in common: references, labels, degenerate batches,
rows that coincide or are not finite, torch.compile and memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, assert_within_budget, interpreted
from labelled import each_backend, gradient_of, normal, on, with_references
from torch import Tensor

import kdkernels as kd
from kdkernels.testing import numerics, peak
from kdkernels.testing.opinfo import BenchShape, Sample, rng
from kdkernels.testing.opinfos import _labelled

CPU = torch.device("cpu")
every_float = each_backend((torch.float32, torch.float64))


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
@each_backend((torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_gradients_of_both_sides(case: Case, distance: str) -> None:
    info = case.info
    options = {**case.sample.kwargs, "distance": distance, "reduction": "sum"}

    def draw(seed: int) -> Sample:
        bank = with_references(*normal(case, 19, 17, 6, seed=seed + 1))
        return Sample("both", normal(case, 26, 17, 5, seed=seed), options | bank)

    drawn = draw(_labelled.first(draw, _labelled.clear_of_kinks))
    (x, y), r, r_y = drawn.args, drawn.kwargs["references"], drawn.kwargs["reference_labels"]

    def both(function: Any, **more: Any) -> Any:
        return lambda x, r: function(x, y, **with_references(r, r_y), **options, **more)

    wide = numerics.cast((x, r), torch.float64)
    hi, hi_gradients = numerics.value_and_grads(both(info.definition), wide, 2)
    low, low_gradients = numerics.value_and_grads(both(info.definition), (x, r), 2)
    on_backend = both(info.function, backend=case.backend)
    out, gradients = numerics.value_and_grads(on_backend, (x, r), 2)
    errors = [numerics.compare("loss", out, hi, low, case.dtype)]
    for name, *three in zip(
        ("dembeddings", "dreferences"), gradients, hi_gradients, low_gradients, strict=True
    ):
        errors.append(numerics.compare(name, *three, case.dtype))
        assert numerics.missing_rows(three[0], three[1]) == []
    assert_within_budget(case, errors)
    alone = r.detach().requires_grad_()
    (of_references,) = torch.autograd.grad(on_backend(x.detach(), alone), alone)
    (beside,) = torch.autograd.grad(on_backend(x.detach().requires_grad_(), alone), alone)
    assert torch.equal(of_references, beside)


@each_backend((torch.float32,))
def test_norms_are_clamped_and_one_that_overflows_is_nan(case: Case) -> None:
    """Operators divide the rows by their norms themselves, and take what that adds to gradients."""

    def draw(seed: int) -> Sample:
        rows, labels = normal(case, 21, 5, 4, seed=seed)
        rows[::3] *= 1e-13  # far below the clamp
        return Sample("clamped", (rows, labels), case.sample.kwargs)

    drawn = draw(_labelled.first(draw, _labelled.clear_of_kinks))
    rows, labels = drawn.args
    size = torch.ones_like(rows[:, :1])
    size[::3] = 1e-13

    def loss(function: Any, scale: Tensor = size, **more: Any) -> Any:
        return lambda z: function(z * scale.to(z), labels, **drawn.kwargs, **more)

    z = rows / size
    hi, (hi_gradient,) = numerics.value_and_grads(loss(case.info.definition), (z.double(),), 1)
    low, (low_gradient,) = numerics.value_and_grads(loss(case.info.definition), (z,), 1)
    on_backend = loss(case.info.function, backend=case.backend)
    out, (gradient,) = numerics.value_and_grads(on_backend, (z,), 1)
    assert_within_budget(
        case,
        [
            numerics.compare("loss", out, hi, low, case.dtype),
            numerics.compare("dembeddings", gradient, hi_gradient, low_gradient, case.dtype),
        ],
    )
    size[1] = 1e25  # its square is beyond fp32
    assert loss(case.info.function, size, backend=case.backend)(z).isnan()


@every_float
def test_the_batch_as_references_less_itself(case: Case) -> None:
    """A bank that holds the batch in another order, where each row leaves itself out."""
    case = on(case, "sum", *normal(case, 40, 13, 6), reduction="sum", normalize_embeddings=False)
    place = torch.randperm(40, generator=rng(3)).to(case.device)

    def against_bank(x: Tensor, y: Tensor, **options: Any) -> Tensor:
        options |= with_references(x[place], y[place]) | {"exclude": place.argsort()}
        # contrastive pairs count in both orders
        return case.info.function(x, y, **options) / (2 if case.info.op == "contrastive" else 1)

    changed = replace(case, info=replace(case.info, function=against_bank))
    assert_within_budget(changed, changed.errors())


@every_float
def test_a_negative_may_be_left_out(case: Case) -> None:
    """The nearest negative of each row is left out, and rows that name none leave none out."""
    x, y = normal(case, 30, 7, 5)
    bank = with_references(*normal(case, 33, 7, 5, seed=2))
    mined = kd.mine_triplets(x, y, **bank, backend="reference")
    exclude = torch.full_like(y, -1)
    exclude[mined.anchors[::2]] = mined.negatives[::2]
    left_out = on(case, "negative", x, y, **bank, exclude=exclude)
    assert_within_budget(left_out, left_out.errors())
    nothing = case.call(x, y, **bank, exclude=torch.full_like(y, -1))
    assert torch.equal(nothing, case.call(x, y, **bank))


@pytest.mark.parametrize("bank", [False, True], ids=["batch", "references"])
@every_float
def test_many_tiles(case: Case, bank: bool) -> None:
    """In fp32 with losses that rounding does not bend: no hinge over millions of triplets, and no
    bound of a semihard negative."""
    if case.dtype == torch.float32 and case.info.op == "triplet_all":
        case = on(case, "smooth", *case.sample.args, soft=True, mining="batch_all")
    slow = interpreted(case.backend, case.device) or case.backend == "reference"
    B, M = (70, 66) if slow else (700, 650)
    x, y = normal(case, B, 24, 60)
    options = with_references(*normal(case, M, 24, 70, seed=2)) if bank else {}
    if bank:
        options["exclude"] = torch.randint(-1, M, (B,), generator=rng(4)).to(x.device)
    many = on(case, "many", x, y, **options)
    assert_within_budget(many, many.errors())
    first, second = (gradient_of(many, x, y) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@each_backend((torch.float32,))
def test_any_integer_dtype_of_labels(case: Case) -> None:
    x, y = normal(case, 40, 6, 7)
    loss, gradient = gradient_of(case, x, y)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        got = gradient_of(case, x, y.to(dtype))
        assert torch.equal(got[0], loss), dtype
        assert torch.equal(got[1], gradient), dtype


@pytest.mark.parametrize(
    "values", [[-5, -1, -128, -3, -2], [2**63 - 1, -(2**63), 0, 2**62, 2**32]], ids=["<0", "huge"]
)
@every_float
def test_labels_are_names_only(case: Case, values: list[int]) -> None:
    x, y = normal(case, 40, 6, 5)
    renamed = on(case, "renamed", x, torch.tensor(values, device=case.device)[y])
    errors = renamed.errors()
    assert_within_budget(renamed, errors)
    assert errors[0].scale == on(case, "named", x, y).errors()[0].scale


def _degenerate(case: Case) -> dict[str, tuple[Tensor, Tensor, dict[str, Any]]]:
    """Batches without a triplet."""
    x, y = normal(case, 9, 4, 3)
    return {
        "one class": (x, torch.zeros_like(y), {}),
        "all distinct": (x, torch.arange(9, device=case.device), {}),
        "one row": (x[:1], y[:1], {}),
        "no row": (x[:0], y[:0], {}),
        "no reference": (x, y, with_references(x[:0], y[:0])),
        "no reference of these labels": (x, y, with_references(x, y + 100)),
        "no column": (x[:, :0], y, {"margin": 0.0}),
    }


# a single class has only pairs that attract, classes of one row only pairs that repel
ONE_KIND = ("one class", "all distinct", "no reference of these labels")


@pytest.mark.parametrize("reduction", ["mean_nonzero", "mean", "sum"])
@pytest.mark.parametrize("name", list(_degenerate(Case(None, "", CPU, torch.float32, None))))
@every_float
def test_nothing_to_compare(case: Case, name: str, reduction: str) -> None:
    x, y, options = _degenerate(case)[name]
    if name in ONE_KIND and case.info.op == "contrastive":
        kind = on(case, name, x, y, reduction=reduction, **options)
        assert_within_budget(kind, kind.errors())
        return
    loss, gradient = gradient_of(case, x, y, reduction=reduction, **options)
    assert loss.eq(0).all()
    assert gradient.shape == x.shape
    assert gradient.eq(0).all()


@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@every_float
def test_zero_rows_and_coincident_rows(case: Case, normalize: bool) -> None:
    x, y = normal(case, 24, 5, 3)
    x[3:6] = 0
    x[10:14] = x[10]
    rows = on(case, "zeros", x, y, normalize_embeddings=normalize)
    errors = rows.errors()
    if case.info.selects and normalize:
        # every unit row is 1 away from a zero row, up to rounding, which picks one
        errors = errors[:1] if case.sample.kwargs == {"mining": "batch_hard"} else []
    assert_within_budget(rows, errors)
    assert gradient_of(rows, x, y)[1].isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@every_float
def test_a_row_that_is_not_finite_shows(case: Case, bad: float) -> None:
    x, y = normal(case, 30, 6, 3)
    for row in (0, 13, 29):
        broken = x.clone()
        broken[row, 2] = bad
        assert not case.call(broken, y).isfinite(), f"row {row}"
        bank = with_references(broken, y)
        assert not case.call(x, y, **bank).isfinite(), f"reference {row}"
    broken = x.clone()
    broken[:, 0] = bad
    assert not case.call(broken, y).isfinite()


@every_float
def test_a_row_whose_distances_overflow_shows(case: Case) -> None:
    x, y = normal(case, 30, 6, 3)
    x[7] = torch.finfo(case.dtype).max ** 0.5
    assert not case.call(x, y, normalize_embeddings=False).isfinite()


@each_backend((torch.float32,), backends=("reference",))
def test_compiles_into_one_graph_with_references(case: Case) -> None:
    """Without them, and on each backend, in test_ops_operators.py."""
    x, y = normal(case, 40, 6, 5)
    r, r_y = normal(case, 30, 6, 5, seed=2)

    def call(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
        return case.call(x, y, **with_references(r, r_y))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for function in (compiled, call):
        leaves = x.detach().requires_grad_(), r.detach().requires_grad_()
        loss = function(leaves[0], y, leaves[1])
        results = loss.detach(), torch.autograd.grad(loss, leaves)
        if function is compiled:
            first = results
    assert torch.equal(first[0], results[0])
    for got, wanted in zip(first[1], results[1], strict=True):
        assert torch.equal(got, wanted)


@each_backend((torch.float32,))
def test_one_tensor_on_both_sides(case: Case) -> None:
    """The batch as its own reference set, where each row finds itself."""
    x, y = normal(case, 40, 6, 5)
    other = x.clone()
    for same in (x, other):
        loss, gradient = gradient_of(case, x, y, **with_references(same, y))
        expected = case.info.definition(
            x.double(), y, **with_references(same.double(), y), **case.sample.kwargs
        )
        torch.testing.assert_close(loss.double(), expected)
        assert gradient.isfinite().all()


@each_backend((torch.float32,), backends=("cpu",))
def test_no_distances_of_the_batch_are_kept(case: Case) -> None:
    """Peak resident memory of a process that makes the call: native scratch goes around torch's
    allocator."""
    B = 6000
    reason = peak.why_not(CPU)
    assert reason is None, reason
    sizes = {"B": B, "D": 16, "classes": 750}
    shape = BenchShape("memory", sizes, "", dict(case.sample.kwargs))
    extra = peak.extra_mib(case.info.name, shape, torch.float32, "fwd_bwd", case.backend, CPU)
    distances_mib = B * B * 4 / peak.MIB
    assert extra < distances_mib / 4, f"{extra} MiB, the distances have {distances_mib}"
