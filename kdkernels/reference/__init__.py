# SPDX-License-Identifier: Apache-2.0
"""Pure PyTorch: the definitions that the tests trust, and the backend that runs everywhere.

The public functions of the package by the same names, with the same arguments less `backend` and
`algorithm`, which choose how a value is computed. They read like the equations, hold every matrix
that appears in them, and torch differentiates them any number of times. A result has the dtype of
the features.

The module `_<op>` holds the literal definition of an op and its operators in closed form, with the
residuals that every other backend returns too.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from torch import Tensor

from kdkernels.reference._contrastive import contrastive_loss
from kdkernels.reference._correlation import correlation
from kdkernels.reference._gram_mse import gram_mse
from kdkernels.reference._lsh_bce import lsh_bce, lsh_encode
from kdkernels.reference._pairwise import pairwise
from kdkernels.reference._pkt import pkt
from kdkernels.reference._relational_kl import info_nce, relational_kl
from kdkernels.reference._rkd import rkd_angle, rkd_distance
from kdkernels.reference._sampled_similarity import sampled_similarity
from kdkernels.reference._triplet import mine_triplets
from kdkernels.reference._triplet_distillation import triplet_distillation
from kdkernels.reference._triplet_loss import triplet_loss

__all__ = [
    "contrastive_loss",
    "correlation",
    "gram_mse",
    "info_nce",
    "lsh_bce",
    "lsh_encode",
    "mine_triplets",
    "pairwise",
    "pkt",
    "relational_kl",
    "rkd_angle",
    "rkd_distance",
    "sampled_similarity",
    "triplet_distillation",
    "triplet_loss",
]


def unavailable() -> str | None:
    """Why this backend is missing from the installation; None, since it never is."""
    return None


def rejects(tensors: list[Tensor]) -> str | None:
    """Why these tensors cannot be handled; None, since any dtype and device can."""
    return None


def launchers(op: str) -> ModuleType | None:
    """The module that holds the operators of an op; None where there is none."""
    name = f"{__name__}._{op}"
    return None if importlib.util.find_spec(name) is None else importlib.import_module(name)
