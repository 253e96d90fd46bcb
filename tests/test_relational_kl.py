# SPDX-License-Identifier: Apache-2.0
"""What is special about relational_kl and info_nce: published values, temperatures, excluded
keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, Calls, Case
from torch import Tensor
from values import QUEUE, STUDENT, TEACHER, assert_same

import kdkernels as kd
from kdkernels import _dispatch
from kdkernels.reference import _relational_kl as reference
from kdkernels.testing import numerics, peak
from kdkernels.testing.opinfo import BenchShape, Sample, opinfos, randn

INFO, NCE = (
    next(info for info in opinfos() if info.name == name) for name in ("relational_kl", "info_nce")
)
CPU = torch.device("cpu")


# the queue of the published values, whose first keys are the teacher's
KEYS = torch.cat([F.normalize(TEACHER), QUEUE[8:]])


def each_backend(
    *dtypes: torch.dtype,
    backends: tuple[str, ...] = _dispatch.BACKENDS,
    info: Any = INFO,
) -> pytest.MarkDecorator:
    """Parametrise a test by a case on the matrices above, moved to a device and a dtype."""
    params = []
    for backend in backends:
        for device in DEVICES:
            for dtype in dtypes or (torch.float64,):
                args = [x.to(device, dtype) for x in (STUDENT, TEACHER, KEYS)]
                if info is NCE:
                    args = [args[0], args[2], torch.arange(8, device=device)]
                params.append(
                    pytest.param(
                        Case(info, backend, device, dtype, Sample("here", tuple(args))),
                        id=f"{backend}-{device.type}-{str(dtype)[6:]}",
                        marks=[pytest.mark.gpu] if device.type == "cuda" else [],
                    )
                )
    return pytest.mark.parametrize("case", params)


def value_and_gradients(function: Any, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    """Loss, and its gradients by the floating-point arguments and the temperatures that are
    tensors."""
    leaves = [_leaf(x) for x in args]
    options = {name: _leaf(x) for name, x in options.items()}
    value = function(*leaves, **options)
    sources = [x for x in (*leaves, *options.values()) if isinstance(x, Tensor) and x.requires_grad]
    return value.detach(), *torch.autograd.grad(value.sum(), sources)


def _leaf(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().clone().requires_grad_()
    return x


# The values are those of the authors' public implementation, evaluated in fp64.
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("divergence", "expected"), [("cross_entropy", 11.854216726955), ("kl", 11.376975730463)]
)
@each_backend()
def test_value_of_the_published_loss(
    case: Case, divergence: str, expected: float, normalize: bool
) -> None:
    student, teacher, queue = case.sample.args
    student = student.detach().requires_grad_()
    rows = (student, teacher)
    if not normalize:
        rows = tuple(F.normalize(x) for x in rows)
    loss = case.call(*rows, queue, divergence=divergence, normalize=normalize)
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(loss.item() - expected) < numerics.FP64_RELATIVE * expected
    assert abs(gradient.norm().item() - 1.400027038602) < numerics.FP64_RELATIVE


@pytest.mark.parametrize("divergence", ["kl", "cross_entropy"])
@each_backend()
def test_temperatures_get_gradients(case: Case, divergence: str) -> None:
    own, theirs = (torch.tensor(t, device=case.device) for t in (0.3, 0.2))
    options = {"student_temperature": own, "teacher_temperature": theirs, "divergence": divergence}
    got = value_and_gradients(case.call, *case.sample.args, **options)
    wanted = value_and_gradients(INFO.definition, *case.sample.args, **options)
    assert len(got) == 6
    for g, w in zip(got[:4], wanted[:4], strict=True):
        assert_same(g, w)
    for g, w in zip(got[4:], wanted[4:], strict=True):
        torch.testing.assert_close(g, w)  # fp32, as the temperatures are
    own, theirs = own.item(), theirs.item()
    options |= {"student_temperature": own, "teacher_temperature": theirs}
    assert_same(case.call(*case.sample.args, **options), got[0])


@each_backend(info=NCE)
def test_temperature_of_info_nce_gets_a_gradient(case: Case) -> None:
    options = {"temperature": torch.tensor(0.3, dtype=torch.float64, device=case.device)}
    got = value_and_gradients(case.call, *case.sample.args, **options)
    wanted = value_and_gradients(NCE.definition, *case.sample.args, **options)
    for g, w in zip(got, wanted, strict=True):
        assert_same(g, w)


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan])
@each_backend(torch.float32)
def test_a_tensor_that_is_no_temperature_gives_nan(case: Case, bad: float) -> None:
    bad = torch.tensor(bad, device=case.device)
    for name in ("student_temperature", "teacher_temperature"):
        assert case.call(*case.sample.args, **{name: bad}).isnan()


@each_backend()
def test_divergences_differ_by_the_entropy_and_have_one_gradient(case: Case) -> None:
    student, teacher, queue = case.sample.args
    student = student.detach().requires_grad_()
    kl, ce = (
        case.call(student, teacher, queue, divergence=name, reduction="none")
        for name in ("kl", "cross_entropy")
    )
    log_p = (reference.similarities(teacher, queue, True) / 0.02).log_softmax(-1)
    assert_same(ce - kl, -(log_p.exp() * log_p).sum(-1))
    gradients = [torch.autograd.grad(loss.sum(), student)[0] for loss in (kl, ce)]
    assert torch.equal(*gradients)


@each_backend()
def test_excluding_a_key_is_leaving_it_out(case: Case) -> None:
    """Row by row, against a bank that lacks the key."""
    student, teacher, queue = case.sample.args
    exclude = torch.tensor([0, 31, -1, 5, 0, 17, 30, -1], device=case.device)
    got = value_and_gradients(case.call, student, teacher, queue, exclude=exclude, reduction="none")
    for i, k in enumerate(exclude.tolist()):
        keep = torch.arange(32, device=case.device) != k
        rows = student[i : i + 1], teacher[i : i + 1]
        wanted = value_and_gradients(case.call, *rows, queue[keep], reduction="none")
        for g, w in zip(got[:3], wanted[:3], strict=True):
            assert_same(g[i], w[0])


@each_backend(torch.float32)
def test_a_row_without_keys_costs_nothing(case: Case) -> None:
    student, teacher, queue = case.sample.args
    exclude = torch.tensor([0, -1] * 4, device=case.device)
    value, *gradients = value_and_gradients(
        case.call, student, teacher, queue[:1], exclude=exclude, reduction="none"
    )
    assert value.eq(0).all()
    for gradient in gradients:
        assert gradient.eq(0).all()


@pytest.mark.parametrize("divergence", ["kl", "cross_entropy"])
@each_backend()
def test_an_own_key_is_one_more_key(case: Case, divergence: str) -> None:
    """Row by row, against a bank that ends with the key."""
    student, teacher, queue = case.sample.args
    own = teacher.flip(1)
    exclude = torch.tensor([0, 31, -1, 5, 0, 17, 30, -1], device=case.device)
    options = {"divergence": divergence, "exclude": exclude, "reduction": "none"}
    got = value_and_gradients(case.call, student, teacher, queue, **options, own_keys=own)
    by_queue = torch.zeros_like(queue)
    for i in range(len(student)):
        rows, bank = (student[i : i + 1], teacher[i : i + 1]), torch.cat([queue, own[i : i + 1]])
        options["exclude"] = exclude[i : i + 1]
        value, *by_rows, by_bank = value_and_gradients(case.call, *rows, bank, **options)
        by_queue += by_bank[:-1]
        wanted = value[0], by_rows[0][0], by_rows[1][0], by_bank[-1]
        for g, w in zip((got[0], got[1], got[2], got[4]), wanted, strict=True):
            assert_same(g[i], w)
    assert_same(got[3], by_queue)


@each_backend(torch.float32)
def test_own_keys_alone_may_ask_for_a_gradient(case: Case) -> None:
    args = case.sample.args
    own = args[1].flip(1).requires_grad_()
    (got,) = torch.autograd.grad(case.call(*args, own_keys=own), own)
    wanted = value_and_gradients(case.call, *args, own_keys=own)[-1]
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("tensor", [True, False])
@each_backend(torch.float32, torch.bfloat16)
def test_keys_that_do_not_count_may_be_anything(case: Case, tensor: bool) -> None:
    student, teacher, keys = case.sample.args
    keys, widths = keys.clone(), (teacher[:, :9], keys[:, :9].clone())
    keys[11:], widths[1][11:] = math.nan, math.inf
    options = {"num_keys": torch.tensor(11, device=case.device) if tensor else 11}
    positives = torch.arange(8, device=case.device)
    for info, args in (
        (INFO, (student, teacher, keys)),
        (INFO, (student, widths[0], keys, widths[1])),
        (NCE, (student, keys, positives)),
    ):
        errors = numerics.check_sample(info, Sample("few", args, options), case.dtype, case.backend)
        assert all(error.ok for error in errors), [error.detail for error in errors]


@each_backend(torch.float32)
def test_a_number_of_keys_that_nobody_looked_at_is_kept_within_the_bank(case: Case) -> None:
    args, positives = case.sample.args, torch.arange(8, device=case.device)
    options = {"own_keys": args[1].flip(1), "num_keys": torch.tensor(0, device=case.device)}
    torch._dynamo.reset()
    compiled, compiled_nce = (
        torch.compile(
            lambda *args, call=info.function, **kw: call(
                *args, reduction="none", backend=case.backend, **kw
            ),
            fullgraph=True,
            backend="aot_eager",
        )
        for info in (INFO, NCE)
    )
    for number in (0, -3):
        options["num_keys"].fill_(number)
        for few in (options, {"num_keys": options["num_keys"]}):
            for result in value_and_gradients(compiled, *args, **few):
                assert result.eq(0).all()
        of_nce = value_and_gradients(compiled_nce, args[0], args[2], positives, **few)
        assert of_nce[0].isnan().all()
        assert of_nce[1].isnan().all()
    options["num_keys"].fill_(40)
    got = value_and_gradients(compiled, *args, **options)
    wanted = value_and_gradients(case.call, *args, own_keys=options["own_keys"], reduction="none")
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@each_backend(torch.float32)
def test_low_temperatures_stay_finite(case: Case, dtype: torch.dtype) -> None:
    args = [x.to(dtype) for x in case.sample.args]
    sharp = {"student_temperature": 0.001, "teacher_temperature": 0.001}
    for options in (sharp, {**sharp, "divergence": "cross_entropy"}):
        # others' gradients may pass the range of fp16, being products of two logits of 1000
        loss, of_student, *_ = value_and_gradients(case.call, *args, **options)
        assert loss.isfinite()
        assert of_student.isfinite().all()


@each_backend()
def test_equal_sides_do_not_diverge(case: Case) -> None:
    student, _, queue = case.sample.args
    options = {"student_temperature": 0.05, "teacher_temperature": 0.05}
    for result in value_and_gradients(case.call, student, student, queue, **options):
        assert_same(result, torch.zeros_like(result), size=1.0)


@each_backend(info=NCE)
def test_info_nce_is_the_cross_entropy_of_the_similarities(case: Case) -> None:
    queries, keys, positives = case.sample.args
    got = case.call(queries, keys, positives, temperature=0.5)
    logits = F.normalize(queries) @ F.normalize(keys).T / 0.5
    assert_same(got, F.cross_entropy(logits, positives))


@each_backend(info=NCE)
def test_info_nce_is_the_limit_of_a_sharp_teacher(case: Case) -> None:
    """Each query's positive is the key that its teacher equals."""
    queries, keys, positives = case.sample.args
    options = {"student_temperature": 0.2, "teacher_temperature": 1e-6}
    sharp = kd.relational_kl(queries, keys[:8], keys, **options, backend=case.backend)
    got = case.call(queries, keys, positives, temperature=0.2)
    assert_same(got, sharp)


@each_backend(torch.float32, info=NCE)
def test_queries_without_features_are_equally_far_from_all_keys(case: Case) -> None:
    queries, keys, positives = case.sample.args
    value, *gradients = value_and_gradients(case.call, queries[:, :0], keys[:, :0], positives)
    torch.testing.assert_close(value, torch.full_like(value, math.log(len(keys))))
    assert [gradient.numel() for gradient in gradients] == [0, 0]


@each_backend(torch.float32, info=NCE)
def test_a_positive_that_nobody_looked_at_and_names_no_key_gives_nan(case: Case) -> None:
    """A compiled function cannot look at values, as no function can on a GPU."""
    queries, keys, positives = case.sample.args
    few = torch.tensor(len(keys) - 1, device=case.device)
    compiled = torch.compile(
        lambda *args: case.call(*args, reduction="none", num_keys=few),
        fullgraph=True,
        backend="aot_eager",
    )
    for wrong in (-1, len(keys) - 1, len(keys), 2**40):
        positives = positives.clone()
        positives[3] = wrong
        value, *gradients = value_and_gradients(compiled, queries, keys, positives)
        assert value.isnan().tolist() == [i == 3 for i in range(8)]
        assert gradients[0][3].isnan().all()


@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize(("B", "K"), [(700, 1100), (3, 9001), (2100, 9)])
@each_backend(torch.float32, torch.float64, backends=("cpu",))
def test_several_blocks_of_rows_and_keys(case: Case, B: int, K: int, own_keys: bool) -> None:
    """More than one tile along each axis, and axes that are cut into pieces for threads to
    share."""
    shapes = ((B, 3), (B, 5), (K, 3), (K, 5)) if own_keys else ((B, 3), (B, 3), (K, 3))
    args = tuple(
        randn(*shape, seed=seed, device=case.device, dtype=case.dtype)
        for seed, shape in enumerate(shapes)
    )
    exclude = torch.arange(B, device=case.device) * 7 % K
    sample = Sample("blocks", args, {"exclude": exclude, "reduction": "none"})
    errors = numerics.check_sample(INFO, sample, case.dtype, case.backend)
    assert all(error.ok for error in errors), [error.detail for error in errors]
    args = (args[0], args[2], exclude)
    errors = numerics.check_sample(NCE, Sample("blocks", args), case.dtype, case.backend)
    assert all(error.ok for error in errors), [error.detail for error in errors]


@each_backend(backends=("cpu",))
def test_a_maximum_may_lie_in_any_tile(case: Case) -> None:
    """Keys in the order of their similarity, rising and falling: running maxima grow in every tile,
    or never."""
    angles = torch.linspace(0, 1.5, 2500, dtype=torch.float64)
    keys = torch.stack([angles.cos(), angles.sin()], 1)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    options = {"student_temperature": 0.01, "teacher_temperature": 0.003}
    got = value_and_gradients(case.call, rows, rows.flip(0), keys, **options)
    wanted = value_and_gradients(INFO.definition, rows, rows.flip(0), keys, **options)
    for g, w in zip(got, wanted, strict=True):
        assert_same(g, w)


@pytest.mark.parametrize("temperatures", [(0.02, 0.5), (0.5, 0.02)])
@pytest.mark.parametrize("order", ["alike_first", "alike_last"])
@each_backend(backends=("cpu",))
def test_sides_may_become_alike_and_stop_to_be(
    case: Case, order: str, temperatures: tuple[float, float]
) -> None:
    """Tiles of equal keys add as much to both sides, other tiles do not; both meet in one piece."""
    keys = randn(10000, 16, seed=11, device=CPU, dtype=torch.float64)
    equal = (keys[:1] if order == "alike_last" else -keys[:1]).expand(10000, -1)
    parts = (equal, keys) if order == "alike_first" else (keys, equal)
    student, teacher = (
        keys[0] + 0.3 * randn(9, 16, seed=seed, device=CPU, dtype=torch.float64)
        for seed in (12, 13)
    )
    args = (student, teacher, torch.cat(parts))
    options = dict(zip(("student_temperature", "teacher_temperature"), temperatures, strict=True))
    found = value_and_gradients(case.call, *args, reduction="none", **options)
    wanted = value_and_gradients(reference.relational_kl, *args, reduction="none", **options)
    for got, expected in zip(found[:2], wanted[:2], strict=True):  # loss, student's gradient
        assert_same(got, expected)


@each_backend(torch.float32)
def test_only_what_asks_takes_a_second_sweep(case: Case) -> None:
    def sizes(*needs: bool) -> tuple[int, ...]:
        """Elements of dloss in the forward, and of the results of the backward."""
        args = [x.detach().requires_grad_(n) for x, n in zip(case.sample.args, needs, strict=True)]
        with Calls() as calls:
            value = case.call(*args)
            if value.requires_grad:
                value.backward()
        forward, *backward = (results for _, _, results in calls.made)
        return forward[1].numel(), *(x.numel() for results in backward for x in results)

    rows, keys = STUDENT.numel(), KEYS.numel()
    assert sizes(False, False, False) == (0,)
    others = (0, 0, 0, 0)
    assert sizes(True, False, False) == (rows, rows, 0, 0, *others)
    assert sizes(False, True, False) == (0, 0, rows, 0, *others)
    assert sizes(False, False, True) == (0, 0, 0, keys, *others)
    leaf = case.sample.args[0].detach().requires_grad_()
    with torch.no_grad(), Calls() as calls:
        case.call(leaf, *case.sample.args[1:])
    assert calls.made[0][2][1].numel() == 0


def test_explain_says_where_the_gradient_is_computed() -> None:
    student = STUDENT.clone().requires_grad_()
    answer = kd.explain("relational_kl", student, TEACHER, KEYS)
    assert "forward sweep" in answer.choices["gradient"]
    answer = kd.explain("info_nce", STUDENT, KEYS, torch.arange(8), backend="reference")
    assert answer.choices["gradient"].startswith("none")
    assert answer.backend == "reference"


@pytest.mark.parametrize("name", ["relational_kl", "info_nce"])
def test_no_matrix_of_similarities_is_allocated(name: str) -> None:
    """Peak resident memory of a process that makes the call: native scratch goes around torch's
    allocator."""
    B, D, K = 2048, 16, 16384
    reason = peak.why_not(CPU)
    assert reason is None, reason
    shape = BenchShape("memory", {"B": B, "D": D, "K": K}, "")
    extra = peak.extra_mib(name, shape, torch.float32, "fwd_bwd", "cpu", CPU)
    similarities = B * K * 4 / peak.MIB
    assert extra < similarities / 4, f"{extra} MiB, the similarities have {similarities}"
