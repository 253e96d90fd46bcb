# SPDX-License-Identifier: Apache-2.0
"""One `torch.nn.Module` per published loss, with the paper's defaults.

Where public implementations of a loss disagree, `preset` names whose meaning is computed. A module
multiplies by its `weight`, treats the teacher as a constant and keeps all of its state in
`state_dict`; the mathematics is in `kdkernels.ops`.
"""

from kdkernels.nn.correlation_congruence import CorrelationCongruenceLoss
from kdkernels.nn.intra_utterance_similarity import IntraUtteranceSimilarityLoss
from kdkernels.nn.similarity_preserving import SimilarityPreservingLoss

__all__ = ["CorrelationCongruenceLoss", "IntraUtteranceSimilarityLoss", "SimilarityPreservingLoss"]
