# SPDX-License-Identifier: Apache-2.0
"""Memory that a call makes resident, in a process of its own.

Native scratch goes around torch's allocator, so it is the system that has to be asked. It keeps
only the highest resident size so far, and what came before (importing torch, inputs) may have
peaked above what is held now. So before the call, memory is taken and touched until that record
starts to rise: from there on every further byte shows. glibc maps large blocks and gives them back
one by one; by default it would keep some of the freed ones, and the peak of one call was seen to
vary by a third with how the next ones happened to fit.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

_BLOCK_BYTES = 256 * 1024
_M_MMAP_THRESHOLD = -3  # malloc.h
_BYTES_PER_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def why_not() -> str | None:
    """Why resident memory cannot be measured on this machine; None if it can."""
    if sys.platform == "win32":
        return "the highest resident size of a process is not to be had on this system"
    return None


def extra_bytes(call: Callable[[], object]) -> int:
    """Most bytes resident during the call, above what is resident before it."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES)
        libc.malloc_trim(0)  # what was freed before would hide as much of what comes
    ballast = _fill_to_the_record()
    before = _highest_bytes()
    call()
    extra = _highest_bytes() - before
    del ballast  # held until here
    return extra


def _highest_bytes() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES_PER_UNIT


def _fill_to_the_record() -> list[bytearray]:
    record = _highest_bytes()
    blocks = []
    while _highest_bytes() < record + 4 * _BLOCK_BYTES:
        block = bytearray(_BLOCK_BYTES)
        block[::4096] = b"\x01" * len(block[::4096])  # untouched pages are not resident
        blocks.append(block)
    return blocks
