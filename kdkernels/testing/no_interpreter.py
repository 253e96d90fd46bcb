# SPDX-License-Identifier: Apache-2.0
"""Python in a process of its own where kernels are compiled: Triton decides between its compiler
and its interpreter when it is imported, and the tests import it for the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


def printed(*arguments: Any, **variables: str) -> str:
    """What `python` with these arguments prints, with more environment variables if given.

    Raises:
        RuntimeError: it failed, with the last of its words.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"python {arguments[0]} failed:\n{done.stderr[-4000:]}")
    return done.stdout
