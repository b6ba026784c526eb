"""Interpreted kernels at less than half their cost: Triton's interpreter without work of which nothing comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def save_time() -> None:
    """Where this Triton has what it takes: these are names of its own, of 3.9."""
    if hasattr(interpreter, "_patch_lang"):
        _patch_language_once_a_launch()
    # Of every sum and product of integers it computes whether they overflow, and asserts it only in debug mode.
    builder = interpreter.interpreter_builder
    options = getattr(builder, "options", None)
    if hasattr(options, "sanitize_overflow") and not options.debug:
        builder.options = replace(options, sanitize_overflow=False)


def _patch_language_once_a_launch() -> None:
    """At a launch, and at each call of a device function, the interpreter looks at all that ``triton.language`` has,
    for what it has yet to replace. In a call that is nothing but the first time, and took half of the suite's time.
    """
    patch = interpreter._patch_lang

    def patch_unless_patched(function: Callable[..., Any]) -> Any:
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if not languages or any(tl.core.is_builtin(language.load) for language in languages):
            return patch(function)
        return None

    interpreter._patch_lang = patch_unless_patched
