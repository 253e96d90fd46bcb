# SPDX-License-Identifier: Apache-2.0
"""Triplet losses over what is mined in the batch (Hermans et al., 2017; Schroff et al., 2015)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.ops import _rows
from kdkernels.ops._labelled import DISTANCES
from kdkernels.ops.triplet_loss import ONE, REDUCTIONS, triplet_loss

Reduction = Literal["mean_nonzero", "mean", "mean_batch", "sum", "none"]


@dataclass(frozen=True)
class _Preset:
    margin: float
    soft: bool
    normalize_embeddings: bool
    reduction: Reduction
    self_positive: bool = False  # an anchor is the positive of itself where it has no other
    mining: str | None = None  # in place of the module's


_DEFAULT = _Preset(0.2, False, True, "mean_nonzero")
_PML = _Preset(0.05, False, True, "mean_nonzero")


class _MinedTripletLoss(nn.Module):
    mining: str
    presets: ClassVar[dict[str, _Preset]]

    def __init__(
        self,
        preset: str = "default",
        *,
        margin: float | None = None,
        soft: bool | None = None,
        distance: Literal["euclidean", "sqeuclidean", "cosine"] = "euclidean",
        normalize_embeddings: bool | None = None,
        ignore_index: int | None = None,
        reduction: Reduction | None = None,
        weight: float = 1.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.choice("preset", preset, tuple(self.presets))
        of_preset = self.presets[preset]

        def chosen(name: str, value: Any) -> Any:
            return getattr(of_preset, name) if value is None else value

        self.preset = preset
        self.self_positive = of_preset.self_positive
        self.mining = of_preset.mining or self.mining
        self.margin = _checks.not_negative("margin", chosen("margin", margin))
        self.soft = _checks.flag("soft", chosen("soft", soft))
        _checks.choice("distance", distance, DISTANCES)
        self.distance = distance
        self.normalize_embeddings = _checks.flag(
            "normalize_embeddings", chosen("normalize_embeddings", normalize_embeddings)
        )
        self.ignore_index = _checks.ignore_index(ignore_index)
        self.reduction = chosen("reduction", reduction)
        # of several triplets per anchor there are sums only
        one_per_anchor = self.mining in ONE
        reductions = (*REDUCTIONS, "mean_batch") if one_per_anchor else REDUCTIONS[:-1]
        _checks.choice("reduction", self.reduction, reductions)
        self.weight = _arguments.weight(weight)
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.backend = backend

    def forward(
        self,
        embeddings: Tensor,  # [B, D]
        labels: Tensor,  # [B]
        references: Tensor | None = None,  # [M, D]
        reference_labels: Tensor | None = None,  # [M]
        *,
        exclude: Tensor | None = None,  # [B]
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        in_batch = references is None and reference_labels is None and exclude is None
        if self.self_positive and not in_batch:
            raise ValueError(
                f"references must be left out with preset={self.preset!r}, and exclude, since it "
                "mines within the batch"
            )
        over_batch, ignore_index, index = self.reduction == "mean_batch", self.ignore_index, None
        if over_batch or self.self_positive:  # how many rows count, or which, matters here too
            _checks.matrix("embeddings", embeddings)
            _checks.labels("labels", labels, "embeddings", embeddings)
            _checks.sample_mask(sample_mask, "embeddings", embeddings)
            mask = _rows.of_label(labels.to(torch.int64), sample_mask, ignore_index)
            B, index, sample_mask = embeddings.shape[0], _rows.counting(mask), None
            if exclude is not None:
                _checks.labels("exclude", exclude, "embeddings", embeddings)
                (exclude,) = _rows.take(index, exclude)
            embeddings, labels = _rows.take(index, embeddings, labels)
        if self.self_positive:
            # references are never taken for the anchors themselves: each anchor finds itself there
            references, reference_labels, ignore_index = embeddings, labels, None
        loss = triplet_loss(
            embeddings,
            labels,
            references=references,
            reference_labels=reference_labels,
            mining=self.mining,
            margin=self.margin,
            soft=self.soft,
            distance=self.distance,
            normalize_embeddings=self.normalize_embeddings,
            exclude=exclude,
            sample_mask=sample_mask,
            ignore_index=ignore_index,
            reduction="sum" if over_batch else self.reduction,
            backend=self.backend,
        )
        if over_batch:
            loss = loss / max(embeddings.shape[0], 1)
        elif self.self_positive and self.reduction == "none":
            loss = _rows.put_back(loss, index, B)
        return self.weight * loss

    def extra_repr(self) -> str:
        return (
            f"preset={self.preset!r}, margin={self.margin:g}, soft={self.soft}, "
            f"distance={self.distance!r}, normalize_embeddings={self.normalize_embeddings}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"weight={self.weight:g}, backend={self.backend!r}"
        )


class BatchHardTripletLoss(_MinedTripletLoss):
    r"""Triplet loss on the farthest positive and the nearest negative of each anchor.

    With u = d(anchor, farthest positive) - d(anchor, nearest negative) + margin, an anchor
    contributes max(u, 0), or log(1 + e^u) if `soft`; see `kdkernels.triplet_loss`.

    Who computes what:

    | preset                    | rows | margin  | mean over  | anchor without a positive |
    |---------------------------|------|---------|------------|---------------------------|
    | "default"                 | unit | 0.2     | losses > 0 | dropped                   |
    | "pytorch-metric-learning" | unit | 0.05    | losses > 0 | dropped                   |
    | "hermans"                 | raw  | 0, soft | B anchors  | d_ap = 0, counted         |
    | "torchreid"               | raw  | 0.3     | B anchors  | d_ap = 0, counted         |
    | "tensorflow-addons"       | raw  | 1       | B anchors  | d_ap = 0, counted         |
    | "sentence-transformers"   | raw  | 5       | B anchors  | d_ap = 0, counted         |

    All take the Euclidean distance, not squared. Where an anchor has no negative, hence in batches
    of one class, it adds nothing. Under the last four presets an anchor that has no other positive
    is the positive of itself, at distance 0: the batch is mined against itself as a reference set,
    at twice the work of the other presets, and no `references` can be given.

    What the codes behind the names do otherwise:

    - "pytorch-metric-learning": nothing. It is `BatchHardMiner` and `TripletMarginLoss` of that
      library with their defaults; its `smooth_loss` is `soft`.
    - "hermans", the loss of the paper and the default of the authors' code: they add 1e-12 under
      the square root for the sake of its derivative. Here coincident points have distance 0 and
      gradient 0, under every preset.
    - "torchreid", `TripletLoss` of that library: distances below 1e-6 are raised to 1e-6, also that
      of an anchor to itself, and batches of one class are refused.
    - "tensorflow-addons", `TripletHardLoss` with its distance "L2": in a batch of one class each
      anchor adds the margin, a constant. Unit rows are expected and left to the user. Early
      versions squared the distance. Its `soft` leaves the margin out: `soft=True, margin=0`.
    - "sentence-transformers", `BatchHardTripletLoss` of that library, and the same mathematics as
      omoindrot's tensorflow-triplet-loss, whose margin is an argument: in a batch of one class each
      anchor adds the margin. Its `BatchHardSoftMarginTripletLoss` is `soft=True, margin=0`.

    Where several positives or negatives are equally far the gradient goes to the lowest row;
    reductions to a value, as in triplet-reid, torchreid and TensorFlow Addons, share it.

    A loss that stays at the margin (log 2 for "hermans") says that all embeddings have collapsed
    into one point; a lower learning rate, a longer warm-up or `BatchSemiHardTripletLoss` helps.

    Args:
        preset: See above; the arguments left at None come from it.
        margin: Not negative; also added under `soft`.
        soft: Softplus in place of the hinge.
        distance: "euclidean", "sqeuclidean" or "cosine", as in `kdkernels.triplet_loss`.
        normalize_embeddings: Unit rows first.
        ignore_index: Label of rows that do not count: neither as anchors nor as positives nor as
            negatives, of the batch or of the references. An integer; None: every label is a class,
            -1 too.
        reduction: Of `kdkernels.triplet_loss`: "mean_nonzero", "mean" (over the anchors kept),
            "sum", "none"; or "mean_batch", the sum over B, less the rows that do not count.
        weight: Factor of the loss.
        backend: See `kdkernels.explain`.

    Shape:
        - embeddings: [B, D]; labels: [B], any integer dtype.
        - references: [M, D], and reference_labels: [M]: where positives and negatives come from in
          place of the batch; they receive gradients if they ask for them.
        - exclude: one reference per row that it is not compared with, integer [B], -1 for none: the
          row's own copy, where the references hold the batch. Only with references.
        - sample_mask: which rows of the embeddings count, bool [B], as in `kdkernels.triplet_loss`.
          None: all.
        - output: scalar, or [B] for "none"; fp32 (fp64 for fp64 embeddings).

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Example:
        >>> criterion = kd.nn.BatchHardTripletLoss(margin=0.3)
        >>> loss = criterion(embeddings, labels)
        >>> # cross-batch memory: the batch is at `places` of the bank already
        >>> loss = criterion(embeddings, labels, bank, bank_labels, exclude=places)

    Reference:
        Hermans, Beyer and Leibe, In Defense of the Triplet Loss for Person Re-Identification, 2017,
        arXiv:1703.07737.
    """

    mining = "batch_hard"
    presets: ClassVar[dict[str, _Preset]] = {
        "default": _DEFAULT,
        "pytorch-metric-learning": _PML,
        "hermans": _Preset(0.0, True, False, "mean_batch", self_positive=True),
        "torchreid": _Preset(0.3, False, False, "mean_batch", self_positive=True),
        "tensorflow-addons": _Preset(1.0, False, False, "mean_batch", self_positive=True),
        "sentence-transformers": _Preset(5.0, False, False, "mean_batch", self_positive=True),
    }


class BatchSemiHardTripletLoss(_MinedTripletLoss):
    r"""Triplet loss on the nearest negative beyond a positive.

    Two losses go by this name, and the preset says which is meant:

    | preset                    | positives of an anchor | rows | margin | mean over     |
    |---------------------------|------------------------|------|--------|---------------|
    | "default"                 | the farthest           | unit | 0.2    | losses > 0    |
    | "pytorch-metric-learning" | the farthest           | unit | 0.05   | losses > 0    |
    | "tensorflow-addons"       | each one               | raw  | 1      | pairs (a, p)  |
    | "sentence-transformers"   | each one               | raw  | 5      | pairs (a, p)  |

    The first two compare the farthest positive with the nearest negative strictly farther than it;
    there is no upper bound, and anchors without such a negative are dropped. The last two do so for
    each pair of anchor and positive, and take the anchor's farthest negative where none is farther
    than the positive (`mining="pair_semihard"` of `kdkernels.triplet_loss`). FaceNet takes each
    pair too, but asks for a negative within the margin. All take the Euclidean distance, not
    squared.

    What the codes behind the names do otherwise:

    - "pytorch-metric-learning": nothing. It is `BatchEasyHardMiner(pos_strategy="hard",
      neg_strategy="semihard")` and `TripletMarginLoss` of that library with their defaults.
    - "tensorflow-addons", `TripletSemiHardLoss` with its distance "L2", and
      "sentence-transformers", `BatchSemiHardTripletLoss` of that library after it: without a pair
      they give 0 / 0, here the loss is 0. In a batch of one class they take 0 for the missing d_an;
      here there is no triplet, and the loss is 0. Unit rows are left to the user. Early versions of
      TensorFlow Addons squared the distance.

    Args:
        preset: See above; the arguments left at None come from it.
        margin, soft, distance, normalize_embeddings, ignore_index, weight, backend: As in
            `BatchHardTripletLoss`.
        reduction: As in `BatchHardTripletLoss`; with the last two presets "mean" (over pairs of
            anchor and positive that have a negative), "mean_nonzero" or "sum".

    Shape:
        As in `BatchHardTripletLoss`.

    Raises:
        As in `BatchHardTripletLoss`.

    Example:
        >>> criterion = kd.nn.BatchSemiHardTripletLoss()
        >>> loss = criterion(embeddings, labels, references=bank, reference_labels=bank_labels)

    Reference:
        Schroff, Kalenichenko and Philbin, FaceNet, CVPR 2015, arXiv:1503.03832, for the idea.
    """

    mining = "batch_semihard"
    presets: ClassVar[dict[str, _Preset]] = {
        "default": _DEFAULT,
        "pytorch-metric-learning": _PML,
        "tensorflow-addons": _Preset(1.0, False, False, "mean", mining="pair_semihard"),
        "sentence-transformers": _Preset(5.0, False, False, "mean", mining="pair_semihard"),
    }


class BatchAllTripletLoss(_MinedTripletLoss):
    r"""Triplet loss on every triplet of the batch: each positive of each anchor with each negative.

    With u = d(anchor, positive) - d(anchor, negative) + margin, a triplet contributes max(u, 0), or
    log(1 + e^u) if `soft`; see `kdkernels.triplet_loss`. No triplet is written down.

    Who computes what:

    | preset                    | rows | margin  | mean over    |
    |---------------------------|------|---------|--------------|
    | "default"                 | unit | 0.2     | losses > 0   |
    | "pytorch-metric-learning" | unit | 0.05    | losses > 0   |
    | "hermans"                 | raw  | 0, soft | all triplets |
    | "sentence-transformers"   | raw  | 5       | losses > 0   |

    All take the Euclidean distance, not squared.

    What the codes behind the names do otherwise:

    - "pytorch-metric-learning": nothing. It is `TripletMarginLoss` of that library without a miner;
      its `smooth_loss` is `soft`.
    - "hermans", the paper's batch-all with the soft margin of the authors' code: they add 1e-12
      under the square root, and the mean over no triplet is not a number. The paper's variant that
      leaves zeros out is `soft=False` with a margin and `reduction="mean_nonzero"`.
    - "sentence-transformers", `BatchAllTripletLoss` of that library, and the same mathematics as
      omoindrot's tensorflow-triplet-loss: losses count from 1e-16 on.

    Args:
        preset: See above; the arguments left at None come from it.
        margin: Not negative; also added under `soft`.
        soft: Softplus in place of the hinge; its time grows with the number of triplets, that of
            the hinge with the number of pairs.
        distance, normalize_embeddings, ignore_index, weight, backend: As in `BatchHardTripletLoss`.
        reduction: "mean_nonzero", "mean" (over all triplets) or "sum".

    Shape:
        As in `BatchHardTripletLoss`, but the output is a scalar always.

    Raises:
        As in `BatchHardTripletLoss`.

    Example:
        >>> criterion = kd.nn.BatchAllTripletLoss(margin=0.1)
        >>> loss = criterion(embeddings, labels)

    Reference:
        Hermans, Beyer and Leibe, In Defense of the Triplet Loss for Person Re-Identification, 2017,
        arXiv:1703.07737.
    """

    mining = "batch_all"
    presets: ClassVar[dict[str, _Preset]] = {
        "default": _DEFAULT,
        "pytorch-metric-learning": _PML,
        "hermans": _Preset(0.0, True, False, "mean"),
        "sentence-transformers": _Preset(5.0, False, False, "mean_nonzero"),
    }
