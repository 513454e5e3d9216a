"""Files that appear only when they are whole."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from childtune_kernels import whole_file
from childtune_kernels.whole_file import open_whole, save_whole

HEADER = {"format": "childtune_kernels.some_thing", "version": "3"}


def test_tensors_of_any_strides_come_back(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).view(3, 4)
    save_whole({"t": matrix.t(), "p": torch.nn.Parameter(matrix[:, 1])}, tmp_path / "f", HEADER)
    with open_whole(tmp_path / "f", HEADER["format"], "3") as file:
        assert file.metadata() == HEADER
        assert torch.equal(file.get_tensor("t"), matrix.t())
        assert torch.equal(file.get_tensor("p"), matrix[:, 1])
    assert os.listdir(tmp_path) == ["f"]


def test_a_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_whole({"t": torch.ones(1)}, tmp_path / "f", HEADER)
    assert (tmp_path / "f").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("format", "version", "message"),
    [
        ("childtune_kernels.child_mask", "3", "is no child mask; its format is 'childtune_kernels.som"),
        ("childtune_kernels.some_thing", "4", "is a some thing of version 3; this .* version 4: install"),
    ],
)  # fmt: skip
def test_another_kind_or_version_is_refused(
    tmp_path: Path, format: str, version: str, message: str
) -> None:
    save_whole({"t": torch.ones(1)}, tmp_path / "f", HEADER)
    with pytest.raises(ValueError, match=message), open_whole(tmp_path / "f", format, version):
        pytest.fail("it was opened")


def test_damage_found_inside_the_block_is_named(tmp_path: Path) -> None:
    save_whole({"t": torch.ones(1)}, tmp_path / "f", HEADER)
    with (
        pytest.raises(ValueError, match="f is not a whole some thing"),
        open_whole(tmp_path / "f", HEADER["format"], "3") as file,
    ):
        file.get_tensor("another")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="is a folder and no some thing"),
        open_whole(tmp_path, HEADER["format"], "3"),
    ):
        pytest.fail("it was opened")


def test_a_disk_that_refuses_is_an_os_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object, partial: Path, __: object) -> None:
        partial.write_bytes(b"half")
        raise SafetensorError("I/O error: no space left on device")

    monkeypatch.setattr(whole_file, "save_file", refuse)
    with pytest.raises(OSError, match=r"f cannot be written: .* no space left"):
        save_whole({"t": torch.ones(1)}, tmp_path / "f", HEADER)
    assert os.listdir(tmp_path) == []
