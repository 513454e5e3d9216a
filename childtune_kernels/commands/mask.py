"""``mask``: what saved child masks hold, as tables and pictures."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..child_mask import ChildMask
from ..fisher import FisherAccumulator
from ..report import canvas
from ..report.densities import Densities, Share, densities, densities_table
from ..report.fisher_spectrum import FisherSpectrum, fisher_spectrum, fisher_spectrum_table
from ..report.heat_maps import plot_densities, plot_overlaps
from ..report.overlaps import overlaps, overlaps_table
from ..report.spectrum_plot import plot_fisher_spectrum
from . import actions


def add_parser(subparsers: actions.Subparsers[argparse.ArgumentParser]) -> None:
    """Add the command ``mask`` with ``info``, ``plot`` and ``overlap`` to the command line."""
    info_of = "child.safetensors"
    plot_of = "child.safetensors --out density.png"
    spectrum_of = "child.safetensors --fisher fisher.safetensors --out spectrum.png"
    overlap_of = "seed0.safetensors seed1.safetensors --out overlap.png"
    parser = actions.add_parser(
        subparsers, "mask", "look at saved child masks: tables and pictures",
        f"info {info_of}", f"plot {plot_of}", f"plot {spectrum_of}", f"overlap {overlap_of}",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="action", required=True)

    what = "scope and density of a mask, by layer and kind of weight"
    info = actions.add_parser(commands, "info", what, info_of, f"{info_of} --json")
    info.add_argument("file", type=Path, metavar="FILE", help="what ChildMask.save wrote")
    actions.add_json(info)
    info.set_defaults(run=actions.run, act=_info)

    what = "draw a mask's density by layer and kind of weight"
    plot = actions.add_parser(commands, "plot", what, plot_of, spectrum_of)
    plot.add_argument("file", type=Path, metavar="FILE", help="what ChildMask.save wrote")
    plot.add_argument("--out", type=_png, required=True, metavar="PNG", help="where to draw")
    plot.add_argument(
        "--fisher",
        type=Path,
        metavar="FISHER",
        help="what FisherAccumulator.save wrote: draw its spectrum instead, with the mask's part of it "
        "and the threshold, and print it as a table",
    )
    actions.add_json(plot)
    actions.add_overwrite(plot)
    plot.set_defaults(run=actions.run, act=_plot)

    what = "how much of each child is in the others: |row ∩ column| / |row|"
    overlap = actions.add_parser(
        commands, "overlap", what, overlap_of, "seed0.safetensors seed1.safetensors --json"
    )
    overlap.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="masks of one scope, two or more"
    )
    overlap.add_argument("--out", type=_png, metavar="PNG", help="draw the matrix too")
    actions.add_json(overlap)
    actions.add_overwrite(overlap)
    overlap.set_defaults(run=actions.run, act=_overlap)


def _info(options: argparse.Namespace) -> None:
    mask = _load(options.file)
    found = densities(mask)
    if options.json:
        actions.print_json({"file": options.file, **_as_json(mask, found)})
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
    fisher_files = [] if options.fisher is None else [options.fisher]
    _check_picture(options, [options.file, *fisher_files])
    mask = _load(options.file)
    if options.fisher is None:
        found = densities(mask)
        plot_densities(found, options.out, options.file.name)
        report, table = _as_json(mask, found), ""
    else:
        fisher = FisherAccumulator.load(_file(options.fisher)).values()
        spectrum = fisher_spectrum(fisher, mask)
        plot_fisher_spectrum(spectrum, options.out, options.file.name)
        report, table = _spectrum_as_json(spectrum), f"{fisher_spectrum_table(spectrum)}\n\n"
    if options.json:
        actions.print_json({"file": options.file, "picture": options.out, **report})
    else:
        print(f"{table}wrote {options.out}")


def _check_picture(options: argparse.Namespace, inputs: Sequence[Path]) -> None:
    canvas.check_available()
    actions.check_no_input(options.out, inputs)
    actions.check_output_file(options.out, overwrite=options.overwrite)


def _overlap(options: argparse.Namespace) -> None:
    names = _names(options.files)
    if options.out is not None:
        _check_picture(options, options.files)
    masks = {name: _load(file) for name, file in zip(names, options.files, strict=True)}
    found = overlaps(masks)
    if options.out is not None:
        plot_overlaps(found, options.out)
    if options.json:
        rows = dict(zip(names, found.shares, strict=True))
        report = {
            "picture": options.out,
            "by_chance": dict(zip(names, found.densities, strict=True)),
            "overlap": {name: dict(zip(names, row, strict=True)) for name, row in rows.items()},
        }
        actions.print_json(report)
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


def _spectrum_as_json(found: FisherSpectrum) -> dict[str, Any]:
    bins = zip(found.edges, found.edges[1:], found.counts, found.child_counts, strict=False)
    return {
        "elements": found.numel,
        "child": found.child,
        "threshold": found.threshold,
        "largest_outside": found.largest_outside,
        "mass": found.mass,
        "child_mass": found.child_mass,
        "zeros": {"elements": found.zeros, "child": found.child_zeros},
        # JSON has no infinity: the last bin of fp32 ends nowhere.
        "bins": [
            {
                "from": low,
                "to": high if high < math.inf else None,
                "elements": count,
                "child": child,
            }
            for low, high, count, child in bins
        ],
    }


def _counts(share: Share) -> dict[str, int | float | None]:
    density = None if math.isnan(share.density) else share.density
    return {"elements": share.numel, "child": share.child, "density": density}


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png; pictures are PNG files")
    return path
