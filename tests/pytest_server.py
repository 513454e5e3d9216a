"""Runs of pytest, a process each, that share what they import: forks of one process that has imported it.

``python -m tests.pytest_server`` reads jobs from its input, a line of JSON each: ``{"arguments": of pytest,
"output": a file, "path": folders to import from}``. It answers each with a line: the exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

# What every run imports, torch's own late imports too.
SHARED = (
    "pytest", "hypothesis", "torch", "torch._dynamo", "triton.language", "triton.runtime.interpreter",
    "childtune_kernels.optimizer", "childtune_kernels.backends.triton.child_adamw",
    "childtune_kernels.backends.triton.gradient_norm",
)  # fmt: skip


def run(arguments: list[str], output: str, path: list[str]) -> int:
    """Run pytest in a fork, and return its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with open(output, "wb") as file:
                for stream in (sys.stdout, sys.stderr):
                    os.dup2(file.fileno(), stream.fileno())
            sys.path[:0] = path
            status = int(importlib.import_module("pytest").main(arguments))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    for module in SHARED:
        importlib.import_module(module)
    for line in sys.stdin:
        print(run(**json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
