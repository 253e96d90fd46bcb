# SPDX-License-Identifier: Apache-2.0
"""Comparative knowledge distillation (Wilf et al., 2025)."""

from __future__ import annotations

from torch import Tensor, nn

from kdkernels import _checks
from kdkernels.nn import _arguments
from kdkernels.nn._arguments import Features
from kdkernels.ops import _rows


class ComparativeLoss(nn.Module):
    r"""Comparisons of the student's outputs to one another match the teacher's.

    The comparison of samples i and j is the difference of their outputs. With d = student -
    teacher, `weight` times the mean over all B^2 ordered pairs and D outputs of

        ((s_i - s_j) - (t_i - t_j))^2,

    which is 2 mean (d - mean of d over the batch)^2: no pair is ever formed, and no kernel needed.
    It is 0 for a student that is the teacher up to a constant shift of all outputs. Several layer
    pairs are summed.

    The idea of matching comparisons is the paper's; the squared distance, the mean over pairs of
    one batch and the weight are ours: the public repository did not tell us the authors' choice,
    nor is their form with groups of samples here.

    Args:
        weight: Factor of the loss.

    Shape:
        - student: logits or features, [B, ...], or a list, tuple or dict of such tensors, one per
          layer.
        - teacher: the same layers, of the same shapes. Detached.
        - sample_mask: which samples count, bool [B]; the loss is that of the batch without the
          others, which may hold anything. Their number is read, for which a GPU is waited for, and
          `torch.compile(fullgraph=True)` refuses it. None: all.
        - output: scalar, fp32 (fp64 for fp64 outputs); 0 for an empty batch.

    Raises:
        TypeError, ValueError: an argument does not fit, by name; from `forward` too.

    Reference:
        Wilf et al., Comparative Knowledge Distillation, WACV 2025, arXiv:2311.02253.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = _arguments.weight(weight)

    def forward(
        self,
        student: Features,
        teacher: Features,
        *,
        sample_mask: Tensor | None = None,  # [B]
    ) -> Tensor:
        losses = []
        for suffix, student_layer, teacher_layer in _arguments.pairs(student, teacher):
            s, t = _arguments.flat_pair(suffix, student_layer, teacher_layer)
            if s.shape != t.shape:
                expected = f"{s.shape[1]} outputs per sample like student{suffix}"
                raise ValueError(f"teacher{suffix} must have {expected}, got {t.shape[1]}")
            s, t = _rows.select(sample_mask, student=s, teacher=t)
            acc = _checks.accumulation_dtype(s.dtype)
            d = s.to(acc) - t.to(acc)
            losses.append(2 * (d - d.mean(0)).square().mean() if d.numel() else d.sum())
        return self.weight * sum(losses[1:], losses[0])

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}"
