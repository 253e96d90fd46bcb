# SPDX-License-Identifier: Apache-2.0
"""Distillation by mimicking features through hash bits (Wang, Ge and Wu, 2021)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdkernels import _checks
from kdkernels._dispatch import Backend, requested_backend
from kdkernels.nn import _arguments
from kdkernels.nn._lsh_bias import mean_projection, median_projection
from kdkernels.ops.lsh_bce import lsh_bce, lsh_encode

FORMS = ("lshl2_s", "lsh_s", "lshl2", "lsh", "l2")
BIASES = ("median", "mean", "zero")
MOST = 2**31 - 1


class LSHFeatureMimickingLoss(nn.Module):
    r"""The student's features shall lie on the same side of random hyperplanes as the teacher's.

    With directions W [N, D] and bias b [N], both frozen, bits y = 1[T W^T + b > 0], and z = S W^T
    + b:

        L_2   = mean over the features of (S - T)^2
        L_LSH = mean over the bits of BCEWithLogits(z, y)

    | form               | loss                                                                   |
    |--------------------|------------------------------------------------------------------------|
    | "lsh"              | L_LSH                                                                  |
    | "lshl2"            | L_2 + L_LSH                                                            |
    | "lsh_s", "lshl2_s" | the same, over the samples that `sample_mask` selects: those that the  |
    |                    | teacher classifies correctly                                           |
    | "l2"               | L_2                                                                    |

    The hash bits leave the length of the features free, which L_2 ties to the teacher's.

    The defaults are those for CIFAR-100 in the authors' code. Their other settings, same meaning:

    | setting               | form         | hash_bits | bias   | weight               |
    |-----------------------|--------------|-----------|--------|----------------------|
    | CIFAR-100             | lshl2_s      | 32 D      | median | 6                    |
    | ImageNet              | lshl2_s      | 2048      | zero   | 5 (std 0.06 or 0.03) |
    | VOC, multi-label      | lshl2 or lsh | 4 D       | median | 0.5                  |
    | COCO, multi-label     | lshl2 or lsh | 2048      | median | 3                    |
    | Faster R-CNN on VOC   | lsh or lshl2 | 4096      | zero   | 7                    |

    Args:
        dim: Width D of the teacher's features.
        weight: Factor of the loss.
        form: See above.
        hash_bits: N; None is 32 D. Not with form="l2".
        std: Standard deviation of the directions, which are normal with mean 0.
        classifier_weight: In place of `std`: the weight of the teacher's last layer, whose
            (unbiased) standard deviation is taken. One of the two must be given, unless form="l2".
        bias: "zero", or minus the "median" or "mean" of each projection over the data set, so that
            the bits are balanced; those two need `fit_bias` before the first step.
        student_dim: If given, a linear layer (with bias) takes features of this width to D, and is
            trained with the student: give the parameters of this module to the optimiser.
        generator: For the directions; None is torch's own.
        backend: See `kdkernels.explain`.

    Shape:
        - student: [B, ...], flattened to [B, student_dim or D].
        - teacher: [B, ...], flattened to [B, D]. Detached. May be left out where `codes` are given
          and the form has no L_2.
        - codes: uint8 [B, ceil(N / 8)], the teacher's bits if they are known (`encode`).
        - sample_mask: bool [B], for the forms "_s" and for these only. A batch in which no sample
          counts gives 0.
        - output: scalar, fp32 (fp64 for fp64 features).

    Attributes:
        hash_weight, hash_bias: W and b, buffers, in `state_dict`; None with form="l2". The bias is
            NaN until it is fitted, so that a saved state says by itself whether it was.
        adapter: The linear layer, or None.

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.
        RuntimeError: `forward` or `encode` before the bias is fitted.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Wang, Ge and Wu, Distilling Knowledge by Mimicking Features, TPAMI 2021.
    """

    hash_weight: Tensor | None
    hash_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        weight: float = 6.0,
        form: Literal["lshl2_s", "lsh_s", "lshl2", "lsh", "l2"] = "lshl2_s",
        *,
        hash_bits: int | None = None,
        std: float | None = None,
        classifier_weight: Tensor | None = None,
        bias: Literal["median", "mean", "zero"] = "median",
        student_dim: int | None = None,
        generator: torch.Generator | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.dim = dim = _checks.count("dim", dim, 1, MOST)
        self.weight = _arguments.weight(weight)
        _checks.choice("form", form, FORMS)
        _checks.choice("bias", bias, BIASES)
        requested_backend(backend)  # an unknown name raises here, not in the first step
        self.form, self.bias, self.backend = form, bias, backend
        self.adapter = None
        if student_dim is not None:
            self.adapter = nn.Linear(_checks.count("student_dim", student_dim, 1, MOST), dim)
        directions, offsets = None, None
        if form == "l2":
            _refuse_hash(hash_bits=hash_bits, std=std, classifier_weight=classifier_weight)
        else:
            N = 32 * dim if hash_bits is None else _checks.count("hash_bits", hash_bits, 1, MOST)
            spread = _standard_deviation(std, classifier_weight)
            directions = torch.randn(N, dim, generator=generator) * spread
            offsets = torch.full((N,), 0.0 if bias == "zero" else torch.nan)
        self.register_buffer("hash_weight", directions)
        self.register_buffer("hash_bias", offsets)
        self._fitted = bias == "zero"

    @property
    def hash_bits(self) -> int:
        """N, 0 with form="l2"."""
        return 0 if self.hash_weight is None else self.hash_weight.shape[0]

    @torch.no_grad()
    def fit_bias(self, features: Tensor | Iterable[Tensor], *, memory_mib: int = 512) -> None:
        """Set the bias from the teacher's features of the whole data set.

        Args:
            features: [n, dim], or an iterable of such batches, which is consumed once.
            memory_mib: What the exact median may take beside the features. Batches of an iterable
                wait in a temporary file (n x dim numbers) while blocks of directions are computed.

        Raises:
            ValueError: nothing to fit (bias="zero", form="l2"), wrong width, no rows, or features
                that are not finite.
        """
        weight = self.hash_weight
        if weight is None or self.bias == "zero":
            raise ValueError(
                f"bias must be 'median' or 'mean' and form not 'l2' to be fitted, got "
                f"bias={self.bias!r}, form={self.form!r}"
            )
        memory = _checks.count("memory_mib", memory_mib, 1, MOST) << 20
        if self.bias == "mean":
            centre = mean_projection(features, weight)
        else:
            centre = median_projection(features, weight, memory)
        if not torch.isfinite(centre).all():
            raise ValueError("features must be finite, got NaN or infinity")
        self.hash_bias = -centre
        self._fitted = True

    def hash(self) -> tuple[Tensor, Tensor]:
        """Directions and bias, if they are ready."""
        if self.hash_weight is None or self.hash_bias is None:
            raise ValueError("form must be one with hash bits, got 'l2'")
        if not self._ready():
            raise RuntimeError(
                f"fit_bias(features) must be called before the first step: bias={self.bias!r}"
            )
        return self.hash_weight, self.hash_bias

    def encode(self, teacher: Tensor) -> Tensor:
        """The teacher's bits, uint8 [B, ceil(N / 8)], of features [B, ...]."""
        weight, bias = self.hash()
        _checks.features("teacher", teacher)
        return lsh_encode(teacher.detach().flatten(1), weight, bias, backend=self.backend)

    def forward(
        self,
        student: Tensor,  # [B, ...]
        teacher: Tensor | None = None,  # [B, ...]
        *,
        codes: Tensor | None = None,  # [B, ceil(N / 8)]
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        _checks.features("student", student)
        if teacher is not None:
            _checks.features("teacher", teacher)
        self._check(teacher, codes, sample_mask)
        if sample_mask is not None:
            _checks.sample_mask(sample_mask, "student", student.flatten(1))
        s = student.flatten(1)
        width = self.dim if self.adapter is None else self.adapter.in_features
        _width("student", s, width)
        s = s if self.adapter is None else _arguments.embedded(self.adapter, s)
        # here and not in each term, so that the gradient is rounded once
        others = (x.dtype for x in (teacher, self.hash_weight) if x is not None)
        s = s.to(_checks.common_dtype(s.dtype, *others))
        loss: Tensor | None = None
        if "l2" in self.form:
            loss = _squared_difference(s, teacher, sample_mask, self.dim)
        if self.form != "l2":
            weight, bias = self.hash()
            codes = self.encode(teacher) if codes is None else codes
            bits = lsh_bce(s, codes, weight, bias, sample_mask=sample_mask, backend=self.backend)
            loss = bits if loss is None else loss + bits
        return self.weight * loss

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, weight={self.weight:g}, form={self.form!r}, "
            f"hash_bits={self.hash_bits}, bias={self.bias!r}, backend={self.backend!r}"
        )

    def _ready(self) -> bool:
        """Whether the bias is there; it is looked at until it is, and not in compiled code."""
        bias = self.hash_bias
        if not self._fitted and not torch.compiler.is_compiling() and not bias.is_meta:
            self._fitted = not bool(bias.isnan().any())
        return self._fitted

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        name, fitted = f"{prefix}hash_bias", state_dict.pop(f"{prefix}_extra_state", None)
        found = state_dict.get(name)
        if self.bias != "zero" and isinstance(found, Tensor) and not found.is_meta:
            # Once a bias that was not fitted was 0, and a flag beside it said so.
            if (not bool(fitted)) if fitted is not None else not bool(found.any()):
                state_dict[name] = torch.full_like(found, torch.nan)
            self._fitted = False
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.hash_bias is not None:
            self._ready()

    def _check(
        self, teacher: Tensor | None, codes: Tensor | None, sample_mask: Tensor | None
    ) -> None:
        if codes is not None and self.form == "l2":
            raise ValueError("codes must be left out with form='l2'")
        if teacher is None and (codes is None or "l2" in self.form):
            what = "teacher" if "l2" in self.form else "teacher or codes"
            raise ValueError(f"{what} must be given with form={self.form!r}, got None")
        if (sample_mask is not None) != self.form.endswith("_s"):
            rule = "given" if sample_mask is None else "left out"
            raise ValueError(f"sample_mask must be {rule} with form={self.form!r}")


def _refuse_hash(**options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} must be left out with form='l2', which has no hash bits")


def _standard_deviation(std: float | None, classifier_weight: Tensor | None) -> float:
    if (std is None) == (classifier_weight is None):
        given = "neither" if std is None else "both"
        raise ValueError(f"std or classifier_weight must be given, one of the two, got {given}")
    if classifier_weight is None:
        return _checks.positive("std", std)
    _checks.features("classifier_weight", classifier_weight)
    return _checks.positive("std of classifier_weight", classifier_weight.detach().std().item())


def _width(name: str, x: Tensor, width: int) -> None:
    if x.shape[1] != width:
        raise ValueError(f"{name} must have {width} features per sample, got {x.shape[1]}")


def _squared_difference(
    student: Tensor,  # [B, D]
    teacher: Tensor,  # [B, ...]
    sample_mask: Tensor | None,  # [B]
    width: int,
) -> Tensor:
    """Mean over the features of the samples that count, 0 if none does."""
    s, t = _arguments.flat_pair("", student, teacher.detach())
    _width("teacher", t, width)
    acc = _checks.accumulation_dtype(s.dtype)
    difference = s.to(acc) - t.to(acc)
    count: int | Tensor = max(len(s), 1)
    if sample_mask is not None:
        difference = torch.where(_arguments.keepable(sample_mask)[:, None], difference, 0.0)
        count = sample_mask.sum().clamp_min(1)
    return difference.square().sum() / (count * width)
