# SPDX-License-Identifier: Apache-2.0
"""The data sets of the demo, loaded or generated on this machine; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

TEST_SHARE = 0.2  # of digits, which comes without a split
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Data:
    """Inputs with one channel, and labels."""

    name: str
    x: Tensor  # [N, 1, ...] fp32
    y: Tensor  # [N] int64
    x_test: Tensor  # [N_test, 1, ...] fp32
    y_test: Tensor  # [N_test] int64

    def to(self, device: torch.device) -> Data:
        return Data(
            self.name, *(tensor.to(device) for tensor in (self.x, self.y, self.x_test, self.y_test))
        )


@dataclass(frozen=True)
class Source:
    """Where a data set comes from."""

    load: Callable[[], Data]
    module: str  # that must be importable
    package: str  # that holds it
    description: str


def cache_directory() -> Path:
    """`kdkernels` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdkernels"


def missing_package(source: Source) -> str | None:
    """The package to install before `source` can be loaded; None if it is there."""
    return None if importlib.util.find_spec(source.module) else source.package


def _mnist1d() -> Data:
    """MNIST-1D (Greydanus, 2020, arXiv:2011.14439) with its published arguments, cached."""
    import numpy as np

    path = cache_directory() / f"mnist1d-{version('mnist1d')}.npz"
    if not path.exists():
        _save_generated(path)
    with np.load(path) as arrays:
        x, y, x_test, y_test = (
            torch.from_numpy(arrays[name]) for name in ("x", "y", "x_test", "y_test")
        )
    return Data("mnist1d", x.float()[:, None], y.long(), x_test.float()[:, None], y_test.long())


def _save_generated(path: Path) -> None:
    import numpy as np
    from mnist1d.data import get_dataset_args, make_dataset

    generated = make_dataset(get_dataset_args())
    path.parent.mkdir(parents=True, exist_ok=True)
    # renamed when whole, so that an interrupted run leaves no half file behind
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
        np.savez_compressed(
            file, **{name: generated[name] for name in ("x", "y", "x_test", "y_test")}
        )
    os.replace(file.name, path)


def _digits() -> Data:
    """The 8 x 8 digits that ship with scikit-learn, split at random under a fixed seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images).float()[:, None] / 16  # grey levels are 0 ... 16
    y = torch.from_numpy(found.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    n_test = int(TEST_SHARE * len(x))
    test, train = order[:n_test], order[n_test:]
    return Data("digits", x[train], y[train], x[test], y[test])


SOURCES = {
    "mnist1d": Source(
        _mnist1d, "mnist1d", "mnist1d", "MNIST-1D: 4000 signals of 40 points, 1000 to test"
    ),
    "digits": Source(
        _digits,
        "sklearn",
        "scikit-learn",
        "scikit-learn's digits: 1438 images of 8 x 8, 359 to test",
    ),
}
