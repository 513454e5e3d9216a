"""How Fisher information is spread over weights, and what the child holds of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..child_mask import ChildMask
from ..labels import label_of
from ..progress import progress_of
from .text_table import aligned, percent, scientific

BINS_A_DECADE = 10
_CHUNK = 1 << 20  # elements; a multiple of 32, so that chunks begin with a mask word
_FIRST_DECADE, _LAST_EXPONENT = -38, 385  # 10**38.5 is the last edge below fp32's largest
_INFINITY = 0x7F80


@dataclass(frozen=True)
class FisherSpectrum:
    """A histogram of Fisher information over the elements in a mask's scope, and sums of it.

    Attributes:
        edges: ascending bin edges, one more than bins: ten a decade, rounded to 8 significant bits. Bin i
            counts ``edges[i] <= Fisher < edges[i + 1]``. Empty bins at the ends are left out; no
            edges where every Fisher value is zero.
        counts: elements in each bin.
        child_counts: child elements in each bin.
        zeros: elements whose Fisher is zero; they are in no bin.
        child_zeros: child elements whose Fisher is zero.
        numel: elements in scope.
        child: child elements.
        threshold: the smallest Fisher inside the child; None for an empty child.
        largest_outside: the largest Fisher outside the child; None where all are inside. Not above the
            threshold when the child is the global top.
        mass: the sum of Fisher over the scope.
        child_mass: the sum of Fisher over the child.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    child_counts: tuple[int, ...]
    zeros: int
    child_zeros: int
    numel: int
    child: int
    threshold: float | None
    largest_outside: float | None
    mass: float
    child_mass: float

    @property
    def density(self) -> float:
        """The share of elements that are in the child."""
        return self.child / self.numel

    @property
    def mass_share(self) -> float:
        """The share of the Fisher information that the child holds; 0 where there is none."""
        return self.child_mass / self.mass if self.mass else 0.0


class _Tally:
    """Counts and sums over chunks of one element type and many devices."""

    def __init__(self) -> None:
        # By the upper 16 bits of non-negative fp32, which sort as the numbers do.
        self.counts = torch.zeros(1 << 15, dtype=torch.int64)
        self.child_counts = torch.zeros(1 << 15, dtype=torch.int64)
        self.zeros = self.child_zeros = self.numel = self.child = 0
        self.smallest_inside, self.largest_outside = math.inf, -math.inf
        self.mass = self.child_mass = 0.0

    def add(self, values: Tensor, child: Tensor) -> None:
        """Count a chunk: fp32 values without sign, and which of them are in the child."""
        codes = values.view(torch.int32) >> 16
        counts = torch.bincount(codes, minlength=1 << 15).cpu()
        within = torch.where(child, codes, _INFINITY)
        child_counts = torch.bincount(within, minlength=1 << 15).cpu()
        child_counts[_INFINITY] = 0  # where the elements outside were put
        inside = int(child_counts.sum())
        self.numel += values.numel()
        self.child += inside
        self.counts += counts
        self.child_counts += child_counts
        if counts[0]:
            zero = values == 0
            self.zeros += int(zero.sum())
            self.child_zeros += int((zero & child).sum())
        if inside:
            self.smallest_inside = min(
                self.smallest_inside, float(torch.where(child, values, math.inf).amin())
            )
        if inside < values.numel():
            self.largest_outside = max(
                self.largest_outside, float(torch.where(child, -1.0, values).amax())
            )
        self.mass += float(values.sum(dtype=torch.float64))
        self.child_mass += float((values * child).sum(dtype=torch.float64))

    def result(self) -> FisherSpectrum:
        """The spectrum, without empty bins at its ends."""
        self.counts[0] -= self.zeros
        self.child_counts[0] -= self.child_zeros
        edges, codes = _edges()
        counts = _between(self.counts, codes)
        filled = counts.nonzero().flatten().tolist()
        shown = slice(filled[0], filled[-1] + 1) if filled else slice(0, 0)
        return FisherSpectrum(
            edges=tuple(edges[shown.start : shown.stop + 1]) if filled else (),
            counts=tuple(counts[shown].tolist()),
            child_counts=tuple(_between(self.child_counts, codes)[shown].tolist()),
            zeros=self.zeros,
            child_zeros=self.child_zeros,
            numel=self.numel,
            child=self.child,
            threshold=self.smallest_inside if self.child else None,
            largest_outside=self.largest_outside if self.child < self.numel else None,
            mass=self.mass,
            child_mass=self.child_mass,
        )


def fisher_spectrum(fisher: Mapping[str, Tensor], mask: ChildMask) -> FisherSpectrum:
    """The spectrum of Fisher information over a mask's scope, in one pass over chunks.

    Args:
        fisher: parameter name → fp32 tensor of the parameter's shape, not negative. Names outside the
            mask's scope are left out.
        mask: the child.

    Raises:
        ValueError: a parameter of the mask without Fisher; another dtype or shape; negative, infinite or
            NaN values; a mask without elements.
    """
    mask.require_whole("fisher_spectrum")
    labelled = {label_of(name): tensor for name, tensor in fisher.items()}
    if mask.numel() == 0:
        raise ValueError("the Fisher spectrum of a mask without elements in scope is undefined")
    for label, shape in mask.shapes.items():
        _check(label, labelled.get(label), shape)
    tally = _Tally()
    chunks = sum(math.ceil(shape.numel() / _CHUNK) for shape in mask.shapes.values())
    for values, child in progress_of(_chunks(labelled, mask), "Fisher", chunks):
        tally.add(values, child)
    return tally.result()


def fisher_spectrum_table(found: FisherSpectrum) -> str:
    """Plain text: elements by decade of Fisher information, and what the child holds."""
    rows = [("Fisher", "elements", "% of all", "in the child", "% of row")]
    for title, count, child in reversed(_decades(found)):
        rows.append(_row(title, count, child, found.numel))
    if found.zeros:
        rows.append(_row("0", found.zeros, found.child_zeros, found.numel))
    rows.append(_row("all", found.numel, found.child, found.numel))
    return "\n".join(["elements by decade of Fisher information", "", aligned(rows), "",
                      *sentences(found)])  # fmt: skip


def sentences(found: FisherSpectrum) -> list[str]:
    """What the spectrum says of the child: its share of the information, and its threshold."""
    if not found.mass:
        return ["Every Fisher value is zero: there is no information that a child could hold."]
    said = [
        f"The child is {percent(found.density)} % of the elements and holds "
        f"{percent(found.mass_share)} % of the Fisher information."
    ]
    if found.threshold is None:
        return [*said, "The child is empty: it has no threshold."]
    said.append(f"Threshold (smallest Fisher inside the child): {scientific(found.threshold)}.")
    if found.largest_outside is not None:
        top = found.largest_outside <= found.threshold
        verdict = "the child is the global top" if top else "the child is not the global top"
        largest = scientific(found.largest_outside)
        said.append(f"Largest Fisher outside the child: {largest}; {verdict}.")
    return said


def _row(title: str, count: int, child: int, numel: int) -> tuple[str, str, str, str, str]:
    within = percent(child / count) if count else "-"
    return title, f"{count:,}", percent(count / numel), f"{child:,}", within


def _decades(found: FisherSpectrum) -> list[tuple[str, int, int]]:
    """Bins summed by decade, ascending: title, elements, child elements."""
    sums: dict[int, tuple[int, int]] = {}
    for edge, count, child in zip(found.edges, found.counts, found.child_counts, strict=False):
        # Edges are rounded; a hundredth of a decade is more than that and less than a bin.
        decade = math.floor(math.log10(edge) + 0.01)
        before = sums.get(decade, (0, 0))
        sums[decade] = before[0] + count, before[1] + child
    return [
        (f"1e{decade:+03d} to 1e{decade + 1:+03d}" if decade >= _FIRST_DECADE
         else f"below 1e{_FIRST_DECADE}", *sums[decade])
        for decade in sorted(sums)
    ]  # fmt: skip


def _edges() -> tuple[list[float], Tensor]:
    """All bin edges, and the upper 16 bits of each as int64."""
    exponents = range(BINS_A_DECADE * _FIRST_DECADE, _LAST_EXPONENT + 1)
    edges = torch.tensor([10 ** (k / BINS_A_DECADE) for k in exponents], dtype=torch.float64)
    rounded = edges.to(torch.bfloat16)
    inner = rounded.view(torch.int16).to(torch.int64)
    codes = torch.cat([torch.tensor([0]), inner, torch.tensor([_INFINITY])])
    smallest = 2.0**-149
    return [smallest, *rounded.to(torch.float64).tolist(), math.inf], codes


def _between(fine: Tensor, codes: Tensor) -> Tensor:
    """Counts between neighbouring edges."""
    below = torch.cat([torch.tensor([0]), fine.cumsum(0)])[codes]
    return below[1:] - below[:-1]


def _check(label: str, tensor: Tensor | None, shape: torch.Size) -> None:
    if tensor is None:
        raise ValueError(
            f"the mask's parameter {label} has no Fisher information here; give the Fisher of the "
            "model that the mask is for"
        )
    if tensor.dtype != torch.float32 or tensor.shape != shape:
        raise ValueError(
            f"Fisher of {label}: {tensor.dtype} of shape {tuple(tensor.shape)}; the mask needs "
            f"torch.float32 of shape {tuple(shape)}"
        )


def _chunks(fisher: Mapping[str, Tensor], mask: ChildMask) -> Iterator[tuple[Tensor, Tensor]]:
    """Values without sign of zero and child bits, a chunk at a time, in the mask's order."""
    for label, words in mask.words.items():
        flat = fisher[label].detach().reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            values = flat[start : start + _CHUNK]
            lowest, highest = (float(bound) for bound in torch.aminmax(values))
            if not (lowest >= 0 and highest < math.inf):
                raise ValueError(
                    f"Fisher of {label} holds values from {lowest} to {highest}; it must be finite and "
                    "not negative: accumulate it again"
                )
            part = words[start // 32 : (start + values.numel() + 31) // 32].to(values.device)
            yield values.abs(), ops.unpack_mask(part, (values.numel(),))
