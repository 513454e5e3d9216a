"""Triton's interpreter in half the time, for tests.

At every call of a device function from a kernel it replaces some hundred functions of triton.language by its
own, which have been there since the kernel began.
"""

from __future__ import annotations

from typing import Any


def quicken_interpreter() -> None:
    """Let every device function replace them at its first call alone.

    What a kernel's start replaces is put back at its end, and replaced again by the next one's; what
    the functions of triton.language's own library need stays.
    """
    from triton.runtime.interpreter import InterpretedFunction

    replaces_first = InterpretedFunction.__call__
    called = set()

    def call(function: Any, *arguments: Any, **options: Any) -> Any:
        if function.fn in called:
            return function.rewrite()(*arguments, **options)
        called.add(function.fn)
        return replaces_first(function, *arguments, **options)

    InterpretedFunction.__call__ = call
