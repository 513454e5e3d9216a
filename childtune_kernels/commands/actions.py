"""What commands share: their help, ``--json``, running one, and the rule for files that it writes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Subparsers = argparse._SubParsersAction  # argparse has no public name for what add_subparsers gives


def add_parser(
    subparsers: Subparsers[argparse.ArgumentParser], name: str, what: str, *examples: str
) -> argparse.ArgumentParser:
    """Add a command, or an action of one.

    Args:
        subparsers: of the program or the command.
        name: as it is called.
        what: what it does, in a line.
        examples: what may stand after the name; shown under its help.
    """
    lines = "".join(f"  %(prog)s {example}".rstrip() + "\n" for example in examples)
    return subparsers.add_parser(
        name,
        help=what,
        description=what,
        epilog=f"examples:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, which every action has."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def print_json(report: Mapping[str, Any]) -> None:
    """Print what ``--json`` asks for; paths in it are text."""
    print(json.dumps(report, indent=2, default=os.fspath))


def run(options: argparse.Namespace) -> int:
    """Run ``options.act``; returns its code (None is 0), or 1 with one line about input that does not fit."""
    try:
        exit_code: int | None = options.act(options)
    except BrokenPipeError:
        raise  # nobody reads the output any more: no fault of the input, and no one to tell
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return exit_code or 0


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add ``--overwrite``, which every action that writes a file has."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an output file that exists (never an input, nor a folder that holds something)",
    )


def check_no_input(out: str | os.PathLike[str], inputs: Iterable[str | Path]) -> None:
    """Refuse to write onto an input, whether files may be overwritten or not.

    Raises:
        ValueError: ``out`` is one of the inputs, by whatever name.
    """
    for path in inputs:
        if os.path.exists(out) and os.path.exists(path) and os.path.samefile(out, path):
            raise ValueError(f"{out} is an input; name another file to write")


def check_output_file(out: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse, before any work, a file that cannot or must not be written.

    Args:
        out: the file to write.
        overwrite: whether a file that exists may be replaced.

    Raises:
        FileExistsError: ``out`` is a folder, or exists and ``overwrite`` is False.
        FileNotFoundError: its directory does not exist.
    """
    target = Path(out)
    if target.is_dir() or os.fspath(out).endswith(os.sep):
        raise FileExistsError(f"{out} is a folder; name a file to write")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{out} exists already; name another file, or say --overwrite")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no directory; make it first")
