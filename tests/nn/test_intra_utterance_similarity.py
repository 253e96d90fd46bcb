# SPDX-License-Identifier: Apache-2.0
"""IntraUtteranceSimilarityLoss: the formula with plain loops, utterance by utterance."""

from __future__ import annotations

import torch
from modules import maps, similarity_preserving

import kdkernels as kd


def test_intra_utterance_similarity_is_the_mean_over_utterances() -> None:
    student, teacher = maps(3, 7, 4), maps(3, 7, 5)
    loss = kd.nn.IntraUtteranceSimilarityLoss(weight=5)(student, teacher)
    per_utterance = [similarity_preserving(s, t, 2) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(loss, 5 * torch.stack(per_utterance).mean())
    both = kd.nn.IntraUtteranceSimilarityLoss(weight=5)([student, student], [teacher, teacher])
    torch.testing.assert_close(both, 2 * loss)
