"""The machine and the software: what a result needs to be understood later."""

from __future__ import annotations

import ast
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import childtune_kernels
from childtune_kernels import registry
from childtune_kernels.machine import device_name, installed

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device) -> dict[str, Any]:
    """Device, versions and compiler flags of this process."""
    choice = registry.choose("child_adamw", device)
    return {
        "device": device.type,
        "device_name": device_name(device),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "triton": installed("triton"),
        "childtune_kernels": childtune_kernels.__version__,
        "kernel": f"{choice.backend}: {choice.reason}",
        "compiler": _compiler(),
        "compiler_flags": _compiler_flags(),
    }


def available_cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _compiler() -> str | None:
    """The compiler's name as it stands in the extension."""
    for path in Path(childtune_kernels.__file__).parent.glob("_C*.so"):
        found = re.search(rb"(GCC: \([^\0]+|clang version [^\0]+)\0", path.read_bytes())
        if found:
            return found[1].decode(errors="replace")
    return None


def _compiler_flags() -> list[str]:
    """The flags that setup.py gives the compiler; it cannot be imported, since it would install."""
    try:
        tree = ast.parse((ROOT / "setup.py").read_text())
    except OSError:
        return []
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COMPILE_ARGS":
            elements = node.value.elts if isinstance(node.value, ast.List) else []
            return [str(e.value) for e in elements if isinstance(e, ast.Constant)]
    return []
