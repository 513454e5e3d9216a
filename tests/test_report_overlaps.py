"""The overlap matrix: the shares, the comparison with chance, the table."""

from __future__ import annotations

import pytest
import torch

from childtune_kernels import ChildMask
from childtune_kernels.report.overlaps import overlaps, overlaps_table
from childtune_kernels.report.text_table import percent


def masks_of(*densities: float, numel: int = 997) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"p{density}": torch.rand(numel, generator=generator) < density for density in densities
    }


def test_shares_are_those_of_plain_loops() -> None:
    dense = masks_of(0.1, 0.3, 0.9)
    masks = {name: ChildMask.from_dense({"w": mask}, dense=["b"]) for name, mask in dense.items()}
    found = overlaps(masks)
    assert found.names == tuple(dense)
    for row, a in zip(found.shares, dense.values(), strict=True):
        for share, b in zip(row, dense.values(), strict=True):
            both = sum(x and y for x, y in zip(a.tolist(), b.tolist(), strict=True))
            assert share == both / sum(a.tolist())
    assert found.densities == tuple(sum(mask.tolist()) / 997 for mask in dense.values())


def test_it_is_the_overlap_of_child_mask() -> None:
    masks = {n: ChildMask.from_dense({"w": m}) for n, m in masks_of(0.2, 0.5).items()}
    a, b = masks.values()
    assert overlaps(masks).shares == ((1.0, a.overlap(b)), (b.overlap(a), 1.0))


def test_random_children_share_their_density() -> None:
    """What the last row of the table says, on children large enough to show it."""
    dense = masks_of(0.3, 0.1, numel=1_000_000)
    found = overlaps({name: ChildMask.from_dense({"w": mask}) for name, mask in dense.items()})
    assert found.shares[0][1] == pytest.approx(found.densities[1], abs=0.003)
    assert found.shares[1][0] == pytest.approx(found.densities[0], abs=0.008)


def test_the_table_holds_the_matrix_and_chance() -> None:
    masks = {n: ChildMask.from_dense({"w": m}) for n, m in masks_of(0.2, 0.5, 0.6).items()}
    found = overlaps(masks)
    lines = overlaps_table(found).splitlines()
    for name, row in zip(found.names, found.shares, strict=True):
        (line,) = (line for line in lines if line.startswith(name + " "))
        assert line.split()[1:] == [percent(share) for share in row]
    (chance,) = (line for line in lines if line.startswith("by chance"))
    assert chance.split()[2:] == [percent(density) for density in found.densities]


def test_other_scopes_and_empty_children_are_named() -> None:
    full = ChildMask.from_dense({"w": torch.ones(5, dtype=torch.bool)})
    other = ChildMask.from_dense({"v": torch.ones(5, dtype=torch.bool)})
    with pytest.raises(
        ValueError, match="one and two: the masks differ in scope at 2 of 2 parameters: v, w; "
    ):
        overlaps({"one": full, "two": other})
    many = ChildMask.from_dense({f"v{at}": torch.ones(5, dtype=torch.bool) for at in range(9)})
    with pytest.raises(ValueError, match="at 10 of 10 parameters: v0, v1, v2, v3, v4, …; compare"):
        overlaps({"one": full, "two": many})
    with pytest.raises(ValueError, match="two is an empty child"):
        overlaps({"one": full, "two": ~full})
    with pytest.raises(ValueError, match="at least one"):
        overlaps({})
