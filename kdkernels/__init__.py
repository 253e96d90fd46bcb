# SPDX-License-Identifier: Apache-2.0
"""Fast kernels for knowledge-distillation and metric-learning losses at large batch."""

from kdkernels import nn
from kdkernels._dispatch import BackendUnavailableError, explain, use_backend
from kdkernels._version import __version__
from kdkernels.ops.gram_mse import gram_mse

__all__ = ["BackendUnavailableError", "__version__", "explain", "gram_mse", "nn", "use_backend"]
