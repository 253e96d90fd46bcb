# SPDX-License-Identifier: Apache-2.0
"""A limit of time after which nothing new begins, for machines that are lent for minutes."""

from __future__ import annotations

import time


class Limit:
    """Counts from when it is made; None never ends."""

    def __init__(self, seconds: float | None = None) -> None:
        self._seconds = seconds
        self._begin = time.monotonic()

    def left(self) -> float | None:
        """Seconds."""
        if self._seconds is None:
            return None
        return self._seconds - (time.monotonic() - self._begin)

    def over(self) -> str | None:
        """Why nothing new may begin; None while it may."""
        left = self.left()
        if left is None or left > 0:
            return None
        return f"the limit of {self._seconds:g} s was over"
