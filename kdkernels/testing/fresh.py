# SPDX-License-Identifier: Apache-2.0
"""Calls a function in a process of its own: forked from one that has imported and done nothing
else, since importing torch anew takes longer than most of what is measured."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import traceback
from typing import Any


def call(module: str, function: str, *args: Any) -> Any:
    """The result of a module's function.

    Raises:
        RuntimeError: with the traceback of what the function raised, or how its process ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])  # for the first call of a process
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_run, args=(sender, dict(os.environ), module, function, args), daemon=True
    )
    process.start()
    sender.close()
    try:
        succeeded, result = receiver.recv()
    except EOFError:
        succeeded, result = False, None
    process.join()
    if not succeeded:
        reason = f"its process ended with exit status {process.exitcode}"
        raise RuntimeError(f"{module}.{function} failed: {result or reason}")
    return result


def _run(
    sender: Any, environment: dict[str, str], module: str, function: str, args: tuple[Any, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    try:
        result = getattr(importlib.import_module(module), function)(*args)
    except Exception:
        sender.send((False, traceback.format_exc()))
        sys.exit(1)
    sender.send((True, result))
