"""Scaling on paper: state, step time and communication of large models on many GPUs, by formulas.

    python -m benchmarks.scaling             # the tables of docs/distributed.md
    python -m benchmarks.scaling --json
    python -m benchmarks.scaling --write     # into docs/distributed.md

Bytes are exact: tests/test_scaling.py holds them against what 1 to 4 ranks hold and exchange. Times are these
bytes over published rates, of which a share is assumed. Nothing here has been measured on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from childtune_kernels.child_layout import suitable_layout
from childtune_kernels.plan_row import INDICES_UNIT, WORDS_UNIT

from .cases import Shapes
from .gpu.cases import LlamaSizes
from .gpu_limits import GPUS
from .traffic import touched_share

DOCUMENT = Path(__file__).parent.parent / "docs" / "distributed.md"
BEGIN, END = "<!-- scaling: begin -->", "<!-- scaling: end -->"

RANKS = (1, 8, 64, 512, 4096)
GPU = next(gpu for gpu in GPUS if gpu.name == "H100")
GPU_MEMORY = 80e9  # bytes, NVIDIA H100 datasheet (SXM)
#: Assumed, not measured: the share of the published rate that a step, or a collective, reaches.
SHARE_OF_MEMORY_RATE, SHARE_OF_LINK_RATE = 0.85, 0.8
#: Bytes a second that a GPU sends. NVIDIA H100 datasheet: NVLink 900 GB/s, half of it each way; 380 of these
#: 450 GB/s were measured from GPU to GPU in https://github.com/NVIDIA/nccl/issues/1264.
NVLINK = 450e9
#: NVIDIA DGX H100 datasheet: a ConnectX-7 of 400 Gb/s each way for each of 8 GPUs.
INFINIBAND, GPUS_A_NODE = 50e9, 8
#: Engines send weights and gradients in bf16 (FSDP2: MixedPrecisionPolicy), whatever the optimizer steps.
SENT_ITEMSIZE = 2
_SECTOR = 32  # bytes: the least that a GPU's memory gives (traffic.py)


class Model(NamedTuple):
    """A Llama model, by the sizes in its published config."""

    title: str
    sizes: LlamaSizes
    tied: bool

    def shapes(self) -> Shapes:
        """Parameter name → shape."""
        shapes = self.sizes.shapes()
        if not self.tied:
            shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
        return shapes


_8B = LlamaSizes(hidden=4096, intermediate=14_336, key_values=1024, layers=32, vocabulary=128_256)
MODELS = (
    Model("1B", LlamaSizes(2048, 8192, 512, 16, 128_256), tied=True),
    Model("8B", _8B, tied=False),
    Model("70B", replace(_8B, hidden=8192, intermediate=28_672, layers=80), tied=False),
    Model("405B", replace(_8B, hidden=16_384, intermediate=53_248, layers=126), tied=False),
)


@dataclass(frozen=True)
class Setting:
    """What an optimizer keeps: bytes of a weight and its gradient, and of what stands beside the moments.

    ``density``: of a fixed child with compact state; None where every weight has state. ``remainder``: bytes
    of a weight's int16 remainder (split masters). ``step``: bytes of a tensor's step count.
    """

    title: str
    weight: int = 4
    density: float | None = None
    remainder: int = 0
    step: int = 8
    moments: int = 8


SETTINGS = (
    Setting("AdamW", step=4),
    Setting("CT_F"),
    Setting("CT_D, p = 0.3", density=0.3),
    Setting("CT_D, p = 0.1", density=0.1),
    Setting("CT_F, bf16 split", weight=2, remainder=2),
    Setting("CT_D, p = 0.1, bf16 split", weight=2, remainder=2, density=0.1),
)


class Part(NamedTuple):
    """What a rank holds of a parameter of ``dimensions``; the child's elements lie in ``runs``."""

    elements: int
    child: int
    runs: int
    dimensions: int


def part_elements(shape: Sequence[int], ranks: int, rank: int = 0) -> int:
    """Elements of a parameter on a rank of FSDP2, which cuts rows like ``torch.chunk``; rank 0 has most."""
    rows, *rest = shape
    size = -(-rows // ranks)
    return max(0, min(rows - rank * size, size)) * math.prod(rest)


def expected_part(shape: Sequence[int], ranks: int, density: float | None) -> Part:
    """The part of the rank that has most, with a child scattered at random."""
    elements = part_elements(shape, ranks)
    child = round(elements * (density or 0.0))
    return Part(elements, child, round(child * (1 - (density or 0.0))), len(shape))


def state_bytes(setting: Setting, part: Part, device: torch.device) -> int:
    """Bytes of an optimizer's state of one part (SPEC.md, "Child layouts")."""
    of_a_weight = setting.moments + setting.remainder
    if setting.density is None:
        return part.elements * of_a_weight + setting.step
    layout = suitable_layout(part.child, part.runs, part.elements, device)
    return (
        part.child * of_a_weight + _layout_bytes(layout, part) + 8 * part.dimensions + setting.step
    )


def _layout_bytes(layout: str, part: Part) -> int:
    if layout == "runs":
        return 16 * (part.runs + 1)
    if layout == "indices":
        return 2 * part.child + 8 * (-(-part.elements // INDICES_UNIT) + 1)
    return 4 * -(-part.elements // 32) + 8 * (-(-part.elements // WORDS_UNIT) + 1)


def moved_bytes(setting: Setting, part: Part, device: torch.device) -> float:
    """Bytes that a step reads and writes of one part, as traffic.bytes_per_parameter counts them.

    Weights and gradients by the sectors that hold an element of the child, moments and remainders read and
    written, the child's layout read.
    """
    of_a_weight = 2 * (setting.moments + setting.remainder)
    if setting.density is None:
        return part.elements * (3 * setting.weight + of_a_weight)
    touched = touched_share(setting.density, 1, _SECTOR // setting.weight)
    layout = suitable_layout(part.child, part.runs, part.elements, device)
    return (
        part.elements * touched * 3 * setting.weight
        + part.child * of_a_weight
        + _layout_bytes(layout, part)
    )


def gathered_elements(shapes: Shapes, ranks: int) -> int:
    """Elements of all parameters as FSDP2 gathers and scatters them: as many rows of each on every rank."""
    return sum(ranks * part_elements(shape, ranks) for shape in shapes.values())


def sent_by_ddp(shapes: Shapes, ranks: int, itemsize: int, share: float = 1.0) -> float:
    """Bytes that a GPU sends for one all-reduce of all gradients, or of the share that a child has.

    A ring (or anything else that is best possible) sends 2 (n - 1) / n of the bytes: Patarasuk and Yuan 2009.
    """
    elements = sum(math.prod(shape) for shape in shapes.values())
    return 2 * (ranks - 1) / ranks * elements * share * itemsize


def sent_by_fsdp(shapes: Shapes, ranks: int, itemsize: int, gathers: int = 2) -> float:
    """Bytes that a GPU sends a step under FSDP2: weights for forward and backward, and gradients.

    Each is (n - 1) / n of the bytes. ``reshard_after_forward=False`` gathers once.
    """
    return (ranks - 1) / ranks * gathered_elements(shapes, ranks) * itemsize * (gathers + 1)


def link_rate(ranks: int) -> float:
    """Bytes a second that each GPU of a ring sends: by NVLink, or as fast as its node's links together.

    A ring leaves a node once for its 8 GPUs, and 8 rings share its 8 network links.
    """
    rate = NVLINK if ranks <= GPUS_A_NODE else min(NVLINK, GPUS_A_NODE * INFINIBAND)
    return rate * SHARE_OF_LINK_RATE


def figures() -> Iterator[dict[str, Any]]:
    """A record a model, number of GPUs and setting: bytes and seconds of the GPU that has most."""
    device = torch.device("cuda")
    for model in MODELS:
        shapes = model.shapes()
        parameters = sum(math.prod(shape) for shape in shapes.values())
        for ranks in RANKS:
            ddp = {p: sent_by_ddp(shapes, ranks, SENT_ITEMSIZE, p) for p in (1.0, 0.3, 0.1)}
            fsdp = sent_by_fsdp(shapes, ranks, SENT_ITEMSIZE)
            record: dict[str, Any] = {
                "model": model.title, "parameters": parameters, "gpus": ranks,
                "sent_by_ddp": ddp[1.0], "sent_by_ddp_child_0.3": ddp[0.3],
                "sent_by_ddp_child_0.1": ddp[0.1], "sent_by_fsdp": fsdp,
                "ddp_seconds": ddp[1.0] / link_rate(ranks), "fsdp_seconds": fsdp / link_rate(ranks),
                "settings": {},
            }  # fmt: skip
            for setting in SETTINGS:
                parts = [expected_part(shape, ranks, setting.density) for shape in shapes.values()]
                state = sum(state_bytes(setting, part, device) for part in parts)
                moved = sum(moved_bytes(setting, part, device) for part in parts)
                weights = 2 * setting.weight * sum(part.elements for part in parts)
                record["settings"][setting.title] = {
                    "state_bytes": state,
                    "moved_bytes": moved,
                    "step_seconds": moved / (GPU.bandwidth * SHARE_OF_MEMORY_RATE),
                    "fits": state + weights <= GPU_MEMORY,
                }
            yield record


def number(value: float) -> str:
    """Three digits, or all those before the point."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def tables() -> str:
    """The tables of docs/distributed.md."""
    records = list(figures())
    titles = [setting.title for setting in SETTINGS]
    head = f"| model | GPUs | {' | '.join(titles)} |\n|---|--:|{'--:|' * len(titles)}"
    state, step = [head], [head]
    sent = [
        "| model | GPUs | DDP, GB | only the child, p = 0.3 | p = 0.1 | FSDP2, GB | DDP, ms | FSDP2, ms |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for record in records:
        start = f"| {record['model']} | {record['gpus']:,} |"
        settings = record["settings"].values()
        cells = [(number(each["state_bytes"] / 1e9), each["fits"]) for each in settings]
        state.append(
            start + "".join(f" {f'**{text}**' if fits else text} |" for text, fits in cells)
        )
        step.append(
            start + "".join(f" {number(1e3 * each['step_seconds'])} |" for each in settings)
        )
        if record["gpus"] > 1:
            keys = ("sent_by_ddp", "sent_by_ddp_child_0.3", "sent_by_ddp_child_0.1", "sent_by_fsdp")
            volumes = [number(record[key] / 1e9) for key in keys]
            times = [number(1e3 * record[key]) for key in ("ddp_seconds", "fsdp_seconds")]
            sent.append(start + "".join(f" {cell} |" for cell in (*volumes, *times)))
    return "\n".join(
        [
            "Optimizer state, GB a GPU under FSDP2 (bold: with weights and gradients it fits into 80 GB):",
            "", *state, "",
            f"Optimizer step, ms on an {GPU.name} at {SHARE_OF_MEMORY_RATE:.0%} "
            f"of {GPU.bandwidth / 1e12} TB/s:",
            "", *step, "",
            "What a GPU sends in a step, in bf16, and how long that takes at "
            f"{SHARE_OF_LINK_RATE:.0%} of the link:",
            "", *sent,
        ]
    )  # fmt: skip


def with_tables(text: str) -> str:
    """A document with the tables between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the document must have {BEGIN} and, after it, {END}")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--json", action="store_true", help="records instead of tables")
    parser.add_argument("--write", action="store_true", help=f"the tables into {DOCUMENT.name}")
    chosen = parser.parse_args()
    if chosen.write:
        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    elif chosen.json:
        json.dump(list(figures()), sys.stdout, indent=1)
    else:
        print(tables())


if __name__ == "__main__":
    main()
