# SPDX-License-Identifier: Apache-2.0
"""Counts how many distances the GPU kernels compute again from differences of rows.

    TRITON_INTERPRET=1 python -m kdkernels.testing.close_tiles > benchmarks/results/close_tiles.json

What is counted is the kernels' own criterion on the rows that they multiply: Triton takes a tile
again that holds one close pair, as the kernel of `triplet_all` in CUDA does, and the other CUDA
kernels take the pair. "before" is the criterion on rows as given, 1/16 of |x|^2 + |y|^2 in every
dtype.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from kdkernels.triton.common.centre import Rows, centred

B = 512
CUDA_TILE = 128, 128
# Features; the share of rows of 16 bits depends on their number.
SIZES = {torch.float32: (128,), torch.bfloat16: (128, 512), torch.float16: (128, 512)}


def _cosine(cosine: float) -> Callable[[Tensor], Tensor]:
    """Rows whose directions have this mean cosine, around a point that all share."""

    def make(noise: Tensor) -> Tensor:
        centre = torch.linspace(-1, 1, noise.shape[1], dtype=torch.float64).sign()
        return centre + noise * (1 / cosine - 1) ** 0.5

    return make


def _clusters(noise: Tensor) -> Tensor:
    """Classes of 32 rows in the order of their labels, spread a tenth as far as their centres."""
    centres = noise[: len(noise) // 32].repeat_interleave(32, 0)
    return centres + 0.1 * noise.flip(0)


DATA: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda noise: noise,
    "clusters": _clusters,
    "after a ReLU, around 1 (deviation 0.3)": lambda noise: torch.relu(1 + 0.3 * noise),
    "mean cosine 0.9": _cosine(0.9),
    "mean cosine 0.95": _cosine(0.95),
    "mean cosine 0.99": _cosine(0.99),
    "mean cosine 0.999": _cosine(0.999),
    "mean cosine 0.9999": _cosine(0.9999),
    "clusters around a point, mean cosine 0.99": lambda noise: _cosine(0.99)(_clusters(noise)),
}


def close_share(dtype: torch.dtype, D: int) -> float:
    """That of `kdkernels.triton.common.distances`, and of csrc/common/cuda/centre.h."""
    if dtype == torch.float32:
        return 1 / 16
    return min((2 + D / 4) * 2.0**-23 / torch.finfo(dtype).eps, 1 / 16)


def _close(rows: Rows, share: float) -> Tensor:  # [B, B] bool
    """Of different rows, which pairs are close."""
    product = rows.x.float() @ rows.x.float().T
    d2 = (rows.norm[:, None] - product) + (rows.norm[None, :] - product)
    close = d2 < (rows.norm[:, None] + rows.norm[None, :]) * share
    return close.fill_diagonal_(False)


def _tiles(close: Tensor, m: int, n: int) -> float:
    """The share of tiles that hold a close pair."""
    tiles = close.unflatten(0, (-1, m)).unflatten(2, (-1, n)).any(1).any(-1)
    return tiles.double().mean().item()


def count(name: str, dtype: torch.dtype, D: int) -> dict[str, object]:
    """One entry of the table."""
    noise = torch.randn(B, D, generator=torch.Generator().manual_seed(D), dtype=torch.float64)
    x = DATA[name](noise).to(dtype)
    given = Rows(x, x, x.double().square().sum(1).float())
    tile = (64, 64) if dtype == torch.float32 else (128, 64)
    entry: dict[str, object] = {"data": name, "dtype": str(dtype).removeprefix("torch."), "D": D}
    for when, rows, share in (
        ("before", given, 1 / 16),
        ("after", centred(x)[0] if dtype == torch.float32 else given, close_share(dtype, D)),
    ):
        close = _close(rows, share)
        entry[when] = {
            "tiles_triton": round(_tiles(close, *tile), 4),
            "tiles_cuda": round(_tiles(close, *CUDA_TILE), 4),
            "pairs": round(close.double().mean().item(), 6),
        }
    return entry


def main() -> None:
    entries = [
        count(name, dtype, D) for name in DATA for dtype, sizes in SIZES.items() for D in sizes
    ]
    record = {
        "what": "shares of tiles and pairs of rows whose distances come from differences; counted, "
        "not timed",
        "rows": B,
        "tiles": {"triton": "64 x 64 in fp32, 128 x 64 in 16 bits", "cuda": "128 x 128"},
        "entries": entries,
    }
    json.dump(record, sys.stdout, indent=1)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
