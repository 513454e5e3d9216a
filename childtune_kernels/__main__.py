"""The command line: ``python -m childtune_kernels``; a module of ``commands`` a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .commands import child, info, mask

COMMANDS = (info, child, mask)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (0 good, 1 a failed check, 2 bad usage)."""
    parser = argparse.ArgumentParser(
        prog="python -m childtune_kernels", description="Fused kernels for Child-Tuning."
    )
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    options = parser.parse_args(arguments)
    exit_code: int = options.run(options)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
