"""ChildMask in files: the format of SPEC.md, "Masks in files", and what is no such file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from childtune_kernels import ChildMask, whole_file


def example_mask() -> ChildMask:
    generator = torch.Generator().manual_seed(5)

    def half(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < 0.5

    return ChildMask.from_dense(
        {
            "z.weight": half(3, 5, 7),
            "a.bias": half(33),
            "empty": half(0, 4),
            "größe": torch.tensor(True),
        },
        dense=["head.weight", "head.bias"],
    )


@pytest.mark.parametrize("kind", [str, Path])
def test_round_trip(tmp_path: Path, kind: Callable[[Path], Any]) -> None:
    mask, path = example_mask(), tmp_path / "child.safetensors"
    mask.save(kind(path))
    loaded = ChildMask.load(kind(path))
    assert loaded == mask
    assert loaded.names == mask.names
    assert dict(loaded.shapes) == dict(mask.shapes)
    assert loaded.shapes["größe"] == ()
    assert os.listdir(tmp_path) == ["child.safetensors"]


def test_round_trip_of_dense_parameters_only(tmp_path: Path) -> None:
    mask = ChildMask.from_dense({}, dense=["a", "b"])
    mask.save(tmp_path / "child")
    assert ChildMask.load(tmp_path / "child") == mask


def test_the_bytes_are_those_of_the_specification(tmp_path: Path) -> None:
    mask = ChildMask({"b": torch.tensor([-2, 1], dtype=torch.int32)}, {"b": (3, 11)}, ["a"])
    mask.save(tmp_path / "child")
    content = (tmp_path / "child").read_bytes()
    header_size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_size])
    assert header["b"] == {"dtype": "I32", "shape": [2], "data_offsets": [0, 8]}
    assert content[8 + header_size :] == bytes.fromhex("feffffff 01000000")
    metadata = header["__metadata__"]
    assert metadata["format"] == "childtune_kernels.child_mask"
    assert metadata["version"] == "1"
    assert json.loads(metadata["shapes"]) == {"b": [3, 11]}
    assert json.loads(metadata["dense"]) == ["a"]


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "child"
    example_mask().save(path)
    content = path.read_bytes()
    for length in range(0, len(content), 3):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="child"):
            ChildMask.load(path)


def test_a_flipped_bit_gives_an_error_or_a_whole_mask(tmp_path: Path) -> None:
    path = tmp_path / "child"
    example_mask().save(path)
    content = path.read_bytes()
    refused = 0
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 7
        path.write_bytes(flipped)
        try:
            loaded = ChildMask.load(path)
        except ValueError:
            refused += 1
        else:
            assert 0 <= loaded.count() <= loaded.numel()
    assert refused > len(content) // 4


Contents = tuple[dict[str, Tensor], dict[str, str]]


def contents_of(path: Path) -> Contents:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def change_header(key: str, value: str) -> Callable[[Contents], None]:
    return lambda contents: contents[1].update({key: value})


def change_shapes(**shapes: Any) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        named = json.loads(contents[1]["shapes"]) | shapes
        contents[1]["shapes"] = json.dumps(named)

    return change


def change_words(name: str, words: Tensor) -> Callable[[Contents], None]:
    return lambda contents: contents[0].update({name: words})


ALTERATIONS: dict[str, Callable[[Contents], Any]] = {
    "another format": change_header("format", "childtune_kernels.fisher"),
    "no format": lambda contents: contents[1].pop("format"),
    "another version": change_header("version", "2"),
    "no version": lambda contents: contents[1].pop("version"),
    "no shapes": lambda contents: contents[1].pop("shapes"),
    "no dense": lambda contents: contents[1].pop("dense"),
    "shapes is no JSON": change_header("shapes", "{"),
    "shapes is a list": change_header("shapes", '["z.weight", "a.bias", "empty", "größe"]'),
    "shapes is null": change_header("shapes", "null"),
    "shapes nests too deep": change_header("shapes", "[" * 100_000),
    "a size is no integer": change_shapes(empty=[0.5, 4]),
    "a shape is null": change_shapes(empty=None),
    "a shape is text": change_shapes(empty="04"),
    "a size is negative": change_shapes(**{"a.bias": [-3, -11]}),
    "a size is huge": change_shapes(empty=[2**70]),
    "another shape": change_shapes(**{"a.bias": [66]}),
    "a shape of fewer bits": change_shapes(**{"a.bias": [32]}),
    "dense is no JSON": change_header("dense", "["),
    "dense is text": change_header("dense", '"head"'),
    "dense is a number": change_header("dense", "1"),
    "dense holds no text": change_header("dense", "[1]"),
    "dense and masked": change_header("dense", '["a.bias"]'),
    "a tensor too many": change_words("more", torch.ones(1, dtype=torch.int32)),
    "a tensor too few": lambda contents: contents[0].pop("a.bias"),
    "words too few": change_words("a.bias", torch.ones(1, dtype=torch.int32)),
    "words of int64": change_words("a.bias", torch.ones(2, dtype=torch.int64)),
    "words of float32": change_words("a.bias", torch.ones(2)),
    "bits past the end": change_words("a.bias", torch.tensor([0, 2], dtype=torch.int32)),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_altered_files_are_refused(tmp_path: Path, alteration: str) -> None:
    path = tmp_path / "child"
    example_mask().save(path)
    contents = contents_of(path)
    ALTERATIONS[alteration](contents)
    save_file(contents[0], path, contents[1])
    with pytest.raises(ValueError, match=r"child|mask of|dense and"):
        ChildMask.load(path)


def test_an_unaltered_rewrite_loads(tmp_path: Path) -> None:
    path = tmp_path / "child"
    example_mask().save(path)
    words, metadata = contents_of(path)
    save_file(words, path, metadata)
    assert ChildMask.load(path) == example_mask()


def test_another_version_names_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "child"
    example_mask().save(path)
    words, metadata = contents_of(path)
    save_file(words, path, metadata | {"version": "2"})
    with pytest.raises(ValueError, match=r"version 2; .* reads version 1: install a newer"):
        ChildMask.load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(3)}, foreign)
    with pytest.raises(
        ValueError, match=r"model\.safetensors is no child mask; its format is None"
    ):
        ChildMask.load(foreign)
    torch.save({"w": torch.ones(3)}, tmp_path / "model.pt")
    (tmp_path / "text").write_text("a mask, or so they say")
    for name in ("model.pt", "text"):
        with pytest.raises(ValueError, match=f"{name} is not a whole child mask"):
            ChildMask.load(tmp_path / name)


def test_a_missing_file_is_no_value_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ChildMask.load(tmp_path / "nowhere")


def test_saving_into_a_missing_directory_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises((OSError, SafetensorError), match="missing"):
        example_mask().save(tmp_path / "missing" / "child")
    assert os.listdir(tmp_path) == []


def test_a_failed_save_leaves_the_older_file_and_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "child"
    example_mask().save(path)

    def disk_full(_: dict[str, Tensor], partial: Path, __: dict[str, str]) -> None:
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(whole_file, "save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        (~example_mask()).save(path)
    assert os.listdir(tmp_path) == ["child"]
    assert ChildMask.load(path) == example_mask()


def test_a_save_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "child").mkdir()
    with pytest.raises(OSError, match="child"):
        example_mask().save(tmp_path / "child")
    assert os.listdir(tmp_path) == ["child"]
    assert os.listdir(tmp_path / "child") == []


def test_saving_replaces_an_older_mask(tmp_path: Path) -> None:
    example_mask().save(tmp_path / "child")
    (~example_mask()).save(tmp_path / "child")
    assert ChildMask.load(tmp_path / "child") == ~example_mask()
