"""``mask``: what saved child masks hold, as tables and pictures."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..child_mask import ChildMask
from ..fisher import FisherAccumulator
from ..report import canvas
from ..report.densities import Densities, Share, densities, densities_table
from ..report.fisher_spectrum import fisher_spectrum, fisher_spectrum_table
from ..report.heat_maps import plot_densities, plot_overlaps
from ..report.overlaps import overlaps, overlaps_table
from ..report.spectrum_plot import plot_fisher_spectrum


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``mask`` with ``info``, ``plot`` and ``overlap`` to the command line."""
    parser = subparsers.add_parser("mask", help="look at saved child masks: tables and pictures")
    commands = parser.add_subparsers(dest="action", required=True)

    info = commands.add_parser(
        "info", help="scope and density of a mask, by layer and kind of weight"
    )
    info.add_argument("file", type=Path, metavar="FILE", help="what ChildMask.save wrote")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=run, act=_info)

    plot = commands.add_parser("plot", help="draw a mask's density by layer and kind of weight")
    plot.add_argument("file", type=Path, metavar="FILE", help="what ChildMask.save wrote")
    plot.add_argument("--out", type=_png, required=True, metavar="PNG", help="where to draw")
    plot.add_argument(
        "--fisher",
        type=Path,
        metavar="FISHER",
        help="what FisherAccumulator.save wrote: draw its spectrum instead, with the mask's part of it "
        "and the threshold, and print it as a table",
    )
    plot.set_defaults(run=run, act=_plot)

    overlap = commands.add_parser(
        "overlap", help="how much of each child is in the others: |row ∩ column| / |row|"
    )
    overlap.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="masks of one scope, two or more"
    )
    overlap.add_argument("--out", type=_png, metavar="PNG", help="draw the matrix too")
    overlap.add_argument("--json", action="store_true", help="print one JSON object")
    overlap.set_defaults(run=run, act=_overlap)


def run(options: argparse.Namespace) -> int:
    """Run one action; returns 0, or 1 where input does not fit, with one line about it."""
    try:
        if getattr(options, "out", None) is not None:
            canvas.check_available()
        options.act(options)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _info(options: argparse.Namespace) -> None:
    mask = _load(options.file)
    found = densities(mask)
    if options.json:
        print(json.dumps({"file": str(options.file), **_as_json(mask, found)}, indent=2))
        return
    total = found.total
    print(options.file)
    print(f"{'scope':<10}{len(mask.words)} parameters with mask bits, "
          f"{len(mask.dense_names)} that train densely")  # fmt: skip
    print(f"{'elements':<10}{total.numel:,}")
    print(f"{'child':<10}{total.child:,}")
    print(f"{'density':<10}{f'{total.density:.4f}' if total.numel else 'undefined'}")
    print(f"\n{densities_table(found)}")
    if found.dense_names:
        print("\ntrain densely\n  " + "\n  ".join(found.dense_names))


def _plot(options: argparse.Namespace) -> None:
    mask = _load(options.file)
    if options.fisher is None:
        plot_densities(densities(mask), options.out, options.file.name)
    else:
        fisher = FisherAccumulator.load(_file(options.fisher)).values()
        spectrum = fisher_spectrum(fisher, mask)
        plot_fisher_spectrum(spectrum, options.out, options.file.name)
        print(fisher_spectrum_table(spectrum), end="\n\n")
    print(f"wrote {options.out}")


def _overlap(options: argparse.Namespace) -> None:
    names = _names(options.files)
    masks = {name: _load(file) for name, file in zip(names, options.files, strict=True)}
    found = overlaps(masks)
    if options.out is not None:
        plot_overlaps(found, options.out)
    if options.json:
        rows = dict(zip(names, found.shares, strict=True))
        report = {
            "by_chance": dict(zip(names, found.densities, strict=True)),
            "overlap": {name: dict(zip(names, row, strict=True)) for name, row in rows.items()},
        }
        print(json.dumps(report, indent=2))
        return
    print(overlaps_table(found))
    if options.out is not None:
        print(f"\nwrote {options.out}")


def _load(path: Path) -> ChildMask:
    return ChildMask.load(_file(path))


def _file(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file in it")
    return path


def _names(files: Sequence[Path]) -> list[str]:
    """Short names of masks: the files' stems, or their paths where stems are not enough."""
    if len(files) < 2:
        raise ValueError(f"{files[0]} has nothing to overlap with; name a second mask")
    if len(set(files)) < len(files):
        twice = next(file for file in files if files.count(file) > 1)
        raise ValueError(f"{twice} is named twice; name each mask once")
    stems = [file.stem for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file) for file in files]


def _as_json(mask: ChildMask, found: Densities) -> dict[str, Any]:
    inside = [
        {"kind": kind, "layer": layer, **_counts(share)}
        for (kind, layer), share in found.cells.items()
    ]
    outside = [{"parameter": label, **_counts(share)} for label, share in found.outside.items()]
    return {
        "parameters": len(mask.words),
        **_counts(found.total),
        "layers": inside,
        "outside_layers": outside,
        "dense": list(found.dense_names),
    }


def _counts(share: Share) -> dict[str, int | float | None]:
    density = None if math.isnan(share.density) else share.density
    return {"elements": share.numel, "child": share.child, "density": density}


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png; pictures are PNG files")
    return path
