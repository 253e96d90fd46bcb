# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses that carry names: NT-Xent of SimCLR, SupCon, CLIP's."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend
from kdkernels.nn._temperature import TemperedLoss
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
    ) -> Tensor:
        _pair("first", first, "second", second)
        views = torch.cat([first, second])
        keys = views
        if negatives is not None:
            _checks.matrix("negatives", negatives)
            _checks.same_device("negatives", negatives, "first", first)
            _checks.same_columns("negatives", negatives, "first", first)
            keys = torch.cat([views, negatives.to(views.dtype)])
        if len(views) == 0:
            return self.weight * _nothing(views)
        own = torch.arange(len(views), device=views.device)
        other = own.roll(len(first))
        return self.weight * info_nce(views, keys, other, exclude=own, **self._options())


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
        temperature: float = 0.07,
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
        embeddings: Tensor,  # [B, D] or [B, V, D]
        labels: Tensor | None = None,  # [B]
        references: Tensor | None = None,  # [M, D]
        reference_labels: Tensor | None = None,  # [M]
        *,
        exclude: Tensor | None = None,  # [B] or [B V]
    ) -> Tensor:
        rows, labels = _rows_of_views(embeddings, labels)
        if (references is None) != (reference_labels is None):
            raise ValueError("references and reference_labels must be given together")
        if references is None:
            if exclude is not None:
                raise ValueError("exclude must be None without references")
            if len(rows) == 0:
                return self.weight * _nothing(rows)
            references, reference_labels = rows, labels
            exclude = torch.arange(len(rows), device=rows.device)
        return self.weight * info_nce(
            rows, references, labels, key_labels=reference_labels, exclude=exclude,
            **self._options(),
        )  # fmt: skip


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
    ) -> Tensor:
        _pair("images", images, "texts", texts)
        if len(images) == 0:
            return self.weight * _nothing(images)
        if exclude is not None and getattr(exclude, "dtype", None) != torch.bool:
            found = exclude.dtype if isinstance(exclude, Tensor) else type(exclude).__name__
            raise TypeError(f"exclude must be a torch.bool mask or None, got {found}")
        pairs = torch.arange(len(images), device=images.device)
        options = self._options()
        loss = info_nce(images, texts, pairs, exclude=exclude, **options)
        exclude = None if exclude is None else exclude.T
        loss = loss + info_nce(texts, images, pairs, exclude=exclude, **options)
        return self.weight * (0.5 * loss)


def _nothing(rows: Tensor) -> Tensor:
    """The loss of no rows."""
    return rows.to(_checks.accumulation_dtype(rows.dtype)).sum()


def _pair(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Rows that belong to each other by order."""
    _checks.matrix(name, x)
    _checks.matrix(other_name, other)
    _checks.same_device(other_name, other, name, x)
    if other.shape != x.shape:
        raise ValueError(
            f"{other_name} must have shape {list(x.shape)} like {name}, got {list(other.shape)}"
        )


def _rows_of_views(embeddings: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """[B V, D] and [B V]."""
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
    if embeddings.dim() == 2:
        return embeddings, labels
    return embeddings.flatten(0, 1), labels.repeat_interleave(embeddings.shape[1])
