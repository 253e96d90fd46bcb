# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs and workloads that the losses of labelled embeddings share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.reference._distances import distances
from kdkernels.reference._labelled import sides
from kdkernels.testing.opinfo import BadInput, BenchShape, Eager, Sample, randn, rng

# Least relative difference of two distances that no fp32 kernel confuses, by a factor of ten or so.
CLEAR = 2e-6

# (B, D, classes)
SHAPES = {
    "tiny": (4, 2, 2),
    "aligned": (64, 32, 8),
    "ragged_rows": (67, 32, 7),
    "ragged_cols": (64, 37, 16),
    "ragged_all": (71, 13, 9),
    "one_row": (1, 7, 1),
    "one_col": (19, 1, 4),
    "wide": (7, 211, 3),
}


def labelled(
    B: int, D: int, classes: int, device: torch.device, dtype: torch.dtype, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Embeddings and labels, of which some are negative."""
    labels = torch.randint(classes, (B,), generator=rng(seed)) * 7 - 3
    return randn(B, D, seed=seed, device=device, dtype=dtype), labels.to(device)


def _sides_of(sample: Sample) -> tuple[Tensor, Tensor, Tensor, Tensor, bool, str]:
    """The rows of a sample in fp64, whether they are in one batch, and its distance."""
    options = {"distance": "euclidean", "normalize_embeddings": True} | sample.kwargs
    divide = options["normalize_embeddings"] or options["distance"] == "cosine"
    bank = options.get("references")
    bank = None if bank is None else bank.double()
    rows, labels = sample.args[0].double(), sample.args[1]
    found = sides(rows, labels, bank, options.get("reference_labels"), divide=divide)
    return *found.rows, found.in_batch, options["distance"]


def clear_of_kinks(sample: Sample) -> bool:
    """Whether no triplet is so close to where a hinge bends, or a semihard negative begins, that
    rounding would decide on which side it is."""
    x, y, r, r_y, in_batch, distance = _sides_of(sample)
    d = distances(x, r, distance)
    same = y[:, None] == r_y[None]
    positive = same & ~torch.eye(len(y), dtype=torch.bool, device=y.device) if in_batch else same
    gaps = (d[:, :, None] - d[:, None, :])[positive[:, :, None] & ~same[:, None, :]]
    gaps = torch.cat((gaps, gaps + sample.kwargs.get("margin", 0.2))).abs()
    return bool((gaps > CLEAR * d.max()).all()) if gaps.numel() else True


def near_best(
    key: Tensor,  # [B, M]
    allowed: Tensor,  # [B, M]
) -> Tensor:  # [B, M]
    """Whether a candidate's key is so close to the least that rounding would decide between it and
    others."""
    if key.numel() == 0:
        return allowed
    ranked = torch.where(allowed, key, torch.inf)
    near = allowed & (ranked <= ranked.amin(1, keepdim=True) + CLEAR * key.abs().max())
    return near & (near.sum(1, keepdim=True) > 1)


def contested(sample: Sample) -> Tensor:  # [B]
    """Which embeddings get a gradient that depends on a choice between candidates at almost the
    same distance, where the hardest positive and negative are chosen."""
    x, y, r, r_y, in_batch, distance = _sides_of(sample)
    d = distances(x, r, distance)
    same = y[:, None] == r_y[None]
    others = ~torch.eye(len(y), dtype=torch.bool, device=y.device) if in_batch else same | ~same
    doubtful = near_best(-d, same & others) | near_best(d, ~same)
    anchors = doubtful.any(1)
    return anchors | doubtful.any(0) if in_batch else anchors


def first(draw: Callable[[int], Sample], accept: Callable[[Sample], bool] | None) -> int:
    """The first seed whose sample is accepted."""
    return next(seed for seed in itertools.count(1) if accept is None or accept(draw(seed)))


def magnitude(sample: Sample) -> tuple[float, tuple[None]]:
    """Size of the distances whose difference the loss of a triplet is; of a sum, those of all
    anchors."""
    x, _, r, _, _, distance = _sides_of(sample)
    d = distances(x, r, distance)
    if d.numel() == 0:
        return 0.0, (None,)
    of_anchors = d.amax(1)
    summed = sample.kwargs.get("reduction") == "sum"
    return (of_anchors.sum() if summed else of_anchors.max()).item(), (None,)


def samples(
    device: torch.device,
    dtype: torch.dtype,
    forms: tuple[dict[str, Any], ...],
    referred: tuple[dict[str, Any], ...],
    accept: Callable[[Sample], bool] | None = None,
    **always: Any,
) -> Iterator[Sample]:
    """Every shape; then each of the forms, and with references each of `referred`."""

    cpu = torch.device("cpu")

    def batch(name: str, shape: tuple[int, int, int], change: Any = None, **options: Any) -> Sample:
        def draw(seed: int, device: torch.device = cpu) -> Sample:
            x, y = labelled(*shape, device, dtype, seed)
            return Sample(name, (x, y) if change is None else change(x, y), always | options)

        return draw(first(draw, accept), device)

    def referring(form: dict[str, Any]) -> Sample:
        def draw(seed: int, device: torch.device = cpu) -> Sample:
            bank, bank_labels = labelled(21, 24, 5, device, dtype, seed + 1)
            options = always | {"references": bank, "reference_labels": bank_labels} | form
            name = "-".join(("references", *map(str, form.values())))
            return Sample(name, labelled(34, 24, 4, device, dtype, seed), options)

        return draw(first(draw, accept), device)

    def excluding(form: dict[str, Any]) -> Sample:
        """References that hold most of the anchors, which leave out themselves."""
        B, M = 34, 55
        form = always | form

        def draw(seed: int, device: torch.device = cpu) -> Sample:
            rows, labels = labelled(M, 24, 5, device, dtype, seed)
            place = torch.randperm(M, generator=rng(seed + 1))
            exclude, others = place.argsort()[:B], rows.clone()
            # an anchor beside its own copy would be where distances have no derivative
            others[:B:5], others[1] = others[:B:5].flip(1), others[1].flip(0)
            exclude[::5], exclude[1] = -1, 40
            options = {
                "references": others[place], "reference_labels": labels[place],
                "exclude": exclude.to(device),
            }  # fmt: skip
            name = "-".join(("exclude", *map(str, form.values())))
            return Sample(name, (rows[:B], labels[:B]), form | options)

        return draw(first(draw, accept), device)

    for name, shape in SHAPES.items():
        # a unit vector of one component cannot move
        yield batch(name, shape, **({"normalize_embeddings": False} if shape[1] == 1 else {}))
    for form in forms:
        yield batch("-".join(str(value) for value in form.values()), (37, 11, 5), **form)
    for form in referred:
        yield referring(form)
        yield excluding(form)
    other = (46, 24, 5)
    yield batch("strided", other, lambda x, y: (x.T.contiguous().T[::2, ::2], y[::2]))
    yield batch("int8_labels", other, lambda x, y: (x, y.to(torch.int8)))
    yield batch("one_class", other, lambda x, y: (x, torch.zeros_like(y)))
    yield batch("all_distinct", other, lambda x, y: (x, torch.arange(len(y), device=y.device)))
    yield batch("empty", (0, 4, 1))


def bad_inputs(device: torch.device, **always: Any) -> Iterator[BadInput]:
    x, y = torch.ones(8, 4, device=device), torch.arange(8, device=device) // 2

    def bad(name: str, args: Any, error: type[Exception], message: str, **kw: Any) -> BadInput:
        return BadInput(name, args, always | kw, error, message)

    yield bad("float_labels", (x, y.float()), TypeError, "labels must be an integer tensor")
    yield bad("label_count", (x, y[:7]), ValueError, "labels must have shape [8]")
    yield bad("label_dims", (x, y[:, None]), ValueError, "labels must have shape [8]")
    yield bad("label_list", (x, y.tolist()), TypeError, "labels must be a torch.Tensor")
    yield bad("dims", (x[None], y), ValueError, "embeddings must have 2 dimensions")
    yield bad("integer", (x.long(), y), TypeError, "embeddings must be float16")
    yield bad("no_labels", (x, y), ValueError, "reference_labels must be given", references=x)
    yield bad("no_references", (x, y), ValueError, "references must be", reference_labels=y)
    narrow: dict[str, Any] = {"references": x[:, :3], "reference_labels": y}
    yield bad("columns", (x, y), ValueError, "references must have 4 columns", **narrow)
    bank: dict[str, Any] = {"references": x, "reference_labels": y}
    yield bad("own", (x, y), ValueError, "exclude must be None without references", exclude=y)
    yield bad("excluded", (x, y), ValueError, "exclude must have shape [8]", exclude=y[:7], **bank)
    float_index = bank | {"exclude": y.float()}
    yield bad("float_index", (x, y), TypeError, "exclude must be an integer tensor", **float_index)
    if device.type == "cpu":  # indices elsewhere are not looked at
        beyond = bank | {"exclude": y + 5}
        yield bad("beyond", (x, y), ValueError, "exclude must be from -1 to 7, got 8", **beyond)
    yield bad("margin", (x, y), ValueError, "margin must be", margin=-0.1)
    yield bad("margin_nan", (x, y), ValueError, "margin must be", margin=float("nan"))
    yield bad("margin_type", (x, y), TypeError, "margin must be a number", margin="0.2")
    yield bad("distance", (x, y), ValueError, "distance must be one of", distance="l1")
    yield bad("reduction", (x, y), ValueError, "reduction must be one of", reduction="max")
    yield bad("backend", (x, y), ValueError, "backend must be one of", backend="gpu")


def shape(
    name: str,
    B: int,
    D: int,
    classes: int,
    workload: str,
    device: str | None = None,
    **options: Any,
) -> BenchShape:
    return BenchShape(name, {"B": B, "D": D, "classes": classes}, workload, options, device)


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    """Classes of equal size, in no order."""
    B, D, classes = (shape.sizes[name] for name in ("B", "D", "classes"))
    labels = torch.randperm(B, generator=rng(2)) % classes
    x = randn(B, D, seed=1, device=device, dtype=dtype)
    return Sample(shape.name, (x, labels.to(device)), dict(shape.kwargs))


def eager(loss: Callable[..., Tensor]) -> Eager:
    """As users write it: `loss(distances of the unit rows, same label, is another row, options)`,
    with distances from a product."""

    def function(sample: Sample) -> Callable[..., Tensor]:
        def call(x: Tensor, y: Tensor) -> Tensor:
            x = F.normalize(x, dim=-1)
            other = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
            return loss(torch.cdist(x, x), y[:, None] == y[None], other, **sample.kwargs)

        return call

    return Eager(function, prepare=lambda sample: sample)


def memory(
    squares: float, slow: tuple[str, ...] = ()
) -> Callable[[BenchShape, torch.dtype, str], float]:
    """Of a loss whose baselines hold so many B x B matrices; `slow` names peers that do too."""

    def needed(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
        B, D = shape.sizes["B"], shape.sizes["D"]
        if variant in ("mm", "reference", "eager", "compile", *slow):
            return (1 if variant == "mm" else squares) * B * B * dtype.itemsize
        return 8.0 * B * D * dtype.itemsize

    return needed
