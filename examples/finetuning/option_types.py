"""What options on the command line may be: each function reads one value for argparse, or refuses it."""

from __future__ import annotations

import argparse
import math

import torch


def whole_number(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number above 0")
    return value


def share(text: str) -> float:
    """A number above 0 and up to 1, for argparse."""
    value = positive_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not within (0, 1]")
    return value


def device(text: str) -> torch.device:
    """A device that torch can use here, for argparse."""
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise argparse.ArgumentTypeError(f"torch has no device {text!r} here") from None
