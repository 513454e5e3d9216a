"""Make the drawings of docs/how_it_works.md: ``python docs/drawings/draw.py``. Masks in them are computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from torch import Tensor

from childtune_kernels import ops, random_child
from childtune_kernels.group_options import keep_threshold
from childtune_kernels.labels import philox_key
from childtune_kernels.plan_row import contiguous_map

FOLDER = Path(__file__).parent
INK, QUIET, PALE = "#2e3440", "#7b8494", "#e9ecf1"
BLUE, ORANGE, GREEN, GREY = "#2a78b5", "#e07b39", "#5b9a47", "#a9afba"
ELEMENTS = 48


def main() -> None:
    """Write every drawing beside this file."""
    matplotlib.rcParams["svg.hashsalt"] = "childtune_kernels"  # the same file from the same drawing
    for name, draw, size in (
        ("mask_function", draw_mask_function, (11, 3.9)),
        ("one_pass", draw_one_pass, (11, 3.6)),
        ("compact_state", draw_compact_state, (11, 3.7)),
        ("same_bits", draw_same_bits, (11, 3.4)),
    ):
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, size[0] * 10)
        axes.set_ylim(0, size[1] * 10)
        draw(axes)
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


def kept(step: int, p: float) -> list[bool]:
    """The keep bits of the first elements of a weight, as a step of FusedChildAdamW draws them."""
    _, threshold = keep_threshold(p, "the drawing")
    key = philox_key(0, "encoder.weight")
    words = ops.keep_words(ELEMENTS, contiguous_map(ELEMENTS), key, step, threshold)
    return bits_of(words)


def bits_of(words: Tensor) -> list[bool]:
    """Mask words as bools."""
    return ops.unpack_mask(words, [ELEMENTS], tail_is_zero=True).tolist()


def cells(
    axes: Axes, x: float, y: float, bits: Sequence[bool], colour: str, width: float = 1.5
) -> None:
    """A row of cells, those of the child in colour."""
    for index, bit in enumerate(bits):
        axes.add_patch(
            Rectangle((x + index * width, y), width * 0.9, 2.2, color=colour if bit else PALE, lw=0)
        )


def box(axes: Axes, x: float, y: float, width: float, text: str, colour: str = INK) -> None:
    """A box with text in it."""
    axes.add_patch(
        FancyBboxPatch((x, y), width, 4.4, boxstyle="round,pad=0.2,rounding_size=0.8",
                       facecolor="white", edgecolor=colour, lw=1.4)
    )  # fmt: skip
    axes.text(x + width / 2, y + 2.2, text, ha="center", va="center", size=10.5, color=colour)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow between boxes."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": QUIET, "lw": 1.4})


def note(axes: Axes, x: float, y: float, text: str, **options: object) -> None:
    """Text that explains."""
    chosen = {"size": 10.5, "color": INK, "va": "center", **options}
    axes.text(x, y, text, **chosen)  # type: ignore[arg-type]


def small(axes: Axes, x: float, y: float, text: str, **options: object) -> None:
    """Text of a caption."""
    note(axes, x, y, text, **{"size": 9.5, "color": QUIET, **options})


def draw_mask_function(axes: Axes) -> None:
    """Seed, name, step and element go in, a bit comes out; no mask is stored."""
    box(axes, 2, 31.5, 24, "seed, name of the weight", BLUE)
    box(axes, 2, 24.5, 24, "step, element", BLUE)
    box(axes, 34, 28, 24, "Philox4x32-10")
    box(axes, 66, 28, 18, "32-bit word")
    box(axes, 92, 28, 15, "< T = p · 2³² ?", ORANGE)
    arrow(axes, (26.6, 33.7), (33.6, 31))
    arrow(axes, (26.6, 26.7), (33.6, 29.5))
    arrow(axes, (58.6, 30.2), (65.6, 30.2))
    arrow(axes, (84.6, 30.2), (91.6, 30.2))
    small(axes, 29.7, 34.3, "key")
    small(axes, 28.6, 25.8, "counter")
    for y, (step, p, colour) in zip(
        (16, 10.5, 5), ((1, 0.3, BLUE), (1, 0.6, BLUE), (2, 0.3, ORANGE)), strict=True
    ):
        note(axes, 2, y + 1.1, f"step {step}, p = {p}")
        cells(axes, 20, y, kept(step, p), colour)
    small(axes, 94, 14.4, "the larger p\ncontains the\nsmaller one's")
    small(axes, 94, 6.1, "another step,\nanother draw")
    small(axes, 2, 1.6, f"seed 0, encoder.weight, its first {ELEMENTS} elements")


def draw_one_pass(axes: Axes) -> None:
    """Bytes that go between memory and processor for a parameter of an fp32 step."""
    unfused = [("draw mask", 4), ("mask / p", 8), ("gradient · mask", 12), ("AdamW, fused", 28)]
    scale = 1.35
    note(
        axes, 2, 33, "Bytes to and from memory, a parameter, of a CT_F step in fp32", weight="bold"
    )
    for y, name, parts in (
        (23, "masks as tensors,\nthen AdamW", unfused),
        (10.5, "FusedChildAdamW", [("mask, rescale, moments, decay, update", 28)]),
    ):
        note(axes, 2, y + 2.7, name)
        x = 26.0
        for index, (what, amount) in enumerate(parts):
            colour = BLUE if what.startswith(("AdamW", "mask,")) else (ORANGE, "#e89a66")[index % 2]
            axes.add_patch(
                Rectangle((x, y), amount * scale, 5.4, facecolor=colour, lw=1, edgecolor="white")
            )
            middle = x + amount * scale / 2
            note(axes, middle, y + 2.7, str(amount), ha="center", color="white", weight="bold")
            rise = 7.2 if index % 2 == 0 else -1.8
            small(axes, middle, y + rise, what, ha="center")
            x += amount * scale
        note(axes, x + 1.5, y + 2.7, f"{sum(amount for _, amount in parts)}", weight="bold")
    small(
        axes,
        2,
        4.2,
        "28 = weight, gradient and two moments read (16), weight and moments written (12). The mask is "
        "computed in registers,\nand the gradient is only read. An optimizer step is as fast as its "
        "memory, so the bars are nearly its time.",
    )


def draw_compact_state(axes: Axes) -> None:
    """A fixed child: a bit an element, and moments for the child alone."""
    mask = random_child({"encoder.weight": [ELEMENTS]}, 0.15, seed=4)
    bits = bits_of(mask.words["encoder.weight"])
    count = sum(bits)
    note(axes, 2, 32.6, "weight")
    cells(axes, 24, 31.5, bits, BLUE)
    note(axes, 2, 26.6, "mask: one bit each")
    for index, bit in enumerate(bits):
        note(axes, 24 + 1.5 * index + 0.65, 26.6, str(int(bit)), ha="center", size=8.5,
             color=BLUE if bit else GREY)  # fmt: skip
    note(axes, 2, 18.6, "AdamW: two moments")
    cells(axes, 24, 18.7, [True] * ELEMENTS, GREY)
    cells(axes, 24, 16.1, [True] * ELEMENTS, GREY)
    small(axes, 97.5, 18.6, "8 bytes a weight")
    note(axes, 2, 10.6, "here: of the child")
    cells(axes, 24, 10.7, [True] * count, GREEN)
    cells(axes, 24, 8.1, [True] * count, GREEN)
    small(
        axes,
        24 + 1.5 * count + 2,
        10.6,
        "8 bytes a child weight and an eighth of a byte for each bit:\n"
        "at a density of 0.1 about one byte a weight",
    )
    positions = [index for index, bit in enumerate(bits) if bit]
    for slot, index in enumerate(positions):
        axes.plot(
            [24 + 1.5 * index + 0.65, 24 + 1.5 * slot + 0.65], [25.4, 13.1], color=GREEN, lw=0.6, alpha=0.7
        )  # fmt: skip
    small(
        axes,
        2,
        3,
        "Outside the child both moments are zero for ever, so nobody keeps them, and the weights are "
        "never written: bit-unchanged.",
    )


def draw_same_bits(axes: Axes) -> None:
    """A weight whole, in two parts and in four: the same elements are in the child."""
    bits = kept(1, 0.3)
    title = "An element's bit depends on its index in the whole weight, never on who holds it"
    note(axes, 2, 31, title, weight="bold")
    for y, parts in ((23.5, 1), (16, 2), (8.5, 4)):
        note(axes, 2, y + 1.1, "one device" if parts == 1 else f"{parts} ranks")
        size = ELEMENTS // parts
        gap = 2.4
        for part in range(parts):
            x = 18 + part * (size * 1.5 + gap)
            cells(
                axes, x, y, bits[part * size : (part + 1) * size], (BLUE, ORANGE, GREEN, INK)[part]
            )
            first = part * size
            note(axes, x, y - 1.5, f"{first} to {first + size - 1}", size=8.5, color=QUIET)
    small(
        axes,
        2,
        2.6,
        "So it is with threads, chunks, vector widths, groups of parameters, strides, and the three "
        "backends: every operation rounds once, in one order.",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
