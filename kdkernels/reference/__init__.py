# SPDX-License-Identifier: Apache-2.0
"""Pure PyTorch: the definitions that the tests trust, and the backend that runs everywhere.

Each module holds the literal definition of its op (`<op>`, differentiable by autograd any number of
times) and the operator pair (`<op>_fwd`, `<op>_bwd`) in closed form, with the residuals that every
other backend returns too.
"""

from __future__ import annotations

from torch import Tensor


def unavailable() -> str | None:
    """Why this backend is missing from the installation; None, since it never is."""
    return None


def rejects(tensors: list[Tensor]) -> str | None:
    """Why these tensors cannot be handled; None, since any dtype and device can."""
    return None
