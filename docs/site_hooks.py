"""Hooks of mkdocs: pages that live outside ``docs/``, and links that lead there from everywhere."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
#: Files of the root → their pages.
PAGES = {
    "README.md": "index.md",
    "SPEC.md": "SPEC.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks/README.md": "benchmarks.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to where their targets stand in the site; those that have no page become plain text."""
    uri = page.file.src_uri
    source = next((name for name, each in PAGES.items() if each == uri), f"docs/{uri}")
    folder = PurePosixPath(source).parent

    def led(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        place = _resolved(folder / target)
        found = PAGES.get(place) or place.removeprefix("docs/")
        if place not in PAGES and not (ROOT / place).exists():
            return match[0]  # strict mode says that it is broken
        if place not in PAGES and not place.startswith("docs/"):
            return f"{text} (`{place}`)" if text.strip("`") != place else text
        up = "../" * (len(PurePosixPath(uri).parts) - 1)
        return f"[{text}]({up}{found}{anchor})"

    return re.sub(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)", led, markdown)


def _resolved(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)
