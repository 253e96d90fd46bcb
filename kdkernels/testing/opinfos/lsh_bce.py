# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of lsh_bce."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import reference as definitions
from kdkernels.ops.lsh_bce import lsh_bce
from kdkernels.reference import _lsh_bce as reference
from kdkernels.testing.opinfo import (
    BadInput,
    BenchShape,
    Cost,
    Eager,
    OpInfo,
    Product,
    Sample,
    randn,
)

# (B, D, N); bits beyond one tile of a kernel, and numbers of them that fill no byte
SHAPES = {
    "tiny": (2, 3, 1),
    "aligned": (64, 32, 64),
    "ragged_rows": (67, 16, 32),
    "ragged_cols": (32, 37, 53),
    "ragged_all": (71, 13, 29),
    "one_row": (1, 7, 12),
    "one_col": (19, 1, 9),
    "one_bit": (9, 5, 1),
    "wide": (7, 211, 173),
    "many_bits": (5, 3, 1031),
}


def _draw(
    B: int, D: int, N: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Projections of order two, and codes of a teacher that resembles the student."""
    cpu, double = torch.device("cpu"), torch.float64
    student = 2 * randn(B, D, seed=1, device=cpu, dtype=double)
    weight = randn(N, D, seed=2, device=cpu, dtype=double) / max(D, 1) ** 0.5
    bias = 0.5 * randn(N, seed=3, device=cpu, dtype=double)
    teacher = student + 2 * randn(B, D, seed=4, device=cpu, dtype=double)
    codes = reference.lsh_encode(teacher, weight, bias).to(device)
    s, w, b = (x.to(device, dtype) for x in (student, weight, bias))
    return s, codes, w, b


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    def draw(*shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _draw(*shape, device, dtype)

    for name, shape in SHAPES.items():
        yield Sample(name, draw(*shape))
    yield Sample("no_bias", draw(23, 11, 21)[:3], {"bias": None})
    for reduction in ("sum", "none"):
        yield Sample(reduction, draw(13, 6, 19), {"reduction": reduction})
    masks = {
        "some": torch.arange(17) % 3 != 1,
        "first_left_out": torch.arange(17) > 0,
        "no_sample": torch.zeros(17, dtype=torch.bool),
    }
    for name, mask in masks.items():
        yield Sample(f"mask-{name}", draw(17, 5, 26), {"sample_mask": mask.to(device)})
        options = {"sample_mask": mask.to(device), "reduction": "none"}
        yield Sample(f"mask-{name}-none", draw(17, 5, 26), options)
    s, codes, w, b = draw(46, 12, 35)
    twice = torch.cat([codes, codes], 1)[:, : codes.shape[1]]
    yield Sample("strided", (s.T.contiguous().T[::2], twice[::2], w.T.contiguous().T, b))
    yield Sample("empty", draw(0, 4, 6))
    yield Sample("no_bits", draw(5, 4, 0))
    yield Sample("no_features", draw(5, 0, 11))
    large = 1e4 if dtype in (torch.float32, torch.float64) else 30.0
    yield Sample("large", (s * large, codes, w, b))
    yield Sample("on_the_hyperplanes", (s * 0, codes, w, b * 0))


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    x = torch.ones(8, 4, device=device)
    w, b = torch.ones(12, 4, device=device), torch.ones(12, device=device)
    codes = torch.zeros(8, 2, dtype=torch.uint8, device=device)
    mask = torch.ones(8, dtype=torch.bool, device=device)

    def bad(
        name: str, args: tuple[Any, ...], error: type[Exception], message: str, **kwargs: Any
    ) -> BadInput:
        return BadInput(name, args, kwargs, error, message)

    yield bad("one_dim", (x[0], codes, w), ValueError, "student must have at least 2 dimensions")
    yield bad(
        "three_dims", (x[None], codes, w), ValueError, "student must have 2 dimensions, got shape"
    )
    yield bad("weight_dims", (x, codes, w[0]), ValueError, "weight must have at least 2 dimensions")
    yield bad(
        "width", (x, codes, w[:, :3]), ValueError, "weight must have 4 columns like student, got 3"
    )
    yield bad(
        "integer",
        (x.long(), codes, w),
        TypeError,
        "student must be float16, bfloat16, float32 or float64, got torch.int64",
    )
    yield bad(
        "bias_length", (x, codes, w, b[:7]), ValueError, "bias must have shape [12] like the rows"
    )
    yield bad("bias_number", (x, codes, w, 0.0), TypeError, "bias must be a torch.Tensor")
    yield bad(
        "float_codes",
        (x, codes.float(), w),
        TypeError,
        "codes must be packed bits in torch.uint8, got torch.float32",
    )
    yield bad(
        "bool_codes",
        (x, torch.ones(8, 12, dtype=torch.bool, device=device), w),
        TypeError,
        "codes must be packed bits in torch.uint8, got torch.bool",
    )
    yield bad("code_list", (x, [[0]], w), TypeError, "codes must be a torch.Tensor, got list")
    yield bad(
        "code_width", (x, codes[:, :1], w), ValueError, "codes must have shape [8, 2] (rows of"
    )
    yield bad("code_rows", (x, codes[:7], w), ValueError, "codes must have shape [8, 2] (rows of")
    yield bad(
        "mask_dtype",
        (x, codes, w),
        TypeError,
        "sample_mask must be torch.bool, got torch.float32",
        sample_mask=mask.float(),
    )
    yield bad(
        "mask_shape",
        (x, codes, w),
        ValueError,
        "sample_mask must have shape [8] like the rows of student, got [7]",
        sample_mask=mask[:7],
    )
    yield bad(
        "mask_list",
        (x, codes, w),
        TypeError,
        "sample_mask must be a torch.Tensor, got list",
        sample_mask=[True] * 8,
    )
    for name, args in {
        "weight": (x, codes, w.to("meta")),
        "bias": (x, codes, w, b.to("meta")),
        "codes": (x, codes.to("meta"), w),
    }.items():
        message = f"{name} must be on {x.device} like student, got meta"
        yield bad(f"{name}_device", args, ValueError, message)
    yield bad("reduction", (x, codes, w), ValueError, "reduction must be one of", reduction="max")
    yield bad("backend", (x, codes, w), ValueError, "backend must be one of", backend="gpu")


def _shape(
    name: str, B: int, D: int, N: int, workload: str, device: str | None = None
) -> BenchShape:
    return BenchShape(name, {"B": B, "D": D, "N": N}, workload, device=device)


BENCH = (
    _shape(
        "voc07", 16, 512, 2048, "VOC07 multi-label, pooled ResNet-34 features, 4 bits per feature"
    ),
    _shape("resnet56", 64, 64, 2048, "CIFAR-100 features of a ResNet-56, 32 bits per feature"),
    _shape("vgg13", 64, 512, 16384, "CIFAR-100 features of a VGG-13, 32 bits per feature"),
    _shape("imagenet", 256, 512, 2048, "pooled ResNet-34 features, the ImageNet setting"),
    _shape("proposals", 2048, 1024, 4096, "box-head features of Faster R-CNN, 512 per image"),
    _shape("pooled", 4096, 512, 2048, "pooled ResNet-18/34 features at large batch"),
    _shape("resnet50", 64, 2048, 65536, "CIFAR-100 features of a ResNet-50, 32 bits per feature"),
    _shape("pooled_2048", 4096, 2048, 2048, "pooled ResNet-50 features at large batch", "cuda"),
)


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    B, D, N = (shape.sizes[name] for name in "BDN")
    student, weight = (
        randn(rows, D, seed=seed, device=device, dtype=dtype) for seed, rows in ((1, B), (2, N))
    )
    weight *= 0.06  # the standard deviation of the ImageNet setting
    # by the product that an eager baseline repeats: no projection near 0 may change sides
    codes = reference.lsh_encode(bench_teacher(student), weight)
    return Sample(shape.name, (student, codes, weight), dict(shape.kwargs))


def bench_teacher(student: Tensor) -> Tensor:
    """Features of the teacher whose codes `bench_sample` holds, [B, D]."""
    return randn(*student.shape, seed=3, device=student.device, dtype=student.dtype)


def _with_targets(sample: Sample) -> Sample:
    """The sample with float targets, [B, N], in place of the codes."""
    student, codes, weight = sample.args
    targets = reference.unpack(codes, len(weight)).to(student.dtype)
    return Sample(sample.name, (student, targets, weight), sample.kwargs)


def _on_targets(sample: Sample) -> Callable[..., Tensor]:
    """The mean cross-entropy as a user writes it who keeps float targets."""
    if sample.kwargs:
        raise ValueError(f"sample must have no option, got {sample.kwargs}")
    return lambda student, targets, weight: F.binary_cross_entropy_with_logits(
        F.linear(student, weight), targets
    )


def _two_products(student: Tensor, codes: Tensor, weight: Tensor) -> Tensor:
    """Projections, and what stands in for their derivatives, back to the features."""
    return (student @ weight.mT) @ weight


def _two_products_flops(student: Tensor, codes: Tensor, weight: Tensor) -> float:
    return 4.0 * student.numel() * len(weight)


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    """Two products; one read of features, weight and bits, one write of the gradient."""
    B, D, N = (shape.sizes[name] for name in "BDN")
    return Cost(flops=4.0 * B * D * N, bytes=(2.0 * B * D + N * D) * dtype.itemsize + B * N / 8)


EAGER_TILES = 5  # B x N matrices that the definition with autograd holds at its peak
SLOW = ("eager", "compile", "reference", "eager-with-teacher")


def memory(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
    """B x N matrices alive at once, in the dtype that a variant computes in, and the gradients."""
    B, D, N = (shape.sizes[name] for name in "BDN")
    if variant == "mm":
        return (B * N + B * D) * dtype.itemsize
    acc = 8 if dtype == torch.float64 else 4
    tiles = EAGER_TILES * B * N if variant in SLOW else 0
    wide = N * D if dtype.itemsize < acc else 0
    return (tiles + 4 * B * D + wide) * acc


OPINFOS = [
    OpInfo(
        name="lsh_bce",
        op="lsh_bce",
        function=lsh_bce,
        definition=definitions.lsh_bce,
        diff_args=("student", "weight", "bias"),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=bench_sample,
        cost=cost,
        memory=memory,
        eager=Eager(_on_targets, _with_targets),
        product=Product(_two_products, _two_products_flops),
        peers=("eager-with-teacher",),
    )
]
