"""Densities by layer and kind of weight: the counts, and the table that shows them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from childtune_kernels import ChildMask
from childtune_kernels.report.densities import Densities, Share, densities, densities_table
from childtune_kernels.report.text_table import aligned, percent

NAMES = {
    "encoder.layer.3.attention.self.query.weight": ("attention.self.query.weight", 3),
    "roberta.encoder.layer.11.output.dense.bias": ("output.dense.bias", 11),
    "transformer.h.0.attn.c_attn.weight": ("attn.c_attn.weight", 0),
    "model.layers.31.self_attn.q_proj.weight": ("self_attn.q_proj.weight", 31),
    "model.layers.2.block_sparse_moe.experts.7.w1.weight": (
        "block_sparse_moe.experts.7.w1.weight",
        2,
    ),
    "0.weight": ("weight", 0),
    "embeddings.word_embeddings.weight": None,
    "conv1d.weight": None,
    "#4": None,
    "layer.²": None,
}


def random_masks(*names: str, density: float = 0.4, seed: int = 3) -> dict[str, Tensor]:
    """Masks of various sizes, most of them no multiple of 32."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand((7 + at, 11), generator=generator) < density
        for at, name in enumerate(names)
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_name_has_a_kind_and_a_layer(name: str) -> None:
    found = densities(ChildMask.from_dense(random_masks(name)))
    if NAMES[name] is None:
        assert list(found.outside) == [name]
        assert not found.cells
    else:
        assert list(found.cells) == [NAMES[name]]
        assert not found.outside


def encoder(layers: int) -> list[str]:
    kinds = ("attention.query.weight", "attention.query.bias", "output.weight")
    inside = [f"encoder.layer.{layer}.{kind}" for layer in range(layers) for kind in kinds]
    return ["embeddings.weight", *inside, "pooler.weight"]


def test_counts_are_those_of_plain_loops() -> None:
    masks = random_masks(*encoder(13))
    found = densities(ChildMask.from_dense(masks, dense=["classifier.weight"]))
    assert found.layers == tuple(range(13))
    assert found.kinds == ("attention.query.weight", "attention.query.bias", "output.weight")
    for kind in found.kinds:
        for layer in found.layers:
            bits = masks[f"encoder.layer.{layer}.{kind}"].flatten().tolist()
            assert found.cells[kind, layer] == Share(sum(bits), len(bits))
        bits = [
            m for name, mask in masks.items() if name.endswith("." + kind) for m in mask.flatten()
        ]
        assert found.of_kind(kind) == Share(int(sum(bits)), len(bits))
    for layer in found.layers:
        bits = [m for name, mask in masks.items() if f".{layer}." in name for m in mask.flatten()]
        assert found.of_layer(layer) == Share(int(sum(bits)), len(bits))
    assert list(found.outside) == ["embeddings.weight", "pooler.weight"]
    every = [m for mask in masks.values() for m in mask.flatten()]
    assert found.total == Share(int(sum(every)), len(every))
    assert found.dense_names == ("classifier.weight",)


def test_stacks_of_layers_are_kept_apart() -> None:
    names = [
        f"{stack}.block.{layer}.0.q.weight" for stack in ("encoder", "decoder") for layer in (0, 1)
    ]
    masks = random_masks(*names)
    found = densities(ChildMask.from_dense(masks))
    assert found.kinds == ("encoder.block.*.0.q.weight", "decoder.block.*.0.q.weight")
    for kind in found.kinds:
        for layer in (0, 1):
            assert found.cells[kind, layer].child == masks[kind.replace("*", str(layer))].sum()


def test_very_many_kinds_are_added_up() -> None:
    names = [
        f"layers.{layer}.experts.{e}.w{w}" for layer in (0, 1) for e in range(40) for w in (1, 2)
    ]
    masks = random_masks(*names)
    found = densities(ChildMask.from_dense(masks))
    assert found.kinds == ("experts.*.w1", "experts.*.w2")
    bits = sum(
        int(mask.sum()) for name, mask in masks.items() if name.endswith("w1") and ".0." in name[:9]
    )
    assert found.cells["experts.*.w1", 0].child == bits
    assert found.total.numel == sum(mask.numel() for mask in masks.values())


def rows_of(table: str, title: str) -> list[list[str]]:
    """The cells of every line that begins with a title."""
    return [line.split()[1:] for line in table.splitlines() if line.split()[:1] == [title]]


def test_the_table_holds_every_density() -> None:
    found = densities(ChildMask.from_dense(random_masks(*encoder(14))))
    table = densities_table(found)
    heads = rows_of(table, "layer")
    assert [cell for row in heads for cell in row if cell != "all"] == [str(n) for n in range(14)]
    for kind in found.kinds:
        first, second = rows_of(table, kind)
        shares = [found.cells[kind, layer].density for layer in range(14)]
        assert first[:-1] + second[:-1] == [percent(share) for share in shares]
        assert first[-1] == second[-1] == percent(found.of_kind(kind).density)
    for label, share in found.outside.items():
        assert rows_of(table, label) == [
            [str(share.numel), str(share.child), percent(share.density)]
        ]


def test_a_weight_that_a_layer_lacks_is_a_dash() -> None:
    names = ["h.0.bias", "h.0.gate", "h.1.bias"]
    table = densities_table(densities(ChildMask.from_dense(random_masks(*names))))
    assert rows_of(table, "gate")[0][1] == "-"


def test_masks_without_layers_or_without_bits_have_a_table() -> None:
    flat = densities(ChildMask.from_dense({"w": torch.tensor([True, False, False])}))
    assert rows_of(densities_table(flat), "w") == [["3", "1", "33.3"]]
    dense = densities(ChildMask.from_dense({}, dense=["w"]))
    assert densities_table(dense) == "no parameter has mask bits"
    assert dense == Densities((), (), {}, {}, ("w",))


def test_a_parameter_without_elements_has_no_density() -> None:
    found = densities(ChildMask.from_dense({"h.0.w": torch.zeros(0, 3, dtype=torch.bool)}))
    assert math.isnan(found.cells["w", 0].density)
    assert rows_of(densities_table(found), "w") == [["-", "-"]]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0"), (1.0, "100"), (0.3, "30.0"), (0.99999, "99.9"), (0.0999, "9.99"), (0.09999, "10.0"),
        (0.0001, "0.01"), (1e-9, "<0.01"), (0.5, "50.0"),
    ],
)  # fmt: skip
def test_percentages(share: float, text: str) -> None:
    assert percent(share) == text


def test_columns_are_aligned() -> None:
    assert aligned([("a", "b"), ("long", "1"), ("x", "100")]) == (
        "a       b\n----  ---\nlong    1\nx     100"
    )
