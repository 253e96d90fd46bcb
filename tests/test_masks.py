# SPDX-License-Identifier: Apache-2.0
"""Rows that do not count, by `sample_mask` or by their label, in every op and module that takes
them: what is left is the loss of the batch without them."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case, assert_within_budget, cases, few, gradients, interpreted, leaves
from modules import CASES, assert_same_loss
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.testing.opinfo import OpInfo, Sample, opinfos, rng

# what has one row per sample, in any op
ROWS = (
    "student", "teacher", "embeddings", "queries", "labels", "positives", "codes", "own_keys",
    "exclude",
)  # fmt: skip
IGNORED = 100  # a label of no sample
# where a zero row costs nothing, no index is made and `torch.compile` sees no data
ZEROES = ("gram_mse", "relational_kl", "lsh_bce")


def takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters


def with_option(name: str) -> tuple[OpInfo, ...]:
    return tuple(info for info in opinfos() if takes(info.function, name))


def marks_of(case: Case) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if case.device.type == "cuda" else []


def each_case_with(name: str, pick: Any = few, **options: Any) -> pytest.MarkDecorator:
    """Parametrise a test by the cases of ops that take the option. Where rows are taken before any
    operator runs, backends that are interpreted would show nothing more."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=case.id, marks=marks_of(case))
            for case in cases(pick=pick, **options)
            if takes(case.info.function, name)
            and (case.info.op in ZEROES or not interpreted(case.backend, case.device))
        ],
    )  # fmt: skip


def kept_of(B: int) -> Tensor:  # [F], B of them True
    """Which rows count of a batch with some more."""
    kept = torch.ones(B + B // 3 + 2, dtype=torch.bool)
    kept[torch.randperm(len(kept), generator=rng(B))[: len(kept) - B]] = False
    return kept


def padded(x: Tensor, kept: Tensor, filler: Any = None, dim: int = -2) -> Tensor:
    """The rows where they count, and elsewhere `filler`: by default what must not be read."""
    dim = 0 if x.dim() == 1 else dim
    shape = list(x.shape)
    shape[dim] = len(kept)
    if filler is None:
        filler = torch.nan if x.is_floating_point() else x.dtype == torch.bool
        filler = filler or torch.iinfo(x.dtype).max
    full = torch.full(shape, filler, dtype=x.dtype, device=x.device)
    if x.is_floating_point() and len(kept) > 1:
        full.select(dim, int((~kept).nonzero()[0])).fill_(torch.inf)
    return full.index_copy(dim, kept.nonzero().squeeze(1).to(x.device), x)


def rows_of(case: Case) -> int:
    return case.sample.args[0].shape[-2]


def by_name(case: Case, args: Sequence[Any]) -> dict[str, Any]:
    return inspect.signature(case.info.function).bind(*args, **case.sample.kwargs).arguments


def mask_of(case: Case, kept: Tensor) -> Tensor:
    first = case.sample.args[0]
    return kept.to(first.device).expand(*first.shape[:-2], len(kept))


def masked(case: Case) -> Case:
    """The case among rows that are masked out; those that count are its arguments still."""
    kept = kept_of(rows_of(case))

    def function(*args: Any, backend: str, **_: Any) -> Tensor:
        named = {
            name: padded(x, kept) if name in ROWS and isinstance(x, Tensor) else x
            for name, x in by_name(case, args).items()
        }
        value = case.info.function(**named, sample_mask=mask_of(case, kept), backend=backend)
        if value.shape != kept.shape or case.sample.kwargs.get("reduction") != "none":
            return value
        assert not value[~kept].any()
        return value[kept]

    return replace(case, info=replace(case.info, function=function))


@each_case_with("sample_mask", dtypes=(torch.float32, torch.float64))
def test_masked_rows_are_not_there(case: Case) -> None:
    if "sample_mask" in case.sample.kwargs:  # its own samples have masks
        return
    assert_within_budget(case, masked(case).errors())


@each_case_with("sample_mask")
def test_gradients_of_masked_rows_are_zero(case: Case) -> None:
    kept = kept_of(rows_of(case))
    named = by_name(case, case.sample.args) | {"sample_mask": mask_of(case, kept)}
    names = [name for name in case.info.diff_args if name in ROWS and named.get(name) is not None]
    for name in ROWS:
        if isinstance(named.get(name), Tensor):
            named[name] = padded(named[name], kept)
    for name in names:
        named[name].requires_grad_()
    loss = case.info.function(**named, backend=case.backend).sum()
    for gradient in torch.autograd.grad(loss, [named[name] for name in names], allow_unused=True):
        if gradient is not None:
            assert not gradient[..., ~kept, :].any()
            assert gradient.isfinite().all()


@each_case_with("sample_mask")
def test_no_row_counts(case: Case) -> None:
    args = leaves(case)
    mask = torch.zeros(args[0].shape[:-1], dtype=torch.bool, device=case.device)
    value = case.call(*args, sample_mask=mask)
    assert not value.any()
    assert not any(gradient.any() for gradient in gradients(value, args))


@each_case_with("sample_mask", pick=lambda found: few(found)[:1])
def test_all_rows_count(case: Case) -> None:
    args = [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in case.sample.args]
    mask = torch.ones(args[0].shape[:-1], dtype=torch.bool, device=case.device)
    torch.testing.assert_close(case.call(*args, sample_mask=mask), case.call(*args))


def _bad_masks() -> list[pytest.param]:
    found = []
    for info in with_option("sample_mask"):
        sample = next(iter(info.samples(torch.device("cpu"), torch.float32)))
        shape = sample.args[0].shape[:-1]
        mask, wanted = torch.ones(shape, dtype=torch.bool), f"must have shape {list(shape)} like"
        for name, bad, error, message in (
            ("list", mask.tolist(), TypeError, "sample_mask must be a torch.Tensor, got list"),
            ("dtype", mask.float(), TypeError, "sample_mask must be torch.bool, got torch.float32"),
            ("rows", mask[..., :-1], ValueError, f"sample_mask {wanted}"),
            ("dims", mask[..., None], ValueError, f"sample_mask {wanted}"),
            ("device", mask.to("meta"), ValueError, "sample_mask must be on cpu like"),
        ):  # fmt: skip
            found.append(pytest.param(info, sample, bad, error, message, id=f"{info.name}-{name}"))
    return found


@pytest.mark.parametrize(("info", "sample", "bad", "error", "message"), _bad_masks())
def test_bad_masks(info: OpInfo, sample: Sample, bad: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        info.function(*sample.args, **sample.kwargs, sample_mask=bad)


def among_ignored(case: Case) -> Case:
    """The case among rows of a label that is ignored, on both sides."""
    kept = kept_of(rows_of(case))

    def function(*args: Any, backend: str, **_: Any) -> Tensor:
        named = by_name(case, args)
        bank = named.get("references")
        kept_of_bank = None if bank is None else kept_of(len(bank))
        if named.get("exclude") is not None:
            places = kept_of_bank.nonzero().squeeze(1).to(bank.device)
            exclude = named["exclude"]
            named["exclude"] = torch.where(exclude < 0, exclude, places[exclude.clamp_min(0)])
        for name, x in named.items():
            which = kept_of_bank if name in ("references", "reference_labels") else kept
            if name in (*ROWS, "references", "reference_labels") and isinstance(x, Tensor):
                named[name] = padded(x, which, IGNORED if "labels" in name else None)
        value = case.info.function(**named, ignore_index=IGNORED, backend=backend)
        return value[kept] if value.dim() == 1 else value

    return replace(case, info=replace(case.info, function=function))


@each_case_with("ignore_index", dtypes=(torch.float32, torch.float64))
def test_ignored_labels_are_not_there(case: Case) -> None:
    assert_within_budget(case, among_ignored(case).errors())


@pytest.mark.parametrize("info", with_option("ignore_index"), ids=lambda info: info.name)
def test_bad_ignored_labels(info: OpInfo) -> None:
    sample = next(iter(info.samples(torch.device("cpu"), torch.float32)))
    for bad, error in ((1.5, TypeError), (True, TypeError), (2**63, ValueError)):
        with pytest.raises(error, match="ignore_index must be"):
            info.function(*sample.args, **sample.kwargs, ignore_index=bad)


def test_minus_one_is_a_class_unless_it_is_ignored() -> None:
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) // 3 - 1
    for function in (kd.triplet_loss, kd.contrastive_loss):
        assert torch.equal(function(x, y), function(x, y + 1))
        assert torch.equal(function(x, y, ignore_index=-1), function(x[3:], y[3:]))
    # a number that the labels' dtype cannot hold is the label of no row
    assert torch.equal(
        kd.triplet_loss(x, y.to(torch.int8), ignore_index=255), kd.triplet_loss(x, y)
    )


def test_unsigned_indices_and_labels_hold_no_minus_one() -> None:
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6)
    mask, last = y % 2 == 0, torch.full_like(y, 255)
    bank = torch.randn(256, 4, dtype=torch.float64)
    for function, args in ((kd.relational_kl, (x, x.flip(0), bank)), (kd.info_nce, (x, bank, y))):
        for exclude in (last, last.masked_fill(~mask, 7)):
            options = {"sample_mask": mask, "reduction": "none"}
            wanted = function(*args, exclude=exclude, **options)
            found = function(*args, exclude=exclude.to(torch.uint8), **options)
            assert torch.equal(found, wanted)
    labels, criterion = torch.tensor([255, 255, 1, 1, 0, 0]), kd.nn.SupConLoss(ignore_index=-1)
    assert torch.equal(criterion(x, labels.to(torch.uint8)), criterion(x, labels))


def test_mined_rows_are_those_of_what_was_given() -> None:
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    mask = torch.arange(12) % 5 != 0
    mined = kd.mine_triplets(x, y, sample_mask=mask, ignore_index=1)
    kept = (mask & (y != 1)).nonzero().squeeze(1)
    wanted = kd.mine_triplets(x[kept], y[kept])
    for found, of_kept in zip(mined[:3], wanted[:3], strict=True):
        assert torch.equal(found, kept[of_kept])
    assert torch.equal(mined.d_ap, wanted.d_ap)
    mined = kd.mine_triplets(
        x, y, references=x + 1, reference_labels=y, sample_mask=mask, ignore_index=1
    )
    bank = (y != 1).nonzero().squeeze(1)
    wanted = kd.mine_triplets(x[kept], y[kept], references=x[bank] + 1, reference_labels=y[bank])
    assert torch.equal(mined.anchors, kept[wanted.anchors])
    assert torch.equal(mined.negatives, bank[wanted.negatives])


def test_each_group_has_rows_of_its_own() -> None:
    student, teacher = (torch.randn(2, 2, 7, D, dtype=torch.float64) for D in (3, 4))
    mask = torch.arange(7) < torch.tensor([[7, 3], [1, 0]])[..., None]

    def each(reduction: str) -> Tensor:
        return torch.stack([
            kd.gram_mse(s[m], t[m], reduction=reduction)
            for s, t, m in zip(*(x.flatten(0, 1) for x in (student, teacher, mask)), strict=True)
        ])  # fmt: skip

    def found(reduction: str) -> Tensor:
        return kd.gram_mse(student, teacher, sample_mask=mask, reduction=reduction)

    torch.testing.assert_close(found("none"), each("mean").view(2, 2))
    torch.testing.assert_close(found("sum"), each("sum").sum())
    torch.testing.assert_close(found("mean"), each("mean").sum() / 3)  # one group has no rows


@pytest.mark.parametrize("info", with_option("sample_mask"), ids=lambda info: info.name)
def test_compiled(info: OpInfo) -> None:
    """A mask that selects rows stops a graph, in words that name it; other masks are in it."""
    sample = few(tuple(info.samples(torch.device("cpu"), torch.float32)))[0]
    mask = torch.arange(sample.args[0].shape[-2]) % 3 > 0

    def call(x: Tensor, mask: Tensor) -> Tensor:
        options = {**sample.kwargs, "sample_mask": mask, "backend": "reference"}
        return info.function(x, *sample.args[1:], **options) * 3

    x, wanted = sample.args[0], call(sample.args[0], mask)
    torch._dynamo.reset()
    if info.op in ZEROES:
        assert torch.equal(
            torch.compile(call, fullgraph=True, backend="aot_eager")(x, mask), wanted
        )
        return
    with pytest.raises(RuntimeError, match="sample_mask and ignore_index"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(x, mask)
    assert torch.equal(torch.compile(call, backend="aot_eager")(x, mask), wanted)


@pytest.mark.parametrize("info", with_option("sample_mask"), ids=lambda info: info.name)
def test_explained_without_reading_the_mask(info: OpInfo) -> None:
    sample = next(iter(info.samples(torch.device("cpu"), torch.float32)))
    mask = torch.empty(sample.args[0].shape[:-1], dtype=torch.bool, device="meta")
    args = [arg.to("meta") if isinstance(arg, Tensor) else arg for arg in sample.args]
    kwargs = sample.kwargs | {"sample_mask": mask}
    assert kd.explain(info.public, *args, **kwargs).backend == "reference"


def _modules(name: str) -> list[str]:
    """Those whose forward, or whose constructor, takes the option."""
    found = []
    for case, made in CASES.items():
        module = made.make()
        # its mask is about one of its two terms: tests/nn/test_lsh.py
        if isinstance(module, kd.nn.LSHFeatureMimickingLoss):
            continue
        if takes(module.forward, name) or takes(type(module).__init__, name):
            found.append(case)
    return found


MASKED, IGNORING = _modules("sample_mask"), _modules("ignore_index")


def test_which_modules_take_masks() -> None:
    """IntraUtteranceSimilarityLoss has a mask of frames."""
    without = {name.partition(" ")[0] for name in set(CASES) - set(MASKED)}
    assert without == {"InfoNCELoss", "IntraUtteranceSimilarityLoss", "LSHFeatureMimickingLoss"}
    labelled = {name for name, case in CASES.items() if takes(case.make().forward, "labels")}
    assert set(IGNORING) == labelled


def _loss(module: nn.Module, args: Sequence[Any], **options: Any) -> Tensor:
    torch.manual_seed(0)  # negatives may be drawn
    return module(*args, **options)


def _assert_not_there(
    module: nn.Module, args: Sequence[Tensor], filler: Any, **options: Any
) -> None:
    """That rows which are there beside `args` do not count, under options made of their mask: not
    for the loss, the gradients, nor for what the module keeps."""
    kept = kept_of(len(args[0]))
    args = [x.detach() for x in args]
    args[0].requires_grad_()
    full = [padded(x, kept, None if x.is_floating_point() else filler, dim=0) for x in args]
    full[0] = full[0].detach().requires_grad_()
    masks = {name: value(kept) for name, value in options.items()}
    other = copy.deepcopy(module)
    loss, wanted = _loss(module, full, **masks), _loss(other, args)
    torch.testing.assert_close(loss, wanted)
    found, expected = (
        torch.autograd.grad(
            of.sum(), [student, *(p for p in owner.parameters() if p.requires_grad)]
        )
        for of, student, owner in ((loss, full[0], module), (wanted, args[0], other))
    )
    torch.testing.assert_close(found[0][kept], expected[0])
    assert not found[0][~kept].any()
    torch.testing.assert_close(found[1:], expected[1:])
    torch.testing.assert_close(dict(module.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("name", [name for name in MASKED if not name.endswith("sskd")])
def test_rows_that_a_module_leaves_out(name: str) -> None:
    case = CASES[name]
    _assert_not_there(case.make().double(), case.inputs(7), None, sample_mask=lambda kept: kept)


def test_views_of_an_image_belong_together() -> None:
    student = torch.randn(8, 3)
    with pytest.raises(ValueError, match="sample_mask must be None for preset 'sskd'"):
        kd.nn.SimilarityDistillationLoss(preset="sskd")(
            student, student, sample_mask=torch.ones(8, dtype=torch.bool)
        )


@pytest.mark.parametrize("name", IGNORING)
def test_labels_that_a_module_ignores(name: str) -> None:
    case = CASES[name]
    module = case.make()
    module.ignore_index = IGNORED
    _assert_not_there(module, case.inputs(7), IGNORED)
    with pytest.raises(TypeError, match="ignore_index must be an integer, got str"):
        type(module)(ignore_index="-1")


@pytest.mark.parametrize("preset", ["default", "torchreid"])
@pytest.mark.parametrize("reduction", ["none", "mean_batch"])
def test_losses_of_anchors_that_do_not_count(preset: str, reduction: str) -> None:
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.arange(9) % 3
    mask = torch.arange(9) % 4 > 0
    module = kd.nn.BatchHardTripletLoss(preset, margin=5.0, reduction=reduction)
    loss, wanted = module(x, y, sample_mask=mask), module(x[mask], y[mask])
    if reduction == "none":
        assert not loss[~mask].any()
        loss = loss[mask]
    torch.testing.assert_close(loss, wanted)


def test_frames_that_do_not_count() -> None:
    lengths = torch.tensor([7, 4, 0])
    mask = torch.arange(9) < lengths[:, None]
    student, teacher = (torch.randn(3, 9, D, dtype=torch.float64) for D in (4, 5))
    student.requires_grad_()
    module = kd.nn.IntraUtteranceSimilarityLoss()
    each = [module(student[u : u + 1, :n], teacher[u : u + 1, :n]) for u, n in ((0, 7), (1, 4))]
    broken = torch.where(mask[..., None], student, torch.nan)
    loss = module(broken, teacher.masked_fill(~mask[..., None], torch.inf), frame_mask=mask)
    assert_same_loss(loss, torch.stack(each).mean(), student)
    with pytest.raises(ValueError, match=r"frame_mask must have shape \[3, 9\] like the rows of"):
        module(student, teacher, frame_mask=mask[0])
