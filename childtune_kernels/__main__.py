"""The command line: ``childtune`` or ``python -m childtune_kernels``; a module of ``commands`` a command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__
from .commands import bench, child, info, mask

INTERRUPTED = 130  # as shells report it
COMMANDS = (info, bench, child, mask)


def program(name: str) -> argparse.ArgumentParser:
    """The parser of all commands, for a program of this name."""
    parser = argparse.ArgumentParser(prog=name, description="Fused kernels for Child-Tuning.")
    parser.add_argument("--version", action="version", version=f"childtune_kernels {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 good, 1 a failed check, 2 bad usage)."""
    called = Path(sys.argv[0]).stem
    name = called if called == "childtune" else "python -m childtune_kernels"
    options = program(name).parse_args(arguments)
    exit_code: int = options.run(options)
    return exit_code


def run_as_program() -> int:
    """Run the command line on a terminal or pipe, silently where the pipe's reader has left.

    Returns:
        The exit code; 1 where nobody reads the output any more, or it cannot be written; 130 where the user
        interrupted it.
    """
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:  # as it is where the shell closed it
                sys.stdout.flush()  # here, for at exit nobody could catch what it raises
    except KeyboardInterrupt:  # somebody had enough of a long work; a trace is no help
        return INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # a full disk under stdout, say
            print(f"error: {error}", file=sys.stderr)
        # Python flushes once more at exit; what is left goes where nothing breaks.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(run_as_program())
