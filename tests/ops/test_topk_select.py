"""Op topk_select: its passes against plain Python, and every column against the reference (eq. 15 and 16)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from childtune_kernels import ops

from ..cases import generator_of
from ..columns import interpreted, placed
from . import transcription

LENGTHS = [0, 1, 5, 31, 32, 33, 63, 64, 65, 127, 128, 200, 1000]
DIGITS = [(20, 11), (10, 10), (0, 10), (31 - 8, 8), (3, 5)]
ONE, INFINITE, SIGN = 0x3F800000, 0x7F800000, 1 << 31
UNIT = 128
COLUMN_UNITS = (64, UNIT, ops.SCORE_UNIT)

pytestmark = pytest.mark.usefixtures("one_thread")


def from_bits(bits: list[int]) -> Tensor:
    signed = [each - (each >> 31 << 32) for each in bits]
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32)


def keys_of(scores: Tensor) -> list[int]:
    return [int(bits) % SIGN for bits in scores.flatten().view(torch.int32).tolist()]


def crowded(numel: int, *what: object) -> Tensor:
    """Scores with few keys, in few bins of every pass, zeros of both signs and subnormals among them."""
    pool = from_bits(
        [0, SIGN, 1, 2, 0x400, ONE - 1, *[ONE] * 3, ONE + 1, ONE + 0x400, ONE << 1, INFINITE - 1]
    )
    generator = generator_of("crowded", numel, *what)
    some = pool[torch.randint(pool.numel(), (numel,), generator=generator)]
    spread = torch.rand(numel, generator=generator)
    return torch.where(torch.rand(numel, generator=generator) < 0.7, some, spread)


def tensors(backend: str) -> list[Tensor]:
    """A list with every length, shapes of no, one and more dimensions, and unaligned addresses."""
    listed = [crowded(numel) for numel in LENGTHS]
    listed += [crowded(1).view(()), crowded(60, "3d").view(3, 4, 5), crowded(0, "empty").view(0, 3)]
    listed += [crowded(301, "unaligned")[1:], crowded(303, "unaligned")[3:]]
    listed += [torch.zeros(300), torch.ones(300), from_bits([ONE + 1] * 300)]
    return [placed(scores, backend) for scores in listed]


def first_keys() -> list[int]:
    return [0, 1, ONE, ONE + 1, INFINITE - 1]


@pytest.mark.parametrize(("shift", "bits"), DIGITS)
def test_histogram_counts_digits(shift: int, bits: int, backend: str) -> None:
    scores = tensors(backend)
    keys = [key for score in scores for key in keys_of(score)]
    for key in first_keys():
        prefix = key >> (shift + bits)
        expected = [0] * (1 << bits)
        for each in keys:
            if each >> (shift + bits) == prefix:
                expected[each >> shift & ((1 << bits) - 1)] += 1
        counts, refused = ops.digit_histogram(scores, shift, bits, prefix, backend=backend)
        assert counts.dtype == refused.dtype == torch.int64
        assert counts.tolist() == expected
        assert refused.tolist() == [0] * len(scores)
        assert sum(expected) > 0


BRACKETS = [
    (0, 0, 0),
    (0, 2, 0),
    (ONE, ONE, 0),
    (ONE - 1, ONE + 0x400, 3),
    (ONE - 1, ONE + 0x3FF, 10),
    (1, INFINITE - 1, 20),
    (INFINITE - 1, SIGN - 1, 5),
]


@pytest.mark.parametrize(("low", "high", "shift"), BRACKETS)
def test_brackets_are_counted(low: int, high: int, shift: int, backend: str) -> None:
    scores = tensors(backend)
    keys = [key for score in scores for key in keys_of(score)]
    expected = [0] * (((high - low) >> shift) + 1)
    for key in keys:
        if low <= key <= high:
            expected[(key - low) >> shift] += 1
    counts, above, refused = ops.bracket_histogram(scores, low, high, shift, backend=backend)
    assert counts.dtype == above.dtype == refused.dtype == torch.int64
    assert counts.tolist() == expected
    assert int(above) == sum(key > high for key in keys)
    assert refused.tolist() == [0] * len(scores)
    assert sum(expected) > 0


BAD = {
    "NaN": 0x7FC00000,
    "another NaN": 0x7F800001,
    "negative NaN": 0xFFC00000,
    "infinity": INFINITE,
    "negative infinity": INFINITE | SIGN,
    "a negative number": ONE | SIGN,
    "the smallest negative number": 1 | SIGN,
}


@pytest.mark.parametrize("bad", BAD)
def test_refused_scores_are_counted_by_tensor(bad: str, backend: str) -> None:
    for numel in (1, 64, 70, 1000):
        zeros = torch.zeros(numel)
        scores = [placed(each, backend) for each in (zeros, -zeros, torch.rand(numel), zeros[:0])]
        assert ops.digit_histogram(scores, 20, 11, 0, backend=backend)[1].tolist() == [0] * 4
        scores[2][-1] = scores[2][numel // 2] = from_bits([BAD[bad]])[0]
        expected = [0, 0, 1 + (numel > 1), 0]
        assert ops.digit_histogram(scores, 20, 11, 0, backend=backend)[1].tolist() == expected
        assert ops.run_scores(scores, 32, backend=backend)[1].tolist() == expected
        assert ops.bracket_histogram(scores, 5, 9, 0, backend=backend)[2].tolist() == expected


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_words_and_ties(largest: bool, backend: str) -> None:
    scores = tensors(backend)
    for threshold in (-1, *first_keys(), SIGN - 1):
        words, ties = ops.select_words(scores, threshold, largest, UNIT, backend=backend)
        expected_ties = []
        for score, found in zip(scores, words, strict=True):
            keys = keys_of(score)
            beyond = [key > threshold if largest else key < threshold for key in keys]
            assert found.dtype == torch.int32
            assert found.tolist() == transcription.packed(beyond)
            expected_ties += [
                keys[start : start + UNIT].count(threshold) for start in range(0, len(keys), UNIT)
            ]
        assert ties.dtype == torch.int64
        assert ties.tolist() == expected_ties


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_first_ties_of_a_unit_are_taken(share: float, backend: str) -> None:
    scores = tensors(backend)
    words, ties = ops.select_words(tensors("reference"), ONE, True, UNIT, backend="reference")
    words = [placed(each, backend) for each in words]
    quotas = placed((ties * share).round().to(torch.int64), backend)
    remaining = iter(quotas.tolist())
    expected = []
    for score in scores:
        keys = keys_of(score)
        bits = [key > ONE for key in keys]
        for start in range(0, len(keys), UNIT):
            equal = [at for at in range(start, min(start + UNIT, len(keys))) if keys[at] == ONE]
            for at in equal[: next(remaining)]:
                bits[at] = True
        expected.append(transcription.packed(bits))
    ops.take_ties_(scores, words, ONE, quotas, UNIT, backend=backend)
    assert [found.tolist() for found in words] == expected


@pytest.mark.parametrize("granularity", [32, 64, 96, 256, 4096])
def test_run_scores_are_the_tree(granularity: int, backend: str) -> None:
    scores = [
        *tensors(backend),
        *[placed(torch.rand(n, generator=generator_of("run", n)), backend) for n in LENGTHS],
    ]
    runs, refused = ops.run_scores(scores, granularity, backend=backend)
    assert refused.tolist() == [0] * len(scores)
    for score, found in zip(scores, runs, strict=True):
        expected = transcription.run_scores(score.flatten().tolist(), granularity)
        assert found.dtype == torch.float32
        assert found.view(torch.int32).tolist() == expected.view("int32").tolist()


def test_the_tree_of_a_run_is_not_another_sum() -> None:
    """The data can tell the tree from a sum in order, and from a tree of neighbours."""
    score = torch.rand(320, generator=generator_of("sums"))
    expected = transcription.run_scores(score.tolist(), 64)
    in_order = torch.stack([part.cumsum(0)[-1] for part in score.split(64)])
    neighbours = score.view(-1, 32)
    while neighbours.shape[1] > 1:
        neighbours = neighbours[:, 0::2] + neighbours[:, 1::2]
    by_neighbours = neighbours.view(-1, 2).sum(1)
    for other in (in_order, by_neighbours):
        assert other.tolist() != expected.tolist()
        assert torch.allclose(other, torch.from_numpy(expected))


Results = list[list[Any]]


def everything(scores: list[Tensor], threshold: int, unit: int, backend: str) -> Results:
    """The results of all passes, as lists."""
    scores = [placed(score, backend) for score in scores]
    found: Results = []
    for shift, bits in DIGITS[:3]:
        found += [
            each.tolist()
            for each in ops.digit_histogram(
                scores, shift, bits, threshold >> (shift + bits), backend=backend
            )
        ]
    for low, high, shift in ((threshold, threshold, 0), (threshold // 2, threshold, 16)):
        counts = ops.bracket_histogram(scores, low, high, shift, backend=backend)
        found += [each.tolist() for each in counts]
    for largest in (True, False):
        words, ties = ops.select_words(scores, threshold, largest, unit, backend=backend)
        found.append(ties.tolist())
        ops.take_ties_(scores, words, threshold, (ties + 1) // 2, unit, backend=backend)
        found += [each.tolist() for each in words]
    for granularity in (32, 160):
        runs, refused = ops.run_scores(scores, granularity, backend=backend)
        found += [refused.tolist(), *[run.view(torch.int32).tolist() for run in runs]]
    return found


@settings(
    max_examples=12 if interpreted() else 40,  # a second each in Triton's interpreter
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=5),
    seed=st.integers(0, 2**32),
    unit=st.sampled_from(COLUMN_UNITS),
    data=st.data(),
)
def test_columns_equal_the_reference(
    column: str, lengths: list[int], seed: int, unit: int, data: st.DataObject
) -> None:
    scores = [crowded(numel, seed, at) for at, numel in enumerate(lengths)]
    keys = [key for score in scores for key in keys_of(score)]
    threshold = data.draw(st.sampled_from([*keys, ONE]))
    expected = everything(scores, threshold, unit, "reference")
    assert everything(scores, threshold, unit, column) == expected


@pytest.mark.threads
def test_thread_counts_change_nothing(column: str) -> None:
    """Long enough for several units a thread, cut within tensors and between them."""
    scores = [crowded(numel) for numel in (300_000, 5, 0, 65_536, 131_072 + 70)]
    expected = everything(scores, ONE, ops.SCORE_UNIT, "reference")
    for threads in (1,) if column == "triton" else (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert everything(scores, ONE, ops.SCORE_UNIT, column) == expected


def test_what_a_pass_found_goes_into_the_next_unread(backend: str) -> None:
    scores = tensors(backend)
    key = placed(torch.tensor(ONE), backend)
    for shift, bits in DIGITS:
        prefix = key >> (shift + bits)
        found = ops.digit_histogram(scores, shift, bits, prefix, backend=backend)
        expected = ops.digit_histogram(scores, shift, bits, int(prefix), backend="reference")
        assert [each.tolist() for each in found] == [each.tolist() for each in expected]
    for low, high, shift in ((ONE - 7, ONE + 0x400, 3), (2, 1, 0), (0, ONE, 24)):
        first, last, by = (placed(torch.tensor(each), backend) for each in (low, high, shift))
        unread = ops.bracket_histogram(scores, first, last, by, backend, bins=300)
        read = [torch.zeros(300, dtype=torch.int64), torch.tensor(0)]
        if low <= high:  # else it is no pass at all
            some, read[1], _ = ops.bracket_histogram(scores, low, high, shift, "reference")
            read[0][: some.numel()] = some.cpu()
        assert torch.equal(unread[0].cpu(), read[0])
        assert torch.equal(unread[1].cpu(), read[1].cpu())
        assert not unread[2].any()
    for threshold in (placed(torch.tensor(-1), backend), key):
        words, ties = ops.select_words(scores, threshold, True, UNIT, backend=backend)
        expected_words, expected_ties = ops.select_words(
            scores, int(threshold), True, UNIT, backend="reference"
        )
        for quotas in (ties, ties // 2):
            ops.take_ties_(scores, words, threshold, quotas, UNIT, backend=backend)
            ops.take_ties_(
                scores, expected_words, int(threshold), quotas, UNIT, backend="reference"
            )
        assert ties.tolist() == expected_ties.tolist()
        assert [each.tolist() for each in words] == [each.tolist() for each in expected_words]


FLAT = [torch.zeros(70)]
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "fp64": (lambda: ops.select_words([torch.zeros(3).double()], 0, True), "torch.float64"),
    "strides": (lambda: ops.run_scores([torch.zeros(3, 4).t()], 32), r"strides \(1, 4\)"),
    "devices": (
        lambda: ops.digit_histogram([*FLAT, torch.zeros(3, device="meta")], 20, 11, 0),
        "on meta, the first on cpu",
    ),
    "nothing": (lambda: ops.digit_histogram([], 20, 11, 0), "no scores"),
    "digit too high": (lambda: ops.digit_histogram(FLAT, 21, 11, 0), "shift=21"),
    "no digit": (lambda: ops.digit_histogram(FLAT, 20, 0, 0), "bits=0"),
    "prefix too long": (lambda: ops.digit_histogram(FLAT, 20, 11, 1), "prefix=1"),
    "bracket upside down": (lambda: ops.bracket_histogram(FLAT, 2, 1, 0), "low=2, high=1"),
    "bracket too high": (lambda: ops.bracket_histogram(FLAT, 0, SIGN, 0), "high=2147483648"),
    "bracket too low": (lambda: ops.bracket_histogram(FLAT, -1, 1, 0), "low=-1"),
    "bracket's shift": (lambda: ops.bracket_histogram(FLAT, 0, 1, 31), "shift=31"),
    "too few bins": (lambda: ops.bracket_histogram(FLAT, 0, 9, 0, bins=9), "bins=9 .* of 10"),
    "unread without bins": (
        lambda: ops.bracket_histogram(FLAT, torch.tensor(0), 9, 0),
        "bins=None must be said",
    ),
    "threshold too low": (lambda: ops.select_words(FLAT, -2, True), "threshold=-2"),
    "threshold too high": (lambda: ops.select_words(FLAT, SIGN, True), "threshold=2147483648"),
    "a tensor of another type": (
        lambda: ops.digit_histogram(FLAT, 20, 11, torch.tensor(0.0)),
        r"prefix: a tensor of torch.float32 \(\) on cpu; expected int64",
    ),
    "a tensor with a dimension": (
        lambda: ops.select_words(FLAT, torch.tensor([0]), True),
        r"threshold: a tensor of torch.int64 \(1,\)",
    ),
    "a tensor elsewhere": (
        lambda: ops.take_ties_(
            FLAT, [], torch.zeros((), dtype=torch.int64, device="meta"), torch.zeros(2)
        ),
        "on meta; expected int64",
    ),
    "unit": (lambda: ops.select_words(FLAT, 0, True, 32), "unit=32"),
    "granularity": (lambda: ops.run_scores(FLAT, 48), "granularity=48"),
    "quotas": (
        lambda: ops.take_ties_(FLAT, [torch.zeros(3)], 0, torch.zeros(2, dtype=torch.int64)),
        r"expected as many words, and int64 \(1,\)",
    ),
    "words too few": (
        lambda: ops.take_ties_(FLAT, [torch.zeros(2, dtype=torch.int32)], 0, torch.zeros(1).long()),
        "mask of scores 0",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_arguments_are_checked(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()


def test_zero_units_and_no_elements(backend: str) -> None:
    empty = [placed(torch.zeros(0), backend), placed(torch.zeros(0, 4), backend)]
    counts, refused = ops.digit_histogram(empty, 20, 11, 0, backend=backend)
    assert (int(counts.sum()), refused.tolist()) == (0, [0, 0])
    words, ties = ops.select_words(empty, 0, True, backend=backend)
    assert [each.shape for each in itertools.chain(words, [ties])] == [(0,)] * 3
    ops.take_ties_(empty, words, 0, ties, backend=backend)
    assert [run.shape for run in ops.run_scores(empty, 32, backend=backend)[0]] == [(0,), (0,)]
