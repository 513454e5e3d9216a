"""``info``: versions, CPU features, which backend serves which op and why, a self-check."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch

from .. import registry
from ..backends import cpp
from ..machine import versions
from ..self_check import self_check
from . import actions


def add_parser(subparsers: actions.Subparsers[argparse.ArgumentParser]) -> None:
    """Add the command ``info`` to the command line."""
    what = "versions, CPU features, which backend serves which op and why, a self-check"
    parser = actions.add_parser(subparsers, "info", what, "", "--json")
    actions.add_json(parser)
    parser.set_defaults(run=actions.run, act=_info)


def _cpu() -> dict[str, Any]:
    return {
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "extension offers": cpp.supported_capabilities() or cpp.load(),
        "threads": torch.get_num_threads(),
    }


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _info(options: argparse.Namespace) -> int:
    """Print the report; returns 0, or 1 where a backend differs from the reference."""
    findings = [finding for device in _devices() for finding in self_check(device)]
    sound = all(finding.equal for finding in findings)
    if options.json:
        report = {
            "versions": versions(),
            "cpu": _cpu(),
            "table": {
                device: [asdict(c) for c in registry.survey(device)] for device in _devices()
            },
            "self_check": [asdict(finding) for finding in findings],
            "sound": sound,
        }
        actions.print_json(report)
        return 0 if sound else 1
    for name, value in {**versions(), **_cpu()}.items():
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
