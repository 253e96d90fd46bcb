# SPDX-License-Identifier: Apache-2.0
"""Other libraries that do the same work, and other ways to do it in torch, for benchmarks and
conformance tests only.

A peer is named after its distribution, e.g. "pytorch-metric-learning", and is the module
`kdkernels.testing.peers.pytorch_metric_learning`, which is imported only when the distribution is
installed; or it is one of `WAYS`, which has the version of torch. Its dictionary `PEERS` says what
it does for each public function whose `OpInfo` names it.

inf-cl and memeff compute info_nce over a batch without its matrix, too, but take CUDA tensors only
(inf-cl 1.2.1, memeff 0.3.1), where no test here could hold a peer to its words: they are none.

faiss-cpu and scikit-learn bring an OpenMP runtime of their own, whose idle threads spin for some
milliseconds after a call. Measured on two cores, torch is no slower right after them than right
after a product of its own, so they take turns like all other variants.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.testing.opinfo import BenchShape, OpInfo, Sample

WAYS = ("eager-with-teacher", "dense-in-torch")  # peers that need no other distribution than torch


@dataclass(frozen=True)
class Peer:
    """What a library does where an op is timed."""

    computes: str  # one sentence: what is timed, and what is not
    function: Callable[[Sample], Callable[..., Tensor]]  # the function of the sample's tensors
    # The op's value, with a gradient. A part has neither: it is timed in mode "fwd" only, and its
    # result is judged by the tests instead of a benchmark's errors.
    whole: bool = True
    prepare: Callable[[Sample], Sample] = lambda sample: sample  # made before the clock starts
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    devices: tuple[str, ...] = ("cpu", "cuda")
    most_work: int | None = None  # largest B * B * D; beyond, measuring it takes minutes
    why_not: Callable[[], str | None] = lambda: None  # what else this machine lacks
    # What the library lacks of a shape's options, e.g. "metric 'rbf'".
    lacks: Callable[[dict[str, Any]], str | None] = lambda options: None


def unit_rows(sample: Sample) -> Sample:
    """The sample with its first tensor's rows divided by their norms, if its options say so."""
    if not sample.kwargs.get("normalize_embeddings", True):
        return sample
    x, *rest = sample.args
    return Sample(sample.name, (F.normalize(x, dim=-1), *rest), sample.kwargs)


def without_metrics(*metrics: str) -> Callable[[dict[str, Any]], str | None]:
    """`Peer.lacks` of a library that has all metrics of pairwise but these."""

    def lacks(options: dict[str, Any]) -> str | None:
        metric = options.get("metric", "cosine")
        return f"metric {metric!r}" if metric in metrics else None

    return lacks


def one_side(sample: Sample, lacks: Callable[[dict[str, Any]], str | None]) -> tuple[str, float]:
    """(metric, gamma) of a sample of pairwise of one matrix with itself.

    Raises:
        ValueError: The sample has a second side, groups, or a metric that the library lacks.
    """
    x, *others = sample.args
    if others or x.dim() != 2 or lacks(sample.kwargs) is not None:
        raise ValueError(
            f"sample must have one matrix and a metric of the library, got {sample.kwargs}"
        )
    return sample.kwargs.get("metric", "cosine"), sample.kwargs.get("gamma", 1.0)


def version(peer: str) -> str | None:
    """The installed version of a peer's distribution; None if there is none."""
    distribution = "torch" if peer in WAYS else peer
    found = next(iter(metadata.distributions(name=distribution)), None)
    return None if found is None else found.version


def get(info: OpInfo, peer: str) -> Peer:
    """What an installed peer does for an op."""
    module = importlib.import_module(f"{__name__}.{peer.replace('-', '_')}")
    return module.PEERS[info.name]


def why_not(
    info: OpInfo,
    peer: str,
    shape: BenchShape,
    dtype: torch.dtype,
    mode: str,
    device: torch.device,
) -> str | None:
    """Why a peer cannot be measured so and here; None if it can."""
    if peer not in info.peers:
        return f"{peer} has no {info.name}"
    if version(peer) is None:
        return f"{peer} is not installed"
    found = get(info, peer)
    if mode != "fwd" and not found.whole:
        return f"{peer} has no gradient"
    if device.type not in found.devices:
        return f"{peer} is not timed on {device.type}"
    if dtype not in found.dtypes:
        return f"{peer} has no {str(dtype).removeprefix('torch.')}"
    lacked = found.lacks(shape.kwargs)
    if lacked is not None:
        return f"{peer} has no {lacked}"
    if found.most_work is not None and shape.sizes["B"] ** 2 * shape.sizes["D"] > found.most_work:
        return f"{peer} would take minutes"
    return found.why_not()
