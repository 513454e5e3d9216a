"""``info``: versions, CPU features, which backend serves which op and why, a self-check."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from typing import Any

import torch

from .. import __version__, registry
from ..backends import cpp
from ..self_check import self_check


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``info`` to the command line."""
    parser = subparsers.add_parser(
        "info", help="versions, CPU features, which backend serves which op and why, a self-check"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def _versions() -> dict[str, str]:
    return {
        "childtune_kernels": __version__,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _triton_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> dict[str, Any]:
    return {
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "extension offers": cpp.supported_capabilities() or cpp.load(),
        "threads": torch.get_num_threads(),
    }


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def run(options: argparse.Namespace) -> int:
    """Print the report; returns 0, or 1 where a backend differs from the reference."""
    findings = [finding for device in _devices() for finding in self_check(device)]
    sound = all(finding.equal for finding in findings)
    if options.json:
        report = {
            "versions": _versions(),
            "cpu": _cpu(),
            "table": {
                device: [asdict(c) for c in registry.survey(device)] for device in _devices()
            },
            "self_check": [asdict(finding) for finding in findings],
            "sound": sound,
        }
        print(json.dumps(report, indent=2))
        return 0 if sound else 1
    for name, value in {**_versions(), **_cpu()}.items():
        print(f"{name:<20}{value if isinstance(value, str | int) else ', '.join(value)}")
    for device in _devices():
        print(f"\n{device}\n{registry.explain(device)}")
    print("\nself-check against the reference, bit for bit")
    for finding in findings:
        verdict = "equal" if finding.equal else "DIFFERS: please report this with the lines above"
        print(f"{finding.backend:<12}{finding.setting:<24}{verdict}")
    if not findings:
        print("nothing to compare: only the reference is available")
    return 0 if sound else 1
