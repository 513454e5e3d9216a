"""Child checkpoints in files: the format of SPEC.md section 7, and what is no such file."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from childtune_kernels import ChildMask, __version__, apply_child, load_child, save_child
from childtune_kernels.child_file import content_digest

from .tuned_models import Model, base_model, child_of, different

Contents = tuple[dict[str, Tensor], dict[str, str]]


def small_model() -> nn.Module:
    """Two weights of known bits and a frozen one."""
    model = nn.ParameterDict(
        {
            "ü": nn.Parameter(torch.arange(1.0, 4.0)),
            "dense": nn.Parameter(torch.tensor([0.5], dtype=torch.bfloat16)),
            "a": nn.Parameter(
                torch.tensor([[1.0], [2.0]], dtype=torch.float16), requires_grad=False
            ),
        }
    )
    model.register_buffer("seen", torch.tensor(7))
    return model


def small_mask() -> ChildMask:
    return ChildMask.from_dense({"ü": torch.tensor([True, False, True])}, ["dense"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "child.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    """The checkpoint of the small model."""
    save_child(path, small_model(), small_mask())
    return path


def contents_of(path: Path) -> Contents:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def test_the_bytes_are_those_of_the_specification(saved: Path) -> None:
    tensors, metadata = contents_of(saved)
    assert sorted(tensors) == ["values.ü", "whole.dense", "whole.seen", "words.ü"]
    assert tensors["values.ü"].tolist() == [1.0, 3.0]
    assert tensors["words.ü"].tolist() == [0b101]
    assert metadata["format"] == "childtune_kernels.child_checkpoint"
    assert metadata["version"] == "1"
    assert metadata["library"] == __version__
    assert json.loads(metadata["ties"]) == {}
    assert json.loads(metadata["members"]) == {
        "ü": ["float32", [3], "child"],
        "dense": ["bfloat16", [1], "dense"],
        "a": ["float16", [2, 1], "base"],
        "seen": ["int64", [], "buffer"],
    }
    fingerprint = hashlib.sha256()
    fingerprint.update(b'["a", "float16", [2, 1]]\n' + struct.pack("<2e", 1.0, 2.0))
    fingerprint.update(b'["\\u00fc", "float32", [3]]\n' + struct.pack("<3f", 0.0, 2.0, 0.0))
    assert metadata["fingerprint"] == fingerprint.hexdigest()
    digest = hashlib.sha256()
    for key in ("members", "ties", "fingerprint", "library"):
        digest.update(json.dumps([key, metadata[key]]).encode() + b"\n")
    digest.update(b'["values.\\u00fc", "float32", [2]]\n' + struct.pack("<2f", 1.0, 3.0))
    digest.update(b'["whole.dense", "bfloat16", [1]]\n' + b"\x00\x3f")
    digest.update(b'["whole.seen", "int64", []]\n' + struct.pack("<q", 7))
    digest.update(b'["words.\\u00fc", "int32", [1]]\n' + struct.pack("<i", 5))
    assert metadata["sha256"] == digest.hexdigest()


def refused(path: Path, model: nn.Module | None = None) -> str:
    """Both ways to read a file refuse it, and the model stays as it was; the message."""
    model = small_model() if model is None else model
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="child") as refusal:
        load_child(path)
    for strict in (True, False):
        with pytest.raises(ValueError, match="child"):
            apply_child(model, path, strict=strict)
    assert different(model, before) == []
    return str(refusal.value)


def test_truncated_files_are_refused(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(0, len(content), 11):
        saved.write_bytes(content[:length])
        refused(saved)
    saved.write_bytes(content + b"\0")
    refused(saved)


def test_every_flipped_bit_is_found(saved: Path) -> None:
    content = saved.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        saved.write_bytes(flipped)
        with pytest.raises(ValueError, match="child"):
            load_child(saved)
    saved.write_bytes(content)
    load_child(saved)


def change_members(**members: Any) -> Callable[[Contents], None]:
    def change(contents: Contents) -> None:
        named = json.loads(contents[1]["members"]) | members
        contents[1]["members"] = json.dumps({k: v for k, v in named.items() if v is not None})

    return change


def change_header(key: str, value: str) -> Callable[[Contents], None]:
    return lambda contents: contents[1].update({key: value})


def change_tensor(name: str, tensor: Tensor) -> Callable[[Contents], None]:
    return lambda contents: contents[0].update({name: tensor})


FORGERIES: dict[str, Callable[[Contents], Any]] = {
    "a role unknown": change_members(a=["float16", [2, 1], "grandchild"]),
    "a role changed": change_members(dense=["bfloat16", [1], "base"]),
    "a role is a list": change_members(dense=["bfloat16", [1], []]),
    "a type unknown": change_members(a=["float17", [2, 1], "base"]),
    "a type is no type": change_members(a=["nn", [2, 1], "base"]),
    "a type is a number": change_members(a=[3, [2, 1], "base"]),
    "another type": change_members(dense=["float16", [1], "dense"]),
    "another shape": change_members(seen=["int64", [1], "buffer"]),
    "a shape of more words": change_members(ü=["float32", [33], "child"]),
    "a shape of fewer bits": change_members(ü=["float32", [2], "child"]),
    "a size is negative": change_members(a=["float16", [-2, -1], "base"]),
    "a size is a fraction": change_members(a=["float16", [2.0, 1], "base"]),
    "a size is huge": change_members(a=["float16", [2**70], "base"]),
    "a shape is text": change_members(a=["float16", "21", "base"]),
    "a member is short": change_members(a=["float16", [2, 1]]),
    "a member is missing": change_members(dense=None),
    "members is a list": change_header("members", "[]"),
    "members is no JSON": change_header("members", "{"),
    "members nests too deep": change_header("members", "[" * 100_000),
    "no members": lambda contents: contents[1].pop("members"),
    "no ties": lambda contents: contents[1].pop("ties"),
    "ties is a list": change_header("ties", "[]"),
    "ties is of text": change_header("ties", '{"a": "b"}'),
    "no fingerprint": lambda contents: contents[1].pop("fingerprint"),
    "no library": lambda contents: contents[1].pop("library"),
    "a tensor too many": change_tensor("values.a", torch.ones(1)),
    "a tensor too few": lambda contents: contents[0].pop("values.ü"),
    "a value too many": change_tensor("values.ü", torch.ones(3)),
    "a child bit too many": change_tensor("words.ü", torch.tensor([7], dtype=torch.int32)),
    "bits past the end": change_tensor("words.ü", torch.tensor([10], dtype=torch.int32)),
    "values of another type": change_tensor("values.ü", torch.ones(2, dtype=torch.float64)),
    "words of another type": change_tensor("words.ü", torch.ones(1)),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_files_that_contradict_themselves_are_refused(saved: Path, forgery: str) -> None:
    """Their digest is right: whoever wrote them computed it."""
    tensors, metadata = contents_of(saved)
    FORGERIES[forgery]((tensors, metadata))
    metadata["sha256"] = content_digest(tensors, metadata)
    save_file(tensors, saved, metadata)
    assert "altered" not in refused(saved)


ALTERATIONS: dict[str, tuple[Callable[[Contents], Any], str]] = {
    "another format": (change_header("format", "childtune_kernels.child_mask"), "no child checkpoint"),
    "another version": (change_header("version", "2"), "version 2; .* version 1: install a newer"),
    "a value changed": (change_tensor("values.ü", torch.ones(2)), "altered or damaged"),
    "another fingerprint": (change_header("fingerprint", "0" * 64), "altered or damaged"),
    "no digest": (lambda contents: contents[1].pop("sha256"), "altered or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_altered_files_are_refused(saved: Path, alteration: str) -> None:
    contents = contents_of(saved)
    change, message = ALTERATIONS[alteration]
    change(contents)
    save_file(contents[0], saved, contents[1])
    refused(saved)
    with pytest.raises(ValueError, match=message):
        load_child(saved)


def test_an_unaltered_rewrite_loads(saved: Path) -> None:
    tensors, metadata = contents_of(saved)
    save_file(tensors, saved, metadata)
    assert load_child(saved).mask == small_mask()


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    small_mask().save(tmp_path / "mask")
    save_file({"w": torch.ones(3)}, tmp_path / "model")
    torch.save({"w": torch.ones(3)}, tmp_path / "pickled")
    (tmp_path / "text").write_text("a child, or so they say")
    for name in ("mask", "model", "pickled", "text"):
        refused(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_child(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_older_file(saved: Path) -> None:
    content = saved.read_bytes()
    with pytest.raises(ValueError, match="is no parameter of the model"):
        save_child(saved, base_model(), small_mask())
    assert saved.read_bytes() == content
    with pytest.raises(FileNotFoundError, match="missing is no directory"):
        save_child(saved.parent / "missing" / "child", small_model(), small_mask())
    assert os.listdir(saved.parent) == [saved.name]


def test_saving_twice_gives_the_same_content(path: Path) -> None:
    model: Model = base_model()
    digests = set()
    for _ in range(2):
        save_child(path, model, child_of(model))
        digests.add(contents_of(path)[1]["sha256"])
    assert len(digests) == 1
