"""An extension of griffe: parameters that a docstring explains together have a row each in the reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

_NAME = r"\*{0,2}\w+"
_TOGETHER = re.compile(rf"    ({_NAME}(?:, {_NAME})+): ")


class ParameterRows(griffe.Extension):
    """Repeats what is said of several parameters for each of them: griffe knows one name a row."""

    def on_instance(self, *, obj: griffe.Object, **others: Any) -> None:
        """Rewrite a docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = separated(obj.docstring.value)


def separated(docstring: str) -> str:
    """The docstring with ``a, b: text`` among its arguments as ``a: text`` and ``b: text``."""
    found: list[str] = []
    lines = docstring.splitlines()
    within, at = False, 0
    while at < len(lines):
        line = lines[at]
        if line and not line.startswith(" "):
            within = line in ("Args:", "Attributes:")
        match = _TOGETHER.match(line) if within else None
        end = at + 1
        if match is None:
            found.append(line)
        else:
            while end < len(lines) and lines[end].startswith("     "):
                end += 1
            for name in match[1].split(", "):
                found += [f"    {name}: {line[match.end() :]}", *lines[at + 1 : end]]
        at = end
    return "\n".join(found)
