# SPDX-License-Identifier: Apache-2.0
"""Other tiles in the place of those that Triton's launchers choose, to be compiled and timed."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest import mock

SIZES, STEPS, WARPS, STAGES = (64, 128, 256), (16, 32, 64, 128), (4, 8), (2, 3, 4)
MOST_ELEMENTS = 256 * 128  # of an output tile: more accumulators than registers hold

Tiles = Mapping[str, Any]  # name -> kdkernels.triton.common.launch.Tile


@dataclass(frozen=True)
class Chooser:
    """The function of an op that chooses its tiles, and what they are called."""

    module: str
    function: str
    names: tuple[str, ...]  # of the tiles that it returns, in its order
    square: tuple[str, ...] = ()  # tiles that are mirrored
    fits: Callable[[Tiles], bool] = lambda tiles: True  # what kernels assume of all of them

    def named(self, chosen: Any) -> dict[str, Any]:
        tiles = chosen if isinstance(chosen, tuple) else (chosen,)
        return dict(zip(self.names, tiles, strict=True))

    @contextlib.contextmanager
    def _wrapped(self, wrap: Callable[[dict[str, Any]], Tiles]) -> Iterator[None]:
        module = importlib.import_module(self.module)
        choose = getattr(module, self.function)

        def chosen(*args: Any, **kwargs: Any) -> Any:
            tiles = wrap(self.named(choose(*args, **kwargs)))
            return tuple(tiles.values()) if len(tiles) > 1 else tiles[self.names[0]]

        _forget_configurations()
        try:
            with mock.patch.object(module, self.function, chosen):
                yield
        finally:
            _forget_configurations()

    @contextlib.contextmanager
    def seen(self) -> Iterator[dict[str, Any]]:
        """Yields a dictionary that calls fill with the tiles that they choose."""
        found: dict[str, Any] = {}

        def look(tiles: dict[str, Any]) -> Tiles:
            found.update(tiles)
            return tiles

        with self._wrapped(look):
            yield found

    def replaced(self, name: str, tile: Any) -> contextlib.AbstractContextManager[None]:
        """Calls inside take this tile instead; what follows from the tiles follows from it."""
        return self._wrapped(lambda tiles: {**tiles, name: tile})

    def candidates(self, name: str, tiles: Tiles, most: int) -> list[Any]:
        """Tiles to try in place of one of `tiles`, those first that differ least."""
        default = tiles[name]
        found = [
            replace(default, m=m, n=n, k=k, num_warps=num_warps, num_stages=num_stages)
            for m, n, k, num_warps, num_stages in itertools.product(
                SIZES, SIZES, STEPS, WARPS, STAGES
            )
            if m * n <= MOST_ELEMENTS and (m == n or name not in self.square)
        ]

        def differences(tile: Any) -> int:
            return sum(value != asdict(default)[field] for field, value in asdict(tile).items())

        able = [tile for tile in found if tile != default and self.fits({**tiles, name: tile})]
        return sorted(able, key=differences)[:most]


CHOOSERS = {
    "gram_mse": Chooser(
        "kdkernels.triton.gram_mse.config", "_tiles",
        ("product", "pair", "pair_weights", "weighted", "row", "factored"),
        square=("product", "pair"),
    ),
    "lsh_bce": Chooser("kdkernels.triton.lsh_bce.config", "_tiles", ("project", "product")),
    "relational_kl": Chooser(
        "kdkernels.triton.relational_kl.config", "_tiles", ("logits", "product"),
        fits=lambda tiles: tiles["logits"].n % tiles["product"].k == 0,
    ),
    "triplet": Chooser("kdkernels.triton.triplet.config", "_tile", ("tile",)),
}  # fmt: skip


def _forget_configurations() -> None:
    """Launchers keep what they chose for arguments that they have seen."""
    modules = [m for name, m in sys.modules.items() if name.startswith("kdkernels.triton.")]
    for value in itertools.chain.from_iterable(vars(module).values() for module in modules):
        forget = getattr(value, "cache_clear", None)
        if callable(forget):
            forget()
