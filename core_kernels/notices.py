"""What a user is told who gets a slower path than asked for: once, and why."""

from __future__ import annotations

import functools
import warnings


@functools.cache
def say_once(sentence: str) -> None:
    """Warn, the first time in a process that there is this to say."""
    warnings.warn(f"twinhead: {sentence}. This is said once.", stacklevel=3)
