"""Op bitmask: words, and what is done by them, against plain Python (SPEC.md, "Bit layout")."""

from __future__ import annotations

import itertools

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


DENSITIES = (0.0, 0.03, 0.5, 1.0)
# Around a word, around what a thread or a program takes at once, and past 16 bits.
MOVED_LENGTHS = [0, 1, 31, 32, 33, 4095, 4096, 4097, 140_000]


def random_mask(numel: int, density: float) -> Tensor:
    return torch.rand(numel, generator=generator_of("mask", numel)) < density


@pytest.mark.parametrize("numel", MOVED_LENGTHS)
def test_ranks_and_indices(numel: int, backend: str) -> None:
    for density in DENSITIES:
        mask = random_mask(numel, density)
        words = placed(ops.pack_mask(mask, backend="reference"), backend)
        bits = mask.tolist()
        before = [0, *itertools.accumulate(bits)]
        for unit in (32, 64, 4096, 1 << 16, 1 << 17):
            ranks = ops.mask_ranks(words, unit, backend=backend)
            assert ranks.dtype == torch.int64
            assert ranks.tolist() == [before[end] for end in (*range(0, numel, unit), numel)]
        expected = [at for at, bit in enumerate(bits) if bit]
        indices = ops.mask_indices(words, backend=backend)
        assert (indices.dtype, indices.tolist()) == (torch.int64, expected)
        low = ops.mask_indices(words, torch.int16, backend=backend)
        assert low.dtype == torch.int16
        assert [at % (1 << 16) for at in low.tolist()] == [at % (1 << 16) for at in expected]


PATTERNS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}


@pytest.mark.parametrize("dtype", [*PATTERNS, torch.int8, torch.bool], ids=str)
@pytest.mark.parametrize("numel", MOVED_LENGTHS)
def test_values_go_to_their_child_and_back(numel: int, dtype: torch.dtype, backend: str) -> None:
    """Any bits at all, NaN payloads among them, at addresses that are multiples of their size alone."""
    pattern = PATTERNS.get(dtype, dtype)
    below = 2 if dtype == torch.bool else torch.iinfo(pattern).max
    whole = torch.randint(below, (numel + 1,), generator=generator_of("whole"), dtype=torch.int64)
    values = placed(whole.to(pattern).view(dtype), backend)[1:]
    before = values.clone()
    for density in DENSITIES:
        mask = placed(random_mask(numel, density), backend)
        words = ops.pack_mask(mask, backend="reference")
        child = ops.gather_masked(values, words, backend=backend)
        assert child.dtype == dtype
        assert torch.equal(child.view(pattern), before.view(pattern)[mask])
        target = torch.zeros(numel + 1, dtype=pattern, device=values.device)[1:]
        expected = target.masked_scatter(mask, child.view(pattern))
        ops.scatter_masked_(target.view(dtype), child, words, backend=backend)
        assert torch.equal(target, expected)
    assert torch.equal(values.view(pattern), before.view(pattern))


def test_a_known_count_is_not_counted_again(backend: str) -> None:
    mask = placed(random_mask(1000, 0.3), backend)
    words, values = ops.pack_mask(mask, backend="reference"), placed(torch.randn(1000), backend)
    count = int(mask.sum())
    child = ops.gather_masked(values, words, backend, count=count)
    assert torch.equal(child, values[mask])
    whole = torch.zeros_like(values)
    ops.scatter_masked_(whole, child, words, backend, count=count)
    assert torch.equal(whole, values * mask)
    with pytest.raises(ValueError, match="child of"):
        ops.scatter_masked_(whole, child, words, backend, count=count + 1)


def test_words_of_several_tensors_are_joined() -> None:
    """Parts that begin at any bit, and parts without elements."""
    numels = [*range(70), 1, 33, 0, 64, 4096 + 5]
    masks = [random_mask(numel, 0.5) for numel in numels]
    joined = ops.join_words([ops.pack_mask(mask) for mask in masks], numels)
    assert torch.equal(joined, ops.pack_mask(torch.cat(masks)))
    assert torch.equal(ops.join_words([ops.pack_mask(masks[33])], [33]), ops.pack_mask(masks[33]))
    with pytest.raises(ValueError, match="expected int32"):
        ops.join_words([joined], [5])


def test_values_are_read_row_major(backend: str) -> None:
    values = placed(torch.randn(7, 30, generator=generator_of("strides")).t(), backend)
    mask = placed(random_mask(210, 0.5).view(30, 7), backend)
    words = ops.pack_mask(mask, backend="reference")
    spread = torch.stack([words, ~words], dim=1)[:, 0]
    assert torch.equal(ops.gather_masked(values, spread, backend=backend), values[mask])
    whole = torch.zeros(30, 7, device=values.device)
    child = torch.stack([values[mask], values[mask] + 1], dim=1)[:, 0]
    ops.scatter_masked_(whole, child, spread, backend=backend)
    assert torch.equal(whole, torch.where(mask, values, 0.0))
    assert ops.mask_ranks(spread, 64, backend=backend)[-1] == mask.sum()
    assert torch.equal(ops.mask_indices(spread, backend=backend), mask.view(-1).nonzero().view(-1))


@pytest.mark.threads
def test_threads_leave_the_same_child(backend: str, one_thread: None) -> None:
    mask = random_mask(300_007, 0.3)
    words, values = ops.pack_mask(mask, backend="reference"), torch.arange(300_007.0)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        child = ops.gather_masked(values, words, backend=backend)
        assert torch.equal(child, values[mask])
        assert torch.equal(ops.mask_indices(words, backend=backend), child.long())
        whole = torch.zeros_like(values)
        ops.scatter_masked_(whole, child, words, backend=backend)
        assert torch.equal(whole, values * mask)


def test_what_does_not_fit_is_refused_before_anything_is_written(backend: str) -> None:
    words = ops.pack_mask(placed(torch.ones(40, dtype=torch.bool), backend), backend=backend)
    whole, child = torch.zeros(40, device=words.device), torch.ones(40, device=words.device)
    spread = torch.zeros(80, device=words.device)[::2]
    refused = [
        (lambda: ops.mask_ranks(words, 48, backend), "unit=48"),
        (lambda: ops.mask_ranks(words.long(), 64, backend), "expected int32"),
        (lambda: ops.mask_indices(words.view(1, 2), backend=backend), "expected int32"),
        (lambda: ops.mask_indices(words, torch.int32, backend), "dtype=torch.int32"),
        (lambda: ops.gather_masked(whole[:32], words, backend), "expected int32"),
        (lambda: ops.gather_masked(whole[:39], words, backend), "past its 39 elements"),
        (lambda: ops.gather_masked(whole.to(torch.complex128), words, backend), "8 bytes"),
        (lambda: ops.scatter_masked_(whole, child[:39], words, backend), "child of"),
        (lambda: ops.scatter_masked_(whole, child.double(), words, backend), "child of"),
        (lambda: ops.scatter_masked_(spread, child, words, backend), "contiguous"),
        (lambda: ops.scatter_masked_(whole[:33], child, words, backend), "past its 33 elements"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()
    assert not whole.any()
