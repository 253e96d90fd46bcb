# SPDX-License-Identifier: Apache-2.0
"""Takes work out of Triton's interpreter that changes no result."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any


def use() -> None:
    """Twice as fast with triton 3.7; what another version does not have stays as it is."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    if hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = _once_per_launch(interpreter._patch_lang, interpreter, tl)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    builder = getattr(interpreter, "interpreter_builder", None)
    if builder is not None and not builder.options.debug:  # overflows are computed, not reported
        builder.options = replace(builder.options, sanitize_overflow=False)


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
