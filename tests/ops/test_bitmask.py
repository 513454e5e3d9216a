"""Op bitmask: packing, unpacking and counting against plain Python (SPEC.md, "Bit layout")."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from childtune_kernels import ops

from ..cases import generator_of
from ..columns import placed
from .transcription import packed

LENGTHS = [0, 1, 3, 4, 5, 7, 8, 9, 31, 32, 33, 63, 64, 65, 95, 96, 97, 1000, 65_537]


def check_round_trip(mask: Tensor, backend: str) -> None:
    """Packed as plain Python packs, counted, and unpacked to the same mask."""
    bits = mask.flatten().tolist()
    mask = placed(mask, backend)
    words = ops.pack_mask(mask, backend=backend)
    assert words.dtype == torch.int32
    assert words.tolist() == packed(bits)
    assert ops.count_mask(words, backend=backend) == sum(bits)
    unpacked = ops.unpack_mask(words, mask.shape, backend=backend)
    assert unpacked.dtype == torch.bool
    assert unpacked.shape == mask.shape
    assert unpacked.flatten().tolist() == bits


@pytest.mark.parametrize("numel", LENGTHS)
def test_lengths(numel: int, backend: str) -> None:
    random = torch.rand(numel, generator=generator_of("bitmask", numel))
    for density in (0.0, 0.3, 1.0):
        check_round_trip(random < density, backend)


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(bits=st.lists(st.booleans(), max_size=300))
def test_any_bits(backend: str, bits: list[bool]) -> None:
    check_round_trip(torch.tensor(bits, dtype=torch.bool), backend)


def test_layouts_are_read_row_major(backend: str) -> None:
    whole = torch.rand(13, 6, 11, generator=generator_of("layouts")) < 0.5
    views = [
        whole.permute(2, 0, 1),
        whole[1:, :, 3:],
        whole[:, 2],
        whole[::3, ::2, 1::4],
        whole[0, 0, 0],
        whole[:0],
        whole.flatten()[3:].unflatten(0, (3, -1)),
        whole[:, :1, :1].expand(13, 6, 11),
    ]
    for mask in views:
        check_round_trip(mask, backend)


def test_words_may_be_a_strided_view(backend: str) -> None:
    mask = torch.rand(1000, generator=generator_of("words")) < 0.5
    words = placed(ops.pack_mask(mask, backend="reference"), backend)
    spread = torch.stack([words, ~words], dim=1)[:, 0]
    assert not spread.is_contiguous()
    assert ops.count_mask(spread, backend=backend) == int(mask.sum())
    assert torch.equal(ops.unpack_mask(spread, (1000,), backend=backend).cpu(), mask)


@pytest.mark.threads
def test_thread_counts_change_nothing(backend: str, one_thread: None) -> None:
    mask = torch.rand(200_003, generator=generator_of("threads")) < 0.3
    expected = packed(mask.tolist())
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        words = ops.pack_mask(mask, backend=backend)
        assert words.tolist() == expected
        assert ops.count_mask(words, backend=backend) == int(mask.sum())
        assert torch.equal(ops.unpack_mask(words, mask.shape, backend=backend), mask)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_only_bool_is_packed(dtype: torch.dtype, backend: str) -> None:
    with pytest.raises(ValueError, match="must be a bool tensor"):
        ops.pack_mask(placed(torch.ones(3, dtype=dtype), backend), backend=backend)


def test_words_must_fit(backend: str) -> None:
    words = ops.pack_mask(placed(torch.ones(33, dtype=torch.bool), backend), backend=backend)
    refused = [
        (words, 65, "expected int32"),
        (words, 32, "expected int32"),
        (words.to(torch.int64), 33, "expected int32"),
        (words.view(1, 2), 33, "expected int32"),
        (words | 2, 33, "past its 33 elements"),
        (words | -(2**31), 33, "past its 33 elements"),
    ]
    for wrong, numel, message in refused:
        with pytest.raises(ValueError, match=message):
            ops.unpack_mask(wrong, (numel,), backend=backend)
