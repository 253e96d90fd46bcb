# SPDX-License-Identifier: Apache-2.0
"""One `torch.nn.Module` per published loss, with the paper's defaults.

Where public implementations of a loss disagree, `preset` names whose meaning is computed. A module
multiplies by its `weight`, treats the teacher as a constant and keeps all of its state in
`state_dict`; the mathematics is in `kdkernels.ops`. Student, teacher, keys and linear layers may
have different floating dtypes: what meets is computed in the wider one, and a gradient comes back
in the dtype of its own tensor.
"""

from kdkernels.nn.code_cache import CodeCache, encode_dataset, fingerprint
from kdkernels.nn.comparative import ComparativeLoss
from kdkernels.nn.contrastive import ContrastiveLoss
from kdkernels.nn.contrastive_learning import CLIPLoss, NTXentLoss, SupConLoss
from kdkernels.nn.correlation_congruence import CorrelationCongruenceLoss
from kdkernels.nn.correlation_distance import CorrelationDistanceLoss
from kdkernels.nn.crd import CRDLoss
from kdkernels.nn.dist import DISTLoss
from kdkernels.nn.info_nce import InfoNCELoss
from kdkernels.nn.intra_utterance_similarity import IntraUtteranceSimilarityLoss
from kdkernels.nn.key_queue import KeyQueue
from kdkernels.nn.lsh import LSHFeatureMimickingLoss
from kdkernels.nn.pkt import PKTLoss
from kdkernels.nn.relational_representation import RelationalRepresentationLoss
from kdkernels.nn.rkd import RKDLoss
from kdkernels.nn.similarity_distillation import SimilarityDistillationLoss
from kdkernels.nn.similarity_preserving import SimilarityPreservingLoss
from kdkernels.nn.triplet import (
    BatchAllTripletLoss,
    BatchHardTripletLoss,
    BatchSemiHardTripletLoss,
)
from kdkernels.nn.triplet_distillation import PairDistillationLoss, TripletDistillationLoss

__all__ = [
    "BatchAllTripletLoss",
    "BatchHardTripletLoss",
    "BatchSemiHardTripletLoss",
    "CLIPLoss",
    "CRDLoss",
    "CodeCache",
    "ComparativeLoss",
    "ContrastiveLoss",
    "CorrelationCongruenceLoss",
    "CorrelationDistanceLoss",
    "DISTLoss",
    "InfoNCELoss",
    "IntraUtteranceSimilarityLoss",
    "KeyQueue",
    "LSHFeatureMimickingLoss",
    "NTXentLoss",
    "PKTLoss",
    "PairDistillationLoss",
    "RKDLoss",
    "RelationalRepresentationLoss",
    "SimilarityDistillationLoss",
    "SimilarityPreservingLoss",
    "SupConLoss",
    "TripletDistillationLoss",
    "encode_dataset",
    "fingerprint",
]
