# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses that carry names: NT-Xent of SimCLR, SupCon, CLIP's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend
from kdkernels.nn._temperature import TemperedLoss
from kdkernels.ops import _key_bank, _rows
from kdkernels.ops.info_nce import info_nce


class NTXentLoss(TemperedLoss):
    r"""SimCLR: a view shall pick the other view of its image out of all views of the batch.

    With z the 2 B views, the mean over them of

        -log(exp(sim(z_i, z_j(i)) / temperature) / sum_{k != i} exp(sim(z_i, z_k) / temperature)),

    where j(i) is the other view of the image of i. Nothing of size 2 B x 2 B is in memory.

    Args:
        weight: Factor of the loss.
        temperature: Positive; the paper takes 0.1 for ImageNet and 0.5 for CIFAR-10.
        learn_temperature, min_temperature: See `InfoNCELoss`.
        normalize: Similarities are cosines; False takes inner products.
        backend: See `kdkernels.explain`.

    Shape:
        - first, second: [B, D], the two views of each image. Both receive gradients.
        - negatives: [K, D], more keys that every view sees, such as those of a queue; None for
          none. They receive a gradient if they ask for one.
        - sample_mask: which images count, bool [B]; the loss is that of the batch without the
          others, which may hold anything. Nothing waits for a device. None: all.
        - output: scalar, fp32 (fp64 for fp64). 0 for an empty batch.

    Attributes:
        log_temperature: A parameter of shape [1], or None.

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Example:
        >>> criterion = kd.nn.NTXentLoss(temperature=0.1)
        >>> loss = criterion(model(view1), model(view2))

    Reference:
        Chen, Kornblith, Norouzi and Hinton, A Simple Framework for Contrastive Learning of Visual
        Representations, ICML 2020, arXiv:2002.05709.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        temperature: float = 0.5,
        learn_temperature: bool = False,
        min_temperature: float = 0.01,
        normalize: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            weight, temperature, learn_temperature, min_temperature, normalize, backend
        )

    def forward(
        self,
        first: Tensor,  # [B, D]
        second: Tensor,  # [B, D]
        negatives: Tensor | None = None,  # [K, D]
        *,
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        _pair("first", first, "second", second, sample_mask)
        views = torch.cat([first, second])
        keys = views
        if negatives is not None:
            _checks.matrix("negatives", negatives)
            _checks.same_device("negatives", negatives, "first", first)
            _checks.same_columns("negatives", negatives, "first", first)
            keys = torch.cat([views, negatives])
        if len(views) == 0:
            return self.weight * _nothing(views)
        own = torch.arange(len(views), device=views.device)
        other, num_keys = own.roll(len(first)), None
        if sample_mask is not None:
            sample_mask = sample_mask.repeat(2)
            counting = F.pad(sample_mask, (0, len(keys) - len(views)), value=True)
            order, num_keys, own, other = _counting_first(counting, own, other)
            keys = keys[order]
        return self.weight * info_nce(
            views, keys, other, exclude=own, num_keys=num_keys, sample_mask=sample_mask,
            **self._options(),
        )  # fmt: skip


class SupConLoss(TemperedLoss):
    r"""SupCon: every other row of the same label is a positive.

    With P(i) the rows that have the label of row i, other than i, the mean over rows of

        -1 / |P(i)| sum_{p in P(i)} log(exp(sim(z_i, z_p) / temperature)
                                        / sum_{k != i} exp(sim(z_i, z_k) / temperature)),

    the paper's L_out. A row without a positive costs 0 and counts in the mean. The authors' code
    multiplies by temperature / base_temperature, where both are 0.07 by default: a factor for
    `weight`.

    Args:
        weight: Factor of the loss.
        ignore_index: Label of rows of both sides that do not count, an integer. None: every label
            is a class, -1 too.
        temperature: Positive; the paper's best one is 0.1, the default of the authors' code 0.07.
        learn_temperature, min_temperature: See `InfoNCELoss`.
        normalize: Similarities are cosines; False takes inner products.
        backend: See `kdkernels.explain`.

    Shape:
        - embeddings: [B, D], or [B, V, D] with V views of each sample, which are rows of one label.
        - labels: [B], any integer dtype. None for views without labels, where each sample is a
          label of its own.
        - references: [M, D], and reference_labels: [M]: the keys in place of the batch, such as a
          memory of past embeddings. They receive gradients if they ask for them.
        - sample_mask: which samples of the embeddings count, bool [B]; the others may hold
          anything. The loss is that of the batch without them, or against references that of the
          other rows. Nothing waits for a device. None: all.
        - exclude: [B] with references that hold the embeddings too: where each lies, -1 for
          nowhere. Of the batch itself a row never counts for itself. For [B, V, D] it is [B V].
        - output: scalar, fp32 (fp64 for fp64). 0 for an empty batch.

    Attributes:
        log_temperature: A parameter of shape [1], or None.

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Example:
        >>> criterion = kd.nn.SupConLoss(temperature=0.1)
        >>> loss = criterion(torch.stack([model(view1), model(view2)], 1), labels)

    Reference:
        Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, arXiv:2004.11362.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        ignore_index: int | None = None,
        temperature: float = 0.07,
        learn_temperature: bool = False,
        min_temperature: float = 0.01,
        normalize: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            weight, temperature, learn_temperature, min_temperature, normalize, backend
        )
        self.ignore_index = _checks.ignore_index(ignore_index)

    def forward(
        self,
        embeddings: Tensor,  # [B, D] or [B, V, D]
        labels: Tensor | None = None,  # [B]
        references: Tensor | None = None,  # [M, D]
        reference_labels: Tensor | None = None,  # [M]
        *,
        exclude: Tensor | None = None,  # [B] or [B V]
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        rows, labels, counting = _rows_of_views(embeddings, labels, sample_mask)
        counting = _rows.of_label(labels, counting, self.ignore_index)
        if (references is None) != (reference_labels is None):
            raise ValueError("references and reference_labels must be given together")
        if references is None:
            if exclude is not None:
                raise ValueError("exclude must be None without references")
            if len(rows) == 0:
                return self.weight * _nothing(rows)
            references, reference_labels, keys_counting = rows, labels, counting
            exclude = torch.arange(len(rows), device=rows.device)
        else:
            _checks.matrix("references", references)
            _checks.labels("reference_labels", reference_labels, "references", references)
            reference_labels = reference_labels.long()
            keys_counting = _rows.of_label(reference_labels, None, self.ignore_index)
        num_keys = None
        if keys_counting is not None:
            order, num_keys, exclude = _counting_first(keys_counting, exclude)
            references, reference_labels = _rows.take(order, references, reference_labels)
        return self.weight * info_nce(
            rows, references, labels, key_labels=reference_labels, exclude=exclude,
            num_keys=num_keys, sample_mask=counting, **self._options(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ignore_index={self.ignore_index}"


class CLIPLoss(TemperedLoss):
    r"""CLIP: each image shall pick its text out of those of the batch, and each text its image.

    The mean of both directions' `kdkernels.info_nce`, with a learned scale 1 / temperature that is
    bounded by 100. Also known as the symmetric multiple negatives ranking loss.

    Args:
        weight: Factor of the loss.
        temperature: Positive; where it starts if it is learned.
        learn_temperature: Train the temperature, as its logarithm: give the parameters of this
            module to the optimiser. False where the scale belongs to the model.
        min_temperature: Of a learned temperature, see `InfoNCELoss`; 0 is no bound.
        normalize: Similarities are cosines; False takes inner products.
        backend: See `kdkernels.explain`.

    Shape:
        - images, texts: [B, D], pairs by order. Both receive gradients.
        - exclude: bool [B, B], true where an image and a text that are no pair are no negatives of
          each other either, such as duplicates; None for none.
        - sample_mask: which pairs count, bool [B]; the loss is that of the batch without the
          others, which may hold anything. Nothing waits for a device. None: all.
        - output: scalar, fp32 (fp64 for fp64). 0 for an empty batch.

    Attributes:
        log_temperature: A parameter of shape [1], or None.

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Example:
        >>> criterion = kd.nn.CLIPLoss()
        >>> optimiser.add_param_group({"params": criterion.parameters(), "weight_decay": 0.0})
        >>> loss = criterion(image_model(images), text_model(texts))

    Reference:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML
        2021, arXiv:2103.00020.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        temperature: float = 0.07,
        learn_temperature: bool = True,
        min_temperature: float = 0.01,
        normalize: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            weight, temperature, learn_temperature, min_temperature, normalize, backend
        )

    def forward(
        self,
        images: Tensor,  # [B, D]
        texts: Tensor,  # [B, D]
        *,
        exclude: Tensor | None = None,  # [B, B] bool
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        _pair("images", images, "texts", texts, sample_mask)
        if len(images) == 0:
            return self.weight * _nothing(images)
        if exclude is not None and getattr(exclude, "dtype", None) != torch.bool:
            found = exclude.dtype if isinstance(exclude, Tensor) else type(exclude).__name__
            raise TypeError(f"exclude must be a torch.bool mask or None, got {found}")
        if exclude is not None:
            _key_bank.check_exclude(exclude, "images", images, texts)
        images, texts = _checks.same_dtype(images, texts)
        pairs = torch.arange(len(images), device=images.device)
        order, options = None, {**self._options(), "sample_mask": sample_mask}
        if sample_mask is not None:
            order, options["num_keys"], pairs = _counting_first(sample_mask, pairs)
        loss = 0.0
        for queries, keys, mask in (
            (images, texts, exclude),
            (texts, images, None if exclude is None else exclude.T),
        ):
            if order is not None:
                keys, mask = keys[order], None if mask is None else mask[:, order]
            loss = loss + info_nce(queries, keys, pairs, exclude=mask, **options)
        return self.weight * (0.5 * loss)


def _nothing(rows: Tensor) -> Tensor:
    """The loss of no rows."""
    return rows.to(_checks.accumulation_dtype(rows.dtype)).sum()


def _pair(name: str, x: Tensor, other_name: str, other: Tensor, sample_mask: Any) -> None:
    """Rows that belong to each other by order, and which of them count."""
    _checks.matrix(name, x)
    _checks.matrix(other_name, other)
    _checks.same_device(other_name, other, name, x)
    if other.shape != x.shape:
        raise ValueError(
            f"{other_name} must have shape {list(x.shape)} like {name}, got {list(other.shape)}"
        )
    _checks.sample_mask(sample_mask, name, x)


def _counting_first(
    counting: Tensor,  # [M] bool
    *indices: Tensor | None,  # of keys, -1 for none
) -> tuple[Any, ...]:
    """An order of keys in which those that count come first, how many these are, and indices in
    that order.

    If no key counts, one does: then no query has a positive, or none counts.
    """
    order = counting.logical_not().to(torch.uint8).argsort(stable=True)
    place = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)
    )
    moved = (
        None if x is None else place[x.long().clamp_min(0)].masked_fill(x < 0, -1) for x in indices
    )
    return order, counting.sum().clamp_min(1), *moved


def _rows_of_views(
    embeddings: Tensor, labels: Tensor | None, sample_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """[B V, D], [B V] and [B V]."""
    _checks.features("embeddings", embeddings)
    if embeddings.dim() > 3:
        raise ValueError(
            f"embeddings must have 2 or 3 dimensions, got shape {list(embeddings.shape)}"
        )
    if labels is None:
        if embeddings.dim() == 2:
            raise ValueError("labels must be given for embeddings [B, D], got None")
        labels = torch.arange(len(embeddings), device=embeddings.device)
    _checks.labels("labels", labels, "embeddings", embeddings)
    labels = labels.long()  # an unsigned dtype holds no -1, which may be ignored
    _checks.sample_mask(sample_mask, "embeddings", embeddings.flatten(1))
    if embeddings.dim() == 2:
        return embeddings, labels, sample_mask
    views = embeddings.shape[1]
    if sample_mask is not None:
        sample_mask = sample_mask.repeat_interleave(views)
    return embeddings.flatten(0, 1), labels.repeat_interleave(views), sample_mask
