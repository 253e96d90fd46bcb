# SPDX-License-Identifier: Apache-2.0
"""Small convolutional networks that return their last map beside the logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

CLASSES = 10
EVALUATION_BATCH = 2000


@dataclass(frozen=True)
class Outputs:
    """What a network says about a batch."""

    features: Tensor  # [B, C, ...] the last map, after its ReLU
    logits: Tensor  # [B, CLASSES]

    def __getitem__(self, index: Tensor) -> Outputs:
        return Outputs(self.features[index], self.logits[index])


class ConvNet(nn.Module):
    """Convolution, batch normalisation, ReLU, repeated; a linear head on the flat last map."""

    def __init__(
        self,
        input_shape: Sequence[int],
        channels: Sequence[int],
        strides: Sequence[int],
        kernel: int,
    ) -> None:
        super().__init__()
        one_dimensional = len(input_shape) == 2
        convolution = nn.Conv1d if one_dimensional else nn.Conv2d
        normalisation = nn.BatchNorm1d if one_dimensional else nn.BatchNorm2d
        layers: list[nn.Module] = []
        width = input_shape[0]
        for out, stride in zip(channels, strides, strict=True):
            layers += [
                convolution(width, out, kernel, stride=stride, padding=kernel // 2, bias=False),
                normalisation(out),
                nn.ReLU(),
            ]
            width = out
        self.body = nn.Sequential(*layers)
        with torch.no_grad():
            size = self.body(torch.zeros(2, *input_shape)).flatten(1).shape[1]
        self.body.apply(_reset_statistics)  # the trial above must leave no trace
        self.head = nn.Linear(size, CLASSES)

    def forward(
        self,
        x: Tensor,  # [B, 1, ...]
    ) -> Outputs:
        features = self.body(x)
        return Outputs(features, self.head(features.flatten(1)))


def _reset_statistics(module: nn.Module) -> None:
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        module.reset_running_stats()


@dataclass(frozen=True)
class Recipe:
    """Both networks for a data set, and how long and at which batch they train."""

    kernel: int
    teacher_channels: tuple[int, ...]
    teacher_strides: tuple[int, ...]
    teacher_epochs: int
    teacher_batch: int
    student_channels: tuple[int, ...]
    student_strides: tuple[int, ...]
    student_epochs: int
    student_batch: int

    def teacher(self, input_shape: Sequence[int]) -> ConvNet:
        return ConvNet(input_shape, self.teacher_channels, self.teacher_strides, self.kernel)

    def student(self, input_shape: Sequence[int]) -> ConvNet:
        return ConvNet(input_shape, self.student_channels, self.student_strides, self.kernel)


# The student's batch is half of the training set (mnist1d), or nearly all of it (digits): as large
# as it can be.
RECIPES = {
    "mnist1d": Recipe(
        5, (64, 128, 128, 64), (2, 2, 2, 1), 30, 250, (12, 12, 12), (2, 2, 2), 160, 2000
    ),
    "digits": Recipe(3, (32, 64, 64), (1, 2, 2), 20, 128, (4, 4, 8), (2, 1, 2), 160, 1400),
}


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
