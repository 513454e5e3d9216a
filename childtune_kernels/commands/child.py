"""``child``: child checkpoints and weight files on disk: ``info``, ``apply``, ``diff``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..child_checkpoint import check_base, child_diff, diff_checkpoint, write_tuned_
from ..child_file import ChildCheckpoint, load_child
from ..labels import label_of
from ..named_weights import named_weights
from ..progress import progress_of_amount
from ..report.text_table import aligned
from ..weight_files import INDEX, WeightFiles, check_target, read_weights, write_weights
from . import actions


def add_parser(subparsers: actions.Subparsers[argparse.ArgumentParser]) -> None:
    """Add the command ``child`` to the command line."""
    info_of = "tuned_child.safetensors"
    apply_of = "base/ tuned_child.safetensors tuned/"
    diff_of = "base/ tuned/ difference.safetensors"
    parser = actions.add_parser(
        subparsers, "child",
        "child checkpoints: what one holds, base + child, what differs between two models",
        f"info {info_of}", f"apply {apply_of}", f"diff {diff_of}",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="action", required=True)
    weights = "a safetensors file, or a folder with model.safetensors or an index of shards"

    what = "what a child checkpoint holds; checks it whole"
    info = actions.add_parser(commands, "info", what, info_of, f"{info_of} --json")
    info.add_argument("file", help="the child checkpoint")
    actions.add_json(info)
    info.set_defaults(run=actions.run, act=_info)

    what = "put a child into its base model's weights"
    apply = actions.add_parser(commands, "apply", what, apply_of)
    apply.add_argument("base", help=f"the base: {weights}")
    apply.add_argument("child", help="the child checkpoint")
    apply.add_argument("out", help="the tuned weights, in the base's layout (weights alone)")
    apply.add_argument(
        "--no-strict",
        action="store_true",
        help="accept a base with another fingerprint; the outcome is then not the tuned model",
    )
    actions.add_json(apply)
    actions.add_overwrite(apply)
    apply.set_defaults(run=actions.run, act=_apply)

    what = "make a child checkpoint of what differs, bit for bit"
    diff = actions.add_parser(
        commands, "diff", what, diff_of, "base/ tuned/ mask.safetensors --mask"
    )
    diff.add_argument("base", help=f"the base: {weights}")
    diff.add_argument("tuned", help="the tuned model: the same kinds")
    diff.add_argument("out", help="the child checkpoint to write")
    diff.add_argument(
        "--mask", action="store_true", help="write the mask of what differs (a ChildMask) alone"
    )
    actions.add_json(diff)
    actions.add_overwrite(diff)
    diff.set_defaults(run=actions.run, act=_diff)


def _info(options: argparse.Namespace) -> None:
    checkpoint = load_child(options.file)
    if options.json:
        actions.print_json(_report(checkpoint))
        return
    mask = checkpoint.mask
    print(f"{'written by':<16}childtune_kernels {checkpoint.library}")
    print(f"{'fingerprint':<16}{checkpoint.fingerprint}")
    share = f" ({mask.density():.2%})" if mask.numel() else ""
    print(f"{'child':<16}{mask.count():,} of {mask.numel():,} elements{share}")
    size = os.path.getsize(options.file)
    print(f"{'file':<16}{size:,} bytes; the whole model {_model_bytes(checkpoint):,}")
    for first, others in (checkpoint.ties or {}).items():
        print(f"{'tied':<16}{first} = {' = '.join(others)}")
    rows = [("weight", "role", "type", "child", "shape")]
    for label, shape in checkpoint.shapes.items():
        role = checkpoint.role(label)
        share = f"{mask.density(label):.2%}" if role == "child" and shape.numel() else "-"
        rows.append((label, role, _type(checkpoint, label), share, str(tuple(shape))))
    print(f"\n{aligned(rows)}")


def _report(checkpoint: ChildCheckpoint) -> dict[str, Any]:
    mask = checkpoint.mask
    members = {
        label: {
            "role": checkpoint.role(label),
            "dtype": _type(checkpoint, label),
            "shape": list(shape),
            "count": mask.count(label) if label in checkpoint.values else None,
        }
        for label, shape in checkpoint.shapes.items()
    }
    return {
        "library": checkpoint.library,
        "fingerprint": checkpoint.fingerprint,
        "count": mask.count(),
        "numel": mask.numel(),
        "model_bytes": _model_bytes(checkpoint),
        "ties": checkpoint.ties,
        "members": members,
    }


def _type(checkpoint: ChildCheckpoint, label: str) -> str:
    return str(checkpoint.dtypes[label]).removeprefix("torch.")


def _model_bytes(checkpoint: ChildCheckpoint) -> int:
    return sum(
        shape.numel() * checkpoint.dtypes[label].itemsize
        for label, shape in checkpoint.shapes.items()
    )


def _apply(options: argparse.Namespace) -> None:
    checkpoint, files = load_child(options.child), read_weights(options.base)
    actions.check_no_input(options.out, [options.base, options.child, *_paths(files)])
    check_target(options.out, files)
    if not files.path.is_dir():
        actions.check_output_file(options.out, overwrite=options.overwrite)
    found = check_base(
        checkpoint, named_weights(files.tensors, "base"), "base", strict=not options.no_strict
    )
    source_of = {other: label for label, others in found.items() for other in others}

    def tuned(name: str, tensor: Tensor) -> Tensor:
        label = source_of[label_of(name)]
        if checkpoint.role(label) == "base":
            return tensor
        # The source is a map of its file; a copy is let go with its shard.
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        write_tuned_(tensor, label, checkpoint)
        return tensor

    total = sum(tensor.numel() * tensor.element_size() for tensor in files.tensors.values())
    with progress_of_amount("writing", total) as advance:
        write_weights(options.out, files, tuned, advance)
    if options.json:
        report = {
            "base": options.base,
            "child": options.child,
            "out": options.out,
            "count": checkpoint.mask.count(),
            "whole": sorted(checkpoint.whole),
            "base_checked": not options.no_strict,
        }
        actions.print_json(report)
        return
    print(
        f"{options.out}: {checkpoint.mask.count():,} elements and {len(checkpoint.whole)} whole tensors "
        f"put into {options.base}"
    )
    if options.no_strict:
        print(
            "The base was not checked: on another one than the run's this is not the tuned model."
        )


def _diff(options: argparse.Namespace) -> None:
    base, tuned = read_weights(options.base), read_weights(options.tuned)
    inputs = [options.base, options.tuned, *_paths(base), *_paths(tuned)]
    actions.check_no_input(options.out, inputs)
    actions.check_output_file(options.out, overwrite=options.overwrite)
    if options.mask:
        mask = child_diff(base.tensors, tuned.tensors)
        mask.save(options.out)
        said, whole = f"{options.out}: {mask}", []
    else:
        checkpoint = diff_checkpoint(
            named_weights(base.tensors, "base"), named_weights(tuned.tensors, "tuned")
        )
        checkpoint.save(options.out)
        mask, whole = checkpoint.mask, sorted(checkpoint.whole)
        said = (
            f"{options.out}: {mask.count():,} elements in {len(checkpoint.values)} weights, "
            f"{len(whole)} tensors whole, {os.path.getsize(options.out):,} bytes"
        )
    if not options.json:
        print(said)
        return
    report = {
        "base": options.base,
        "tuned": options.tuned,
        "out": options.out,
        "kind": "mask" if options.mask else "child checkpoint",
        "count": mask.count(),
        "numel": mask.numel(),
        "whole": whole,
        "bytes": os.path.getsize(options.out),
    }
    actions.print_json(report)


def _paths(files: WeightFiles) -> list[Path]:
    folder = files.path if files.path.is_dir() else files.path.parent
    return [folder / name for name in (*files.files, INDEX)]
