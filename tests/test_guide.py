"""The guide does what it says: every block of Python in docs/guide*.md runs, in order, chapter by chapter."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
CHAPTERS = sorted(DOCS.glob("guide*.md"))

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(NamedTuple):
    """A fenced block of Python: its code, and the line of the file where the code begins."""

    code: str
    line: int


def blocks_of(text: str) -> Iterator[Block]:
    """The blocks fenced by ```python, in order; a fence that is never closed reaches to the end."""
    for match in re.finditer(r"^```python\n(.*?)(?:^```$|\Z)", text, re.M | re.S):
        yield Block(match[1], text.count("\n", 0, match.start(1)) + 1)


def run_blocks(text: str, name: str) -> int:
    """Run every block in one namespace, and return how many there were.

    Raises:
        AssertionError: a block failed; says file and line of the block and of the statement, and why.
    """
    namespace: dict[str, Any] = {"__name__": name}
    blocks = list(blocks_of(text))
    for block in blocks:
        try:
            # Empty lines before the code make its line numbers those of the file.
            exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)
        except Exception as error:
            raise AssertionError(
                f"{name}:{_line_of(error, name) or block.line}: in the block of line {block.line}: "
                f"{type(error).__name__}: {error}"
            ) from error
    return len(blocks)


def _line_of(error: Exception, name: str) -> int | None:
    """The last line of the file that the error passed through."""
    if isinstance(error, SyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == name]
    return lines[-1] if lines else None


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_block_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    try:
        count = run_blocks(path.read_text(encoding="utf-8"), f"docs/{path.name}")
    finally:
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
    assert count > 0 or path.name == "guide.md"


def test_the_guide_names_every_chapter() -> None:
    guide = (DOCS / "guide.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\]\((guide_\w+\.md)\)", guide))
    assert {path.name for path in CHAPTERS} - {"guide.md"} <= named


STORY = """# Title

```python
first = 1
```

```bash
not python
```

```python
def two():
    return first / 0


second = two()
```
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("", ""), r"docs/x\.md:13: in the block of line 12: ZeroDivisionError"),
        (("first / 0", "third"), r"docs/x\.md:13: in the block of line 12: NameError: .*third"),
        (("first = 1", "first = ("), r"docs/x\.md:4: in the block of line 4: SyntaxError"),
        (("first = 1", "assert False, 'no'"), r"docs/x\.md:4: .* AssertionError: no"),
    ],
)
def test_a_block_that_fails_is_named(change: tuple[str, str], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_blocks(STORY.replace(*change), "docs/x.md")


def test_blocks_share_a_namespace_and_others_are_left_out() -> None:
    assert run_blocks(STORY.replace("/ 0", "+ 1"), "docs/x.md") == 2
    assert [block.line for block in blocks_of(STORY)] == [4, 12]
    assert [block.code for block in blocks_of("```python\nopen")] == ["open"]
