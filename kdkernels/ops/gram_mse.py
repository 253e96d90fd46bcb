# SPDX-License-Identifier: Apache-2.0
"""gram_mse: squared difference of two normalised Gram matrices (similarity preserving and its kin).

Traffic of one forward and backward, in elements, per group (B rows, D_s = D_t = D):
    resident   reads 3 B D, writes B D, plus the two B x B Grams (B <= D)
    streamed   reads the features once per tile column, writes B D
    factored   reads 6 B D, writes B D, plus D x D factors
Derivation: docs/ops/gram_mse.md.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels import _checks
from kdkernels._dispatch import Backend, TensorForm, explained_by, form, requested_backend
from kdkernels._function import KernelFunction, keep_for_backward
from kdkernels._gpu import fp32_matmul
from kdkernels._library import define_operator, first_order
from kdkernels.ops import _rows

NORMALIZATIONS = ("row_l2", "row_l1", "feature", "none")
KERNELS = ("linear", "rbf_taylor")
ALGORITHMS = ("auto", "tiled", "factored")
REDUCTIONS = ("mean", "sum", "none")
MAX_ORDER = 8  # of the Taylor polynomial; kernels keep its coefficients in a fixed array

# Results of the forward, the same for every backend; fp64 for fp64 inputs, else fp32, but for coef
# and for the factors of fp32 inputs, which are fp64 too.
#   loss          [G]        sum over i, j of (G_student - G_teacher)_ij^2
#   coef          [G, 5, B]  fp64; rows a, b_s, b_t, c_s, c_t; with A the student's and
#                            K the teacher's Gram before its rows are normalised,
#                                dloss/dA_ij = b_s_i A_ij + a_i K_ij + c_s_i sign(A_ij)
#                                dloss/dK_ij = b_t_i K_ij + a_i A_ij + c_t_i sign(K_ij)
#                            constants where rows are not normalised; kernel="rbf_taylor" ignores it
#   gram_student  [G, n, n]  resident: A, factored: S^T S, streamed: empty (n = 0)
#   gram_teacher  [G, m, m]  resident: K, factored: T^T T, streamed: empty
#   cross         [G, m, n]  factored: T^T S, otherwise empty
# With normalize="feature", S and T stand for the normalised features throughout. `algorithm` is
# "resident", "streamed" or "factored" (see `choose_algorithm`).


def factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of S^T S and its like for features of a dtype: the definition in 16 bits rounds far more than
    fp32 factors do."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def _fwd_fake(
    student: Tensor,
    teacher: Tensor,
    normalize: str,
    kernel: str,
    gamma: float,
    order: int,
    algorithm: str,
    backend: str,
) -> tuple[Tensor, ...]:
    G, B, D_s = student.shape
    D_t = teacher.shape[2]
    acc = _checks.accumulation_dtype(student.dtype)
    n_s, n_t = {"resident": (B, B), "streamed": (0, 0), "factored": (D_s, D_t)}[algorithm]
    m, n = (D_t, D_s) if algorithm == "factored" else (0, 0)
    shapes = ((G,), (G, 5, B), (G, n_s, n_s), (G, n_t, n_t), (G, m, n))
    factors = factor_dtype(student.dtype) if algorithm == "factored" else acc
    dtypes = (acc, torch.float64, factors, factors, factors)
    return tuple(student.new_empty(n, dtype=d) for n, d in zip(shapes, dtypes, strict=True))


def _bwd_fake(
    dout: Tensor, student: Tensor, teacher: Tensor, coef: Tensor, gram_student: Tensor,
    gram_teacher: Tensor, cross: Tensor, need_student: bool, need_teacher: bool, *options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        student.new_empty(student.shape if need_student else (0,)),
        teacher.new_empty(teacher.shape if need_teacher else (0,)),
    )


_OPTIONS = "str normalize, str kernel, float gamma, int order, str algorithm, str backend"
_fwd = define_operator(
    "gram_mse",
    "fwd",
    f"(Tensor student, Tensor teacher, {_OPTIONS}) "
    "-> (Tensor loss, Tensor coef, Tensor gram_student, Tensor gram_teacher, Tensor cross)",
    _fwd_fake,
)
_bwd = define_operator(
    "gram_mse",
    "bwd",
    "(Tensor dout, Tensor student, Tensor teacher, Tensor coef, Tensor gram_student, "
    f"Tensor gram_teacher, Tensor cross, bool need_student, bool need_teacher, {_OPTIONS}) "
    "-> (Tensor dstudent, Tensor dteacher)",
    _bwd_fake,
)


class GramMSEFunction(KernelFunction):
    """Attaches the operator pair to autograd, and the reduction to both."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        reduction: str,
        scale: float,
        options: tuple[Any, ...],
    ) -> Tensor:
        loss, *residuals = _fwd(_grouped(student), _grouped(teacher), *options)
        keep_for_backward(ctx, student, teacher, *residuals)
        ctx.scale, ctx.options = scale, options
        if reduction == "none" or student.dim() == 2:  # one group, whose loss is the sum
            loss = loss.reshape(student.shape[:-2])
        else:
            loss = loss.sum()
        return loss * scale  # it must not be a view: users change losses in place

    @staticmethod
    @first_order
    def backward(ctx: Any, kept: tuple[Tensor, ...], dout: Tensor) -> tuple[Any, ...]:
        student, teacher, *residuals = kept
        s, t = _grouped(student), _grouped(teacher)
        dloss = (dout * ctx.scale).reshape(-1).expand(len(s))
        need_student, need_teacher = ctx.needs_input_grad[:2]
        ds, dt = _bwd(dloss, s, t, *residuals, need_student, need_teacher, *ctx.options)
        return (
            ds.reshape(student.shape) if need_student else None,
            dt.reshape(teacher.shape) if need_teacher else None,
            None,
            None,
            None,
        )


def _grouped(x: Tensor) -> Tensor:
    """[..., B, D] -> [G, B, D]"""
    return x.unsqueeze(0) if x.dim() == 2 else x.flatten(0, -3) if x.dim() > 3 else x


def _no_factors(normalize: str, kernel: str) -> str | None:
    """Why the loss is no quadratic form in D x D factors; None if it is."""
    if kernel != "linear":
        return f"kernel={kernel!r} is not linear in the Grams"
    if normalize == "row_l1":
        return "normalize='row_l1' needs |A_ij| of every pair"
    return None


def _multiply_adds(B: int, D_s: int, D_t: int, normalize: str) -> tuple[float, float]:
    """Of one forward and backward for the student: (tiled, factored).

    Each symmetric product counts half. `resident` keeps both Grams for the backward, `streamed`
    computes them again.
    """
    half_grams = B * B * (D_s + D_t) / 2
    tiled = half_grams * (1 if _fits(B, D_s, D_t) else 2) + B * B * D_s
    factored = B * (D_s * D_s + D_t * D_t) / 2 + B * D_s * D_t
    if normalize == "row_l2":
        factored += B * (D_s * D_s + D_t * D_t) / 2 + B * D_s * D_t  # row norms and row dots
        factored += B * (2.5 * D_s * D_s + 3 * D_s * D_t)  # gradient
    else:
        factored += B * (D_s * D_s + D_s * D_t)
    return tiled, factored


def weight_of_factored(dtype: torch.dtype, device: torch.device, backend: str = "auto") -> float:
    """How many multiply-adds of the tiled algorithm one of the factored algorithm counts as, for
    features of a dtype on a backend that was asked for; infinity if it has no kernel for factors.

    On the CPU fp32 features are multiplied with factors in fp64, at half of the rate of fp32,
    unless they turn out to be unrelated. GPUs multiply in fp64 at anything from the rate of fp32 to
    1 / 64 of it: 8 is in the middle.
    """
    if backend == "cuda":
        return math.inf
    if dtype != torch.float32:
        return 1.0
    # Dynamo cannot trace the setting of torch (2.13): a compiled graph takes it to be the default
    if backend == "triton" and (torch.compiler.is_compiling() or fp32_matmul() == "highest"):
        return math.inf
    return 8.0 if device.type == "cuda" else 2.0


def _fits(B: int, D_s: int, D_t: int) -> bool:
    """Whether a B x B Gram is no larger than the features it comes from."""
    return max(D_s, D_t) >= B


def choose_algorithm(
    B: int,
    D_s: int,
    D_t: int,
    *,
    normalize: str,
    kernel: str,
    algorithm: str,
    factored_counts: float = 1.0,
) -> str:
    """ "resident", "streamed" (the two forms of "tiled") or "factored": what a call runs.

    `resident` keeps both B x B Grams from the forward for the backward, where they are no larger
    than the features; `streamed` computes their tiles again; `factored` replaces every B x B
    product by D x D ones. "auto" takes what needs fewer multiply-adds, where those of `factored`
    count `factored_counts` times.
    """
    obstacle = _no_factors(normalize, kernel)
    if algorithm == "factored" and obstacle is not None:
        raise ValueError(f"algorithm must be 'tiled' or 'auto' here, got 'factored': {obstacle}")
    if algorithm == "auto" and obstacle is None:
        tiled, factored = _multiply_adds(B, D_s, D_t, normalize)
        algorithm = "factored" if factored_counts * factored < tiled else "tiled"
    if algorithm == "factored":
        return "factored"
    return "resident" if _fits(B, D_s, D_t) else "streamed"


def _check(
    student: Tensor,
    teacher: Tensor,
    normalize: str,
    kernel: str,
    gamma: float,
    order: int,
    algorithm: str,
    sample_mask: Tensor | None,
    reduction: str,
    backend: str,
) -> tuple[Any, ...]:
    """The dtype of both sides, and the options as the operators take them."""
    _checks.features("student", student)
    _checks.features("teacher", teacher)
    _checks.same_device("teacher", teacher, "student", student)
    _checks.same_leading("teacher", teacher, "student", student)
    dtype = _checks.common_dtype(student.dtype, teacher.dtype)
    _checks.choice("normalize", normalize, NORMALIZATIONS)
    _checks.choice("kernel", kernel, KERNELS)
    _checks.choice("algorithm", algorithm, ALGORITHMS)
    _checks.choice("reduction", reduction, REDUCTIONS)
    _checks.sample_mask(sample_mask, "student", student)
    gamma, order = _checks.positive("gamma", gamma), _checks.count("order", order, 1, MAX_ORDER)
    if kernel == "rbf_taylor" and normalize not in ("feature", "none"):
        raise ValueError(
            f"normalize must be 'feature' or 'none' with kernel='rbf_taylor', got {normalize!r}"
        )
    B, D_s, D_t = student.shape[-2], student.shape[-1], teacher.shape[-1]
    chosen = choose_algorithm(
        B, D_s, D_t, normalize=normalize, kernel=kernel, algorithm=algorithm,
        factored_counts=weight_of_factored(dtype, student.device, backend),
    )  # fmt: skip
    return dtype, normalize, kernel, gamma, order, chosen


def _operator_args(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Any, ...]:
    dtype, *checked = _check(student, teacher, **options, backend=requested_backend("auto"))

    def grouped(x: Tensor) -> TensorForm:
        return form(x, dtype=dtype, shape=(x.shape[:-2].numel(), *x.shape[-2:]))

    return grouped(student), grouped(teacher), *checked


def _choices(
    student: Tensor, teacher: Tensor, normalize: str, kernel: str, algorithm: str, **_: Any
) -> dict[str, str]:
    B, D_s, D_t = student.shape[-2], student.shape[-1], teacher.shape[-1]
    dtype = _checks.common_dtype(student.dtype, teacher.dtype)
    backend = requested_backend("auto")
    counts = weight_of_factored(dtype, student.device, backend)
    chosen = choose_algorithm(
        B, D_s, D_t, normalize=normalize, kernel=kernel, algorithm=algorithm,
        factored_counts=counts,
    )  # fmt: skip
    name = chosen if chosen == "factored" else f"tiled, {chosen}"
    tiled, factored = _multiply_adds(B, D_s, D_t, normalize)
    reason = f"{tiled / 1e9:.3g} G multiply-adds tiled, {factored / 1e9:.3g} G factored"
    if counts == math.inf:
        reason = f"{backend} has no kernel for factors of {str(dtype)[6:]} features here"
    elif counts != 1:
        reason += f", which count {counts:g} times: fp32 features are multiplied in fp64"
    if algorithm != "auto":
        reason = "asked for"
    return {"algorithm": f"{name} ({_no_factors(normalize, kernel) or reason})"}


def _reduced(
    sums: Tensor,  # [...]
    sample_mask: Tensor,  # [..., B]
    reduction: str,
) -> Tensor:
    """The result, from the sum over the entries of each group; rows that do not count are zeros."""
    if reduction == "sum":
        return sums.sum()
    rows = sample_mask.sum(-1)
    losses = sums / (rows * rows).clamp_min(1)
    return losses if reduction == "none" else losses.sum() / (rows > 0).sum().clamp_min(1)


@explained_by(_operator_args, _choices)
def gram_mse(
    student: Tensor,  # [..., B, D_s]
    teacher: Tensor,  # [..., B, D_t]
    *,
    normalize: Literal["row_l2", "row_l1", "feature", "none"] = "row_l2",
    kernel: Literal["linear", "rbf_taylor"] = "linear",
    gamma: float = 0.4,
    order: int = 2,
    algorithm: Literal["auto", "tiled", "factored"] = "auto",
    sample_mask: Tensor | None = None,  # [..., B]
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: Backend = "auto",
) -> Tensor:
    r"""Mean squared difference between the Gram matrices of student and teacher features.

    With A = S S^T, and G(A) = A normalised as asked, the value per group of B rows is

        (1 / B^2) sum_ij (G(A_student) - G(A_teacher))_ij^2.

    The defaults are the similarity-preserving loss. No B x B matrix is formed when B exceeds the
    feature width.

    Args:
        student: Features, [..., B, D_s]. Leading dimensions are independent groups. Any strides.
        teacher: Features, [..., B, D_t], on the same device; the wider dtype is taken where they
            differ. Receives a gradient only if it requires one.
        normalize: "row_l2" and "row_l1" divide each row of A by its norm (clamped at 1e-12 as in
            `F.normalize`); "feature" normalises the features, so A holds cosines; "none" leaves A
            as it is.
        kernel: "rbf_taylor" replaces each entry s of A by exp(-2 gamma) sum_p (2 gamma s)^p / p!, p
            = 0...order, the Gaussian kernel of unit vectors expanded at 0. It takes
            normalize="feature" or "none".
        gamma, order: Of "rbf_taylor": gamma > 0, order from 1 to 8.
        algorithm: "tiled" sweeps tiles of the Grams, "factored" replaces them by D x D products
            (normalize="row_l2", "feature" or "none" with the linear kernel), "auto" takes the one
            with fewer multiply-adds. Those of "factored" are in fp64 for fp32 features, and count
            accordingly. A backend that is asked for and has no such kernel gets "tiled".
        sample_mask: Which rows count, bool [..., B]: the value of a group is that of its rows that
            count, with their number in the place of B, and a group without one is left out of the
            mean over groups. The other rows may hold anything, and their gradient is 0. They are
            taken as zeros, so they cost the time of rows that count, and nothing waits for a
            device. None: all rows.
        reduction: "mean" over B^2 entries and all groups; "sum" of the squared differences,
            undivided; "none" gives the mean over B^2 of each group, shape [...].
        backend: See `kdkernels.explain`.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or shape [...] for reduction="none". 0 for an empty
        batch.

    Raises:
        TypeError: not a floating tensor, or a mask that is not bool.
        ValueError: shapes, devices or options do not fit, naming the argument.
        BackendUnavailableError: `backend` cannot run this call, with the reason.

    Reference:
        Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv:1907.09682;
        Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019, arXiv:1904.01802
        ("rbf_taylor").
    """
    backend = requested_backend(backend)
    dtype, *options = _check(
        student,
        teacher,
        normalize,
        kernel,
        gamma,
        order,
        algorithm,
        sample_mask,
        reduction,
        backend,
    )
    student, teacher = _checks.in_dtype(dtype, student, teacher)
    if teacher is student:  # Dynamo passes no tensor to a Function twice (torch 2.13)
        teacher = student.view_as(student)
    options = (*options, backend)
    if sample_mask is not None:
        student, teacher = _rows.zeroed(sample_mask, student, teacher)
        sums = GramMSEFunction.apply(student, teacher, "none", 1.0, options)
        return _reduced(sums, sample_mask, reduction)
    B = student.shape[-2]
    scale = 1.0 if reduction == "sum" else 1.0 / max(B * B, 1)
    if reduction == "mean":
        scale /= max(student.shape[:-2].numel(), 1)
    return GramMSEFunction.apply(student, teacher, reduction, scale, options)
