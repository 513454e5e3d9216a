"""The machine under the tensors: its name, its software, its free memory, and when it has done its work."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ._version import __version__

_MEMORY = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def versions() -> dict[str, str]:
    """Package or system → version."""
    return {
        "childtune_kernels": __version__,
        "torch": torch.__version__,
        "triton": installed("triton") or "not installed",
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The model of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given: the one place where clocks meet devices."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def available_bytes(device: torch.device) -> int | None:
    """Bytes that new tensors on a device can take without driving anything out; None where nobody says.

    In a container it is what its limit leaves, where that is less than what the machine has.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    known = [each for each in (_of_machine(), _of_group()) if each is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", _MEMORY.read_text(), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):  # not every system has such files and names
        return None


def _of_group() -> int | None:
    """What the memory limit of this process's control group (version 2) leaves."""
    try:
        limit = int((_GROUP / "memory.max").read_text())
        used = int((_GROUP / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)$", (_GROUP / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None
    # Files that were read count as used, and give way.
    return max(0, limit - used + (int(cached[1]) if cached else 0))
