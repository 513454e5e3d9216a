"""Fisher sums in files: whole, checked, and nothing by halves."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import childtune_kernels
from childtune_kernels import ChildMask, FisherAccumulator, whole_file
from childtune_kernels.fisher_sums import FisherSums

from .fisher_models import (
    DENSE,
    ENCODER,
    EXCLUDED,
    Classifier,
    assert_equal_sums,
    data,
    examples,
    loss_of,
    recorded,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of eight examples and one batch."""
    fisher = recorded(Classifier(), exclude=EXCLUDED)
    with fisher.recording(3):
        loss_of(fisher._model, data(3)).backward()
    fisher.save(tmp_path / "fisher")
    return tmp_path / "fisher"


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_a_file_brings_everything_back(path: Path) -> None:
    original = recorded(Classifier(), exclude=EXCLUDED)
    with original.recording(3):
        loss_of(original._model, data(3)).backward()
    loaded = FisherAccumulator.load(path)
    assert_equal_sums(loaded.sums, dict(original.sums))
    for name in (
        "names",
        "dense_names",
        "records_by_size",
        "kind",
        "include",
        "exclude",
        "without_gradient",
    ):
        assert getattr(loaded, name) == getattr(original, name), name
    assert loaded.child_mask(0.3) == original.child_mask(0.3)


def test_the_header_says_how_it_was_made(path: Path) -> None:
    metadata = metadata_of(path)
    assert metadata["format"] == "childtune_kernels.fisher"
    assert metadata["kind"] == "mixed"
    assert json.loads(metadata["records"]) == {"1": 8, "3": 1}
    assert json.loads(metadata["order"]) == ENCODER
    assert set(json.loads(metadata["dense"])) == DENSE
    assert json.loads(metadata["exclude"]) == list(EXCLUDED)
    assert json.loads(metadata["include"]) is None
    assert json.loads(metadata["without_gradient"]) == []
    assert metadata["library"] == childtune_kernels.__version__
    assert len(metadata["sha256"]) == 64


def test_recording_goes_on_with_a_model(path: Path) -> None:
    model = Classifier()
    whole = recorded(model, 12, include="enc*")
    fisher = FisherAccumulator(model, include="enc*")
    for own in (examples(12)[:7], examples(12)[7:]):
        with fisher.recording():
            for example in own:
                loss_of(model, example).backward()
        fisher.save(path)
        fisher = FisherAccumulator.load(path, model)
    assert (fisher.include, fisher.names, fisher.records) == (("enc*",), ENCODER, 12)
    assert_equal_sums(fisher.sums, dict(whole.sums))


def test_the_order_is_the_models_and_not_the_alphabets(tmp_path: Path) -> None:
    sums = {name: torch.ones(2) for name in ("z", "a", "m")}
    FisherSums(sums, {1: 1}).save(tmp_path / "f")
    assert FisherSums.load(tmp_path / "f").names == ["z", "a", "m"]


def test_odd_tensors_and_empty_ones(tmp_path: Path) -> None:
    sums = {"scalar": torch.tensor(3.0), "empty": torch.ones(0, 4), "none": torch.zeros(2)}
    FisherSums(sums, {2: 5}, without_gradient=["none"]).save(tmp_path / "f")
    loaded = FisherSums.load(tmp_path / "f")
    assert {name: total.shape for name, total in loaded.sums.items()} == {
        name: total.shape for name, total in sums.items()
    }
    assert loaded.without_gradient == ["none"]


def test_another_model_is_refused(path: Path) -> None:
    wider = Classifier()
    wider.encoder[0] = torch.nn.Linear(6, 10)
    with pytest.raises(ValueError, match=r"encoder\.0\.weight have shape \(10, 6\) and \(9, 6\)"):
        FisherAccumulator.load(path, wider)
    frozen = Classifier()
    frozen.encoder[2].requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"encoder\.2\.bias, encoder\.2\.weight is in scope in one"
    ):
        FisherAccumulator.load(path, frozen)
    with pytest.raises(ValueError, match="matches no parameter"):
        FisherAccumulator.load(path, torch.nn.Linear(2, 2))


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a whole fisher"):
            FisherAccumulator.load(path)
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match="is not a whole fisher"):
        FisherAccumulator.load(path)


def test_every_changed_byte_of_the_sums_is_found(path: Path) -> None:
    whole = path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    for at in range(8 + header, len(whole), 37):
        altered = bytearray(whole)
        altered[at] ^= 0x10
        path.write_bytes(altered)
        with pytest.raises(ValueError, match="are not those that were saved"):
            FisherAccumulator.load(path)


Change = Callable[[dict[str, str]], Any]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format="childtune_kernels.child_mask"),
        lambda m: m.update(version="2"),
        lambda m: m.pop("order"),
        lambda m: m.update(order=json.dumps(ENCODER[::-1])),
        lambda m: m.update(order=json.dumps(ENCODER[1:])),
        lambda m: m.update(order=json.dumps([*ENCODER, ENCODER[0]])),
        lambda m: m.update(order="{"),
        lambda m: m.update(order="[" * 100_000),
        lambda m: m.update(order="[[1]]"),
        lambda m: m.update(records="[]"),
        lambda m: m.update(records='{"0": 3}'),
        lambda m: m.update(records='{"1": true}'),
        lambda m: m.update(records='{"1": -3}'),
        lambda m: m.update(records='{"one": 3}'),
        lambda m: m.update(dense='["encoder.0.bias"]'),
        lambda m: m.update(dense="7"),
        lambda m: m.update(exclude="null"),
        lambda m: m.update(without_gradient='["elsewhere"]'),
        lambda m: m.pop("sha256"),
    ],
)
def test_altered_headers_are_refused(path: Path, change: Change) -> None:
    metadata, sums = metadata_of(path), load_file(path)
    save_file(sums, path, metadata)
    FisherAccumulator.load(path)
    change(metadata)
    save_file(sums, path, metadata)
    with pytest.raises(ValueError, match="fisher"):
        FisherAccumulator.load(path)


def test_sums_of_another_type_are_refused(path: Path) -> None:
    metadata, sums = metadata_of(path), load_file(path)
    save_file({name: total.double() for name, total in sums.items()}, path, metadata)
    with pytest.raises(ValueError, match="float32"):
        FisherAccumulator.load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.ones(3)}, tmp_path / "model.pt")
    ChildMask.from_dense({"w": torch.ones(3) > 0}).save(tmp_path / "mask")
    for foreign in tmp_path.iterdir():
        with pytest.raises(ValueError, match="fisher"):
            FisherAccumulator.load(foreign)
    with pytest.raises(FileNotFoundError):
        FisherAccumulator.load(tmp_path / "missing")


def test_a_failed_save_leaves_the_older_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def disk_full(tensors: object, partial: Path, metadata: object) -> None:
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(whole_file, "save_file", disk_full)
    with pytest.raises(OSError, match="no space left"):
        recorded(Classifier()).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
