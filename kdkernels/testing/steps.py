# SPDX-License-Identifier: Apache-2.0
"""Small training steps of every op, with what a user writes for it in torch beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd

B, D, K, CLASSES, HASHES = 64, 128, 1024, 100, 2048


@dataclass(frozen=True)
class Step:
    """A call and its backward for the first argument."""

    name: str
    op: str  # the public function
    args: tuple[Any, ...]
    options: dict[str, Any]
    eager: Callable[..., Tensor]  # the same of the same arguments, in torch

    def call(self, *args: Any) -> Tensor:
        return getattr(kd, self.op)(*args, **self.options, backend="triton")


def steps() -> Iterator[Step]:
    """In bf16, as under autocast; labels in fours."""
    generator = torch.Generator().manual_seed(0)

    def rows(n: int = B, d: int = D, grad: bool = False) -> Tensor:
        x = torch.randn(n, d, generator=generator).bfloat16()
        return x.requires_grad_(grad)

    def pair(n: int = B, d: int = D) -> tuple[Tensor, Tensor]:
        return rows(n, d, grad=True), rows(n, d)

    labels = torch.arange(B) // 4
    keys = F.normalize(rows(K).float(), dim=1).bfloat16()
    own = torch.arange(B)
    codes = torch.randint(0, 256, (B, HASHES // 8), dtype=torch.uint8, generator=generator)
    bits = torch.rand(B, HASHES, generator=generator).round().bfloat16()

    def step(
        name: str, args: tuple[Any, ...], eager: Callable[..., Tensor], **options: Any
    ) -> Step:
        return Step(name, name.partition(" ")[0], args, options, eager)

    x, w = rows(grad=True), rows(HASHES)
    yield step("gram_mse 64x128", pair(), _gram_mse)
    yield step("gram_mse 256x1024", pair(256, 1024), _gram_mse)
    yield step("gram_mse 1024x64, factored", pair(1024, 64), _gram_mse, algorithm="factored")
    yield step("relational_kl 64x128, 1024 keys", (*pair(), keys), _relational_kl)
    yield step("info_nce 64x128, 1024 keys", (x, keys, own), _info_nce)
    other = rows()
    yield step("info_nce 64x128, own keys", (x, keys), partial(_moco, own=other), own_keys=other)
    yield step("triplet_loss 64x128, batch_hard", (x, labels), _batch_hard)
    yield step("triplet_loss 64x128, batch_all", (x, labels), _batch_all, mining="batch_all")
    yield step("contrastive_loss 64x128", (x, labels), _contrastive)
    with_labels = *pair(), labels
    yield step("triplet_distillation 64x128, random", with_labels, _drawn_of_others)
    yield step(
        "triplet_distillation 64x128, hardest", with_labels, _nearest_of_others, negatives="hardest"
    )
    yield step("lsh_bce 64x128, 2048 hashes", (x, codes, w), partial(_lsh_bce, bits=bits))
    yield step("pkt 64x128", pair(), _pkt)
    yield step("rkd_distance 64x128", pair(), _rkd_distance)
    yield step("rkd_angle 64x128", pair(), _rkd_angle)
    yield step("correlation 64x100", pair(B, CLASSES), _correlation)
    yield step("pairwise 64x128, cosine", (x,), _cosine, metric="cosine")
    yield step("pairwise 64x128, euclidean", (x,), _euclidean, metric="euclidean")


def _gram_mse(s: Tensor, t: Tensor) -> Tensor:
    def gram(x: Tensor) -> Tensor:
        return F.normalize(x @ x.mT, dim=1)

    return (gram(s) - gram(t)).square().sum() / len(s) ** 2


def _relational_kl(s: Tensor, t: Tensor, keys: Tensor) -> Tensor:
    p = F.softmax(F.normalize(t, dim=1) @ keys.mT / 0.02, 1)
    q = F.log_softmax(F.normalize(s, dim=1) @ keys.mT / 0.1, 1)
    return F.kl_div(q, p, reduction="batchmean")


def _info_nce(q: Tensor, keys: Tensor, positives: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(q, dim=1) @ keys.mT / 0.07, positives)


def _moco(q: Tensor, keys: Tensor, own: Tensor) -> Tensor:
    q, own = F.normalize(q, dim=1), F.normalize(own, dim=1)
    logits = torch.cat([(q * own).sum(1, keepdim=True), q @ keys.mT], 1) / 0.07
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def _distances(x: Tensor) -> Tensor:
    x = F.normalize(x, dim=1).float()
    return torch.cdist(x, x)


def _batch_hard(x: Tensor, labels: Tensor) -> Tensor:
    d = _distances(x)
    same = labels[:, None] == labels
    own = torch.eye(len(x), dtype=torch.bool)
    positive = torch.where(same & ~own, d, -torch.inf).amax(1)
    negative = torch.where(same, torch.inf, d).amin(1)
    loss = (positive - negative + 0.2).relu()
    return loss.sum() / (loss > 0).sum().clamp_min(1)


def _batch_all(x: Tensor, labels: Tensor) -> Tensor:
    d = _distances(x)
    same = labels[:, None] == labels
    own = torch.eye(len(x), dtype=torch.bool)
    triplets = (same & ~own)[:, :, None] & ~same[:, None, :]
    loss = (d[:, :, None] - d[:, None, :] + 0.2).relu() * triplets
    return loss.sum() / (loss > 0).sum().clamp_min(1)


def _contrastive(x: Tensor, labels: Tensor) -> Tensor:
    d = _distances(x)
    same = labels[:, None] == labels
    own = torch.eye(len(x), dtype=torch.bool)
    positive, negative = d.relu() * (same & ~own), (1.0 - d).relu() * ~same
    return positive.sum() / (positive > 0).sum().clamp_min(1) + negative.sum() / (
        negative > 0
    ).sum().clamp_min(1)


def _nearest_of_others(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    d = torch.cdist(t.float(), s.float())
    nearest = torch.where(labels[:, None] == labels, torch.inf, d).amin(1)
    return (d.diagonal() - nearest + 5.0).relu().mean()


def _drawn_of_others(s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    drawn = torch.multinomial((labels[:, None] != labels).float(), 1).squeeze(1)
    return F.triplet_margin_loss(t.float(), s.float(), s[drawn].float(), margin=5.0)


def _lsh_bce(x: Tensor, codes: Tensor, w: Tensor, bits: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(F.linear(x, w), bits)


def _pkt(s: Tensor, t: Tensor) -> Tensor:
    def probabilities(x: Tensor) -> Tensor:
        x = F.normalize(x, dim=1, eps=1e-7)
        k = (x @ x.mT + 1) / 2
        return k / k.sum(1, keepdim=True)

    p, q = probabilities(s), probabilities(t)
    return (q * torch.log((q + 1e-7) / (p + 1e-7))).mean()


def _rkd_distance(s: Tensor, t: Tensor) -> Tensor:
    def relations(x: Tensor) -> Tensor:
        d = torch.cdist(x.float(), x.float())
        return d / d[d > 0].mean()

    return F.smooth_l1_loss(relations(s), relations(t))


def _rkd_angle(s: Tensor, t: Tensor) -> Tensor:
    def angles(x: Tensor) -> Tensor:
        e = F.normalize(x[None] - x[:, None], dim=2)
        return torch.bmm(e, e.mT)

    return F.smooth_l1_loss(angles(s), angles(t))


def _correlation(s: Tensor, t: Tensor) -> Tensor:
    def pearson(x: Tensor, y: Tensor) -> Tensor:
        x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
        return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)).mean()

    p, q = s.softmax(1), t.softmax(1)
    return (1 - pearson(p, q)) + (1 - pearson(p.mT, q.mT))


def _cosine(x: Tensor) -> Tensor:
    x = F.normalize(x, dim=1)
    return x @ x.mT


def _euclidean(x: Tensor) -> Tensor:
    return torch.cdist(x.float(), x.float())
