# SPDX-License-Identifier: Apache-2.0
"""Samples, bad inputs, workloads and cost of sampled_similarity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kdkernels import reference as definitions
from kdkernels.ops.sampled_similarity import sampled_similarity
from kdkernels.testing.opinfo import (
    BadInput,
    BenchShape,
    Cost,
    OpInfo,
    Product,
    Sample,
    randn,
    rng,
)

# (B, D, N, K). Where K is a large part of N, and B is not small, all products may be cheaper than
# the gathered rows.
SHAPES = {
    "tiny": (2, 3, 4, 5),
    "aligned": (64, 32, 64, 16),
    "ragged_rows": (67, 16, 200, 8),
    "ragged_cols": (32, 37, 53, 29),
    "ragged_all": (71, 13, 290, 11),
    "one_row": (1, 7, 12, 5),
    "one_col": (19, 1, 9, 4),
    "one_key": (17, 5, 1, 3),
    "wide": (7, 211, 17, 23),
    "many_keys": (2, 5, 50, 1051),
    "empty": (0, 4, 11, 3),
    "no_indices": (5, 4, 6, 0),
    "no_features": (9, 0, 6, 9),
}


def _draw(
    B: int, D: int, N: int, K: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    x, bank = (
        randn(rows, D, seed=seed, device=device, dtype=dtype) for seed, rows in ((1, B), (2, N))
    )
    return x, bank, torch.randint(N, (B, K), generator=rng(3)).to(device)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    for name, shape in SHAPES.items():
        yield Sample(name, _draw(*shape, device, dtype))
    x, bank, indices = _draw(46, 12, 35, 38, device, dtype)
    strided = (x.T.contiguous().T[::2], bank.T.contiguous().T, indices[::2, ::2])
    yield Sample("strided", strided)
    # many rows of which few are named, in memory that holds more columns; D with and without rest
    for name, of in (("padded_bank", (9, 64, 700, 5)), ("ragged_padded_bank", (17, 45, 600, 6))):
        x_wide, bank_wide, named = _draw(*of, device, dtype)
        yield Sample(name, (x_wide, torch.cat([bank_wide, bank_wide], 1)[:, : of[1]], named))
    yield Sample("int32_indices", (x[:5], bank, indices[:5].int()))
    yield Sample("one_row_often", (x[:5], bank, torch.zeros_like(indices[:5])))


def bad_inputs(device: torch.device) -> Iterator[BadInput]:
    x, bank = torch.ones(8, 4, device=device), torch.ones(12, 4, device=device)
    i = torch.zeros(8, 3, dtype=torch.int64, device=device)

    def bad(name: str, args: Any, error: type[Exception], message: str, **kw: Any) -> BadInput:
        return BadInput(name, args, kw, error, message)

    yield bad("one_dim", (x[0], bank, i), ValueError, "x must have at least 2 dimensions")
    yield bad("three_dims", (x, bank[None], i), ValueError, "bank must have 2 dimensions")
    yield bad("integer", (x.long(), bank, i), TypeError, "x must be float16, bfloat16, float32 or")
    yield bad("width", (x, bank[:, :3], i), ValueError, "bank must have 4 columns like x, got 3")
    yield bad("no_rows", (x, bank[:0], i), ValueError, "bank must have at least 1 row, got shape")
    yield bad("device", (x, bank.to("meta"), i), ValueError, f"bank must be on {x.device} like x")
    yield bad(
        "gradient",
        (x, bank.clone().requires_grad_(), i),
        ValueError,
        "bank must not require a gradient, which is implemented for x only",
    )
    yield bad("indices_list", (x, bank, [[0]]), TypeError, "indices must be a torch.Tensor, got")
    yield bad("indices_dtype", (x, bank, i > 0), TypeError, "indices must be an integer tensor")
    yield bad("indices_device", (x, bank, i.to("meta")), ValueError, "indices must be on")
    for name, wrong in (("dims", i[0]), ("rows", i[:7])):
        message = f"indices must have shape [8, K], a row per row of x, got {list(wrong.shape)}"
        yield bad(f"indices_{name}", (x, bank, wrong), ValueError, message)
    if device.type == "cpu":
        for name, by in (("high", 12), ("low", -1)):
            message = f"indices must be from 0 to 11, got {by}"
            yield bad(f"indices_{name}", (x, bank, i + by), ValueError, message)
    yield bad("backend", (x, bank, i), ValueError, "backend must be one of", backend="gpu")


def _shape(name: str, B: int, N: int, K: int, workload: str) -> BenchShape:
    return BenchShape(name, {"B": B, "D": 128, "N": N, "K": K}, workload)


BENCH = (
    _shape("small", 16, 1000, 65, "small enough for eager mode"),
    _shape("crd", 64, 50000, 16385, "CRD on CIFAR-100: a third of the memory for every sample"),
    _shape("crd_sparse", 64, 50000, 1025, "the same with few negatives: too few for all products"),
    _shape("crd_imagenet", 256, 1281167, 4097, "a memory of the size of ImageNet"),
)


def bench_sample(shape: BenchShape, device: torch.device, dtype: torch.dtype) -> Sample:
    sizes = (shape.sizes[name] for name in "BDNK")
    return Sample(shape.name, _draw(*sizes, device, dtype), dict(shape.kwargs))


def _all_products(x: Tensor, bank: Tensor, indices: Tensor) -> Tensor:
    return x @ bank.mT


def _all_products_flops(x: Tensor, bank: Tensor, indices: Tensor) -> float:
    return 2.0 * x.numel() * len(bank)


def cost(shape: BenchShape, dtype: torch.dtype) -> Cost:
    """Each named row once forward and once backward; the bank is read once where it fits a cache;
    scores and their gradient, and indices twice."""
    B, D, N, K = (shape.sizes[name] for name in "BDNK")
    rows = min(N, B * K) * D + 2 * B * D
    return Cost(flops=4.0 * B * K * D, bytes=2.0 * rows * dtype.itemsize + B * K * (8 + 16))


def memory(shape: BenchShape, dtype: torch.dtype, variant: str) -> float:
    """The gathered rows, or products with the whole bank, and scores."""
    B, D, N, K = (shape.sizes[name] for name in "BDNK")
    acc = 8 if dtype == torch.float64 else 4
    if variant == "mm":
        return B * N * dtype.itemsize
    scores = 2 * B * K * acc
    # where all products are made, a bank in half precision is widened for them
    wide = N * D * acc if dtype.itemsize < acc and N <= 9 * K else 0
    if variant in ("eager", "compile", "reference"):
        return B * K * D * acc + scores
    if variant == "dense-in-torch":
        return 2 * B * N * acc + scores
    return scores + wide + (1 << 25)


OPINFOS = [
    OpInfo(
        name="sampled_similarity",
        op="sampled_similarity",
        function=sampled_similarity,
        definition=definitions.sampled_similarity,
        diff_args=("x",),
        samples=samples,
        bad_inputs=bad_inputs,
        bench=BENCH,
        bench_sample=bench_sample,
        cost=cost,
        memory=memory,
        product=Product(_all_products, _all_products_flops),
        peers=("dense-in-torch",),
    )
]
