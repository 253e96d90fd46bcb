# SPDX-License-Identifier: Apache-2.0
"""Takes work out of Triton's interpreter that changes no result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

# What Triton has in the place of each patch: owner, attribute, value.
_originals: list[tuple[Any, str, Any]] = []


def use() -> None:
    """Twice as fast with triton 3.7; what another version does not have stays as it is."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    if hasattr(interpreter, "_patch_lang"):
        once = _once_per_launch(interpreter._patch_lang, interpreter, tl)
        _replace(interpreter, "_patch_lang", once)
    if hasattr(interpreter, "_get_np_dtype"):
        _replace(interpreter, "_get_np_dtype", _by_name(interpreter._get_np_dtype))
    builder = getattr(interpreter, "interpreter_builder", None)
    if builder is not None and not builder.options.debug:  # overflows are computed, not reported
        _replace(builder, "options", replace(builder.options, sanitize_overflow=False))


@contextmanager
def unpatched() -> Iterator[int]:
    """Triton's own interpreter; yields the number of patches that were taken away."""
    patches = [(owner, name, getattr(owner, name)) for owner, name, _ in _originals]
    try:
        for owner, name, value in _originals:
            setattr(owner, name, value)
        yield len(patches)
    finally:
        for owner, name, value in patches:
            setattr(owner, name, value)


def _replace(owner: Any, name: str, value: Any) -> None:
    _originals.append((owner, name, getattr(owner, name)))
    setattr(owner, name, value)


def _once_per_launch(patch: Any, interpreter: Any, tl: Any) -> Any:
    """A launch replaces the functions of `triton.language`, and each call of a device function in
    it would replace them by the same again, looking through whole modules."""

    @cache
    def modules(function: Any) -> tuple[Any, ...]:
        found = function.__globals__.values()
        return tuple(module for module in (tl, tl.core) if any(value is module for value in found))

    def patch_once(function: Any) -> Any:
        if any(tl.core.is_builtin(module.load) for module in modules(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    return patch_once


def _by_name(convert: Any) -> Any:
    """Without a table of all types for each number."""
    known: dict[str, Any] = {}

    def converted(type: Any) -> Any:
        name = str(type)
        if name not in known:
            known[name] = convert(type)
        return known[name]

    return converted
