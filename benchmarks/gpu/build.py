"""The C++ extension, built in place where it can be: a GPU needs none, and not every machine builds it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import childtune_kernels
from childtune_kernels.backends import cpp

from ..environment import ROOT, available_cores


def build_extension(seconds: float) -> dict[str, Any]:
    """Build the extension unless it is there; nothing is fetched.

    Args:
        seconds: how long it may take.

    Returns:
        ``state``: "present", "built" or "absent", and ``reason`` where it is absent.
    """
    if any(Path(childtune_kernels.__file__).parent.glob("_C*.so")):
        absent = cpp.load()
        return {"state": "present"} if absent is None else {"state": "absent", "reason": absent}
    begun = time.monotonic()
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = {"MAX_JOBS": str(available_cores()), **os.environ}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        failure = (done.stdout + done.stderr)[-2000:] if done.returncode else None
    except (OSError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    took = round(time.monotonic() - begun, 1)
    absent = failure or cpp.load()
    if absent is not None:
        return {"state": "absent", "reason": absent, "seconds": took}
    return {"state": "built", "seconds": took}
