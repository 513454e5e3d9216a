"""``bench``: what FusedChildAdamW would give on this machine, beside torch's AdamW."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..contenders import NAMES, Entrant, entrants_of
from ..group_options import keep_threshold
from ..machine import device_name, versions
from ..model_shapes import ModelShapes, model_at, parameter_count, transformer_of
from ..report.speeds import note, speeds_table, standing, verdict
from ..side_by_side import LEAST_ROUNDS, Measured, SideBySide, measure, transformer_that_fits
from . import actions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_PARAMETERS = 110_000_000


def add_parser(subparsers: actions.Subparsers[argparse.ArgumentParser]) -> None:
    """Add the command ``bench`` to the command line."""
    parser = actions.add_parser(
        subparsers, "bench",
        "time a step of FusedChildAdamW beside torch's AdamW on this machine, for a model's tensors",
        "", "--model base/ --dtype bf16", "--parameters 350M --density 0.05 --seconds 60",
        "--device cpu --threads 2 --contenders ct_f ct_d --json",
    )  # fmt: skip
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        metavar="PATH",
        help="take the shapes of a model: a folder that save_pretrained wrote (config.json alone is enough, "
        "with transformers), or a safetensors file; no weight is read",
    )
    model.add_argument(
        "--parameters",
        type=_argument(parameter_count),
        metavar="COUNT",
        help="take a made-up transformer of so many parameters, such as 350M or 1.5B (default: 110M, or what "
        "memory allows)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and gradients")
    parser.add_argument("--device", help="where (default: the accelerator, if there is one)")
    parser.add_argument("--threads", type=_argument(_threads), help="of torch (default: its own)")
    parser.add_argument(
        "--seconds",
        type=_argument(_seconds),
        default=10.0,
        help=f"of measuring, which takes {LEAST_ROUNDS} rounds in any case (default: 10); preparing is not "
        "counted",
    )
    parser.add_argument(
        "--reserve-p", type=_argument(_reserve_p), default=0.3, help="of CT_F (default: 0.3)"
    )
    parser.add_argument(
        "--density", type=_argument(_share), default=0.1, help="of CT_D (default: 0.1)"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=NAMES,
        default=NAMES,
        metavar="NAME",
        help=f"who is measured: {', '.join(NAMES)} (default: all; the first one always is)",
    )
    actions.add_json(parser)
    parser.set_defaults(run=actions.run, act=_bench)


def _bench(options: argparse.Namespace) -> int:
    """Measure and report; returns 0, or 1 where a contender failed."""
    device, dtype = _device(options.device), DTYPES[options.dtype]
    threads_before = torch.get_num_threads()
    try:
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        entrants = entrants_of(
            options.contenders, device, dtype, options.reserve_p, options.density
        )
        model = _model(options, entrants, device, dtype)
        found = measure(model, entrants, device, dtype, options.seconds)
        _print(found, torch.get_num_threads(), options)
    finally:
        torch.set_num_threads(threads_before)
    for each in found.measured:
        if each.failure is not None:
            print(f"error: {each.title}: {each.failure}", file=sys.stderr)
    return 0 if found.sound else 1


def _model(
    options: argparse.Namespace,
    entrants: Sequence[Entrant],
    device: torch.device,
    dtype: torch.dtype,
) -> ModelShapes:
    if options.model is not None:
        return model_at(options.model)
    if options.parameters is not None:
        return transformer_of(options.parameters)
    return transformer_that_fits(DEFAULT_PARAMETERS, entrants, device, dtype)


def _print(found: SideBySide, threads: int, options: argparse.Namespace) -> None:
    sentences = verdict(found)
    if options.json:
        actions.print_json(_report(found, threads, options, sentences))
        return
    software = versions()
    on_threads = f", threads: {threads}" if found.device.type == "cpu" else ""
    served = f"childtune_kernels {software['childtune_kernels']} ({found.backend})"
    print(f"{'device':<8}{found.device}: {device_name(found.device)}{on_threads}")
    print(f"{'versions':<8} {served}, torch {software['torch']}, python {software['python']}")
    print(f"{'model':<8}{found.model.source}")
    print(
        f"{'tensors':<8}{len(found.model.shapes):,} with {found.model.parameters:,} parameters, "
        f"{options.dtype}; made-up numbers in one parameter group, every child drawn from all of them"
    )
    print(f"\n{speeds_table(found)}\n")
    if remark := note(found):
        print(f"{remark}\n")
    print("\n".join(sentences))


def _report(
    found: SideBySide, threads: int, options: argparse.Namespace, sentences: Sequence[str]
) -> dict[str, Any]:
    return {
        "versions": versions(),
        "device": {"type": str(found.device), "name": device_name(found.device)},
        "threads": threads,
        "backend": found.backend,
        "model": {
            "source": found.model.source,
            "tensors": len(found.model.shapes),
            "parameters": found.model.parameters,
        },
        "dtype": options.dtype,
        "reserve_p": options.reserve_p,
        "density": options.density,
        "seconds": options.seconds,
        "base": found.base.name,
        "contenders": [_as_json(each, found) for each in found.measured],
        "verdict": list(sentences),
    }


def _as_json(measured: Measured, found: SideBySide) -> dict[str, Any]:
    who = {"name": measured.name, "title": measured.title, "failure": measured.failure}
    if measured.failure is not None:
        return who
    return {
        **who,
        "seconds": measured.seconds[1],
        "seconds_quartiles": measured.seconds[::2],
        "of_base": measured.of_base[1],
        "of_base_quartiles": measured.of_base[::2],
        "standing": standing(measured, found.base) if measured.ours else None,
        "rounds": measured.rounds,
        "state_bytes": measured.state_bytes,
        "state_bytes_per_parameter": measured.state_bytes / found.model.parameters,
    }


def _device(name: str | None) -> torch.device:
    """The device that is asked for, or the best there is.

    Raises:
        ValueError: no such device, or not here.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        if first.startswith("Expected one of"):  # and names two dozen kinds of devices
            first = "there is no such kind of device; GPUs of NVIDIA and AMD are cuda"
        raise ValueError(
            f"--device {name} cannot be used here ({first}); try --device cpu"
        ) from error
    return device


def _argument(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """The conversion as argparse wants it: what it says of a bad value is shown."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return converted


def _reserve_p(text: str) -> float:
    return keep_threshold(float(text), "--reserve-p")[0]


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError(f"{text} must lie in (0, 1]")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(f"{text} must be a number of seconds above 0")
    return value


def _threads(text: str) -> int:
    value, cores = int(text), os.cpu_count() or 1
    if not 1 <= value <= cores:
        raise ValueError(f"{text} must lie within 1 and the {cores} processors of this machine")
    return value
