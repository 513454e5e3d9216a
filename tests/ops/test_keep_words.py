"""Op keep_words against Random123, SPEC.md's vectors and a Philox in plain Python (SPEC.md, eq. 1 to 5)."""

from __future__ import annotations

import functools
import itertools
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from childtune_kernels import ops
from childtune_kernels.backends.reference.philox import philox_words
from childtune_kernels.labels import philox_key
from childtune_kernels.plan_row import IndexMap, contiguous_map, strided_map

from ..columns import device_of
from . import transcription
from .transcription import KEEP_ALL

SPEC = (Path(__file__).parent.parent.parent / "SPEC.md").read_text(encoding="utf-8")
LENGTHS = [0, 1, 3, 4, 5, 31, 32, 33, 1000, 65_537]
STEPS = [1, 2, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 5]
THRESHOLD = round(0.3 * 2**32)
# Bounds on random counts: this many standard deviations, which chance passes once in 1.7 million
# times. Seeds are fixed: a bound that holds goes on holding.
DEVIATIONS = 5.0

pytestmark = pytest.mark.usefixtures("one_thread")

# counter, key, output: the known answers that Random123 publishes for philox4x32-10 (kat_vectors).
RANDOM123 = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
# seed, label, t, e, key, counter, output, word, keep at p = 0.3
WORKED = [
    (0, "#0", 1, 0, "0d463690 42fc5763", "00000000 00000000 00000001 00000000",
     "275e1674 0ffb3ab8 afbc10ce b0e58b2d", "275e1674", 1),
    (1234, "encoder.layer.0.attention.self.query.weight", 7, 1_000_003, "1dfc5d36 8bb4c9d8",
     "0003d090 00000000 00000007 00000000", "f7db3c4a a1e00465 849cb78f 7f4017e6", "7f4017e6", 0),
    (-1, "größe.weight", 4_294_967_295, 34_359_738_374, "5d260493 18bac931",
     "00000001 00000002 ffffffff 00000000", "f94ca25f d5c52266 5ff3d061 676294bf", "5ff3d061", 0),
]  # fmt: skip


def numbers_of(words: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in words.split())


def joined_key(key: tuple[int, ...]) -> int:
    return key[0] | key[1] << 32


def bits_of(words: Tensor, numel: int) -> list[bool]:
    """Mask words as a list, without the op that unpacks them."""
    unsigned = [word & 0xFFFFFFFF for word in words.tolist()]
    assert len(unsigned) == (numel + 31) // 32
    bits = [bool(word >> position & 1) for word in unsigned for position in range(32)]
    assert not any(bits[numel:]), "bits are set past the end"
    return bits[:numel]


def kept_words(
    numel: int,
    element_map: IndexMap,
    key: int,
    step: int,
    threshold: int,
    purpose: int,
    backend: str,
) -> Tensor:
    """The op, where the backend is tested."""
    device = device_of(backend)
    return ops.keep_words(numel, element_map, key, step, threshold, purpose, device, backend)


def table_rows(heading: str) -> list[list[str]]:
    """The rows of the table in SPEC.md whose header starts with ``heading``."""
    start = SPEC.index(f"| {heading} |")
    lines = itertools.takewhile(lambda line: line.startswith("|"), SPEC[start:].splitlines())
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in list(lines)[2:]]


@pytest.mark.parametrize("step", [1, 2**32 - 1, 2**40 + 5])
def test_a_step_may_be_a_tensor(step: int, backend: str) -> None:
    device = device_of(backend)
    arguments = (1000, contiguous_map(1000), philox_key(0, "a"))
    counted = torch.tensor(step, device=device)
    found = ops.keep_words(*arguments, counted, THRESHOLD, device=device, backend=backend)
    assert torch.equal(
        found, ops.keep_words(*arguments, step, THRESHOLD, device=device, backend=backend)
    )
    for wrong in (counted.view(1), counted.double()):
        with pytest.raises(ValueError, match="expected int64 of no dimension"):
            ops.keep_words(*arguments, wrong, THRESHOLD, device=device, backend=backend)


def test_specification_holds_the_vectors() -> None:
    assert table_rows("counter") == [list(row) for row in RANDOM123]
    printed = [
        [int(row[0].replace("−", "-")), row[1].strip("`"), *map(int, row[2:4]), *row[4:8], int(row[8])]
        for row in table_rows("seed")
    ]  # fmt: skip
    assert printed == [list(row) for row in WORKED]
    assert re.search(r"p = 0\.3 \(T = ([0-9a-f]{8})\)", SPEC)[1] == f"{THRESHOLD:08x}"  # type: ignore[index]


@pytest.mark.parametrize(("counter", "key", "output"), RANDOM123)
def test_known_answers(counter: str, key: str, output: str) -> None:
    x0, x1, x2, x3 = numbers_of(counter)
    k0, k1 = numbers_of(key)
    assert transcription.philox((x0, x1, x2, x3), (k0, k1)) == numbers_of(output)
    block = x0 | x1 << 32
    blocks = torch.tensor([block - (block >> 63 << 64)])
    words = philox_words(blocks, joined_key((k0, k1)), x2, x3)
    assert tuple(int(word) for word in words) == numbers_of(output)


@pytest.mark.parametrize("vector", WORKED, ids=lambda vector: str(vector[1]))
def test_worked_vectors(vector: tuple[int, str, int, int, str, str, str, str, int]) -> None:
    seed, label, step, element, key, counter, output, word, keep = vector
    assert transcription.key_of(seed, label) == numbers_of(key)
    assert philox_key(seed, label) == joined_key(numbers_of(key))
    assert transcription.counter_of(element, step) == numbers_of(counter)
    k0, k1 = numbers_of(key)
    assert transcription.philox(transcription.counter_of(element, step), (k0, k1)) == numbers_of(
        output
    )
    assert numbers_of(output)[element % 4] == int(word, 16)
    assert (int(word, 16) < THRESHOLD) == bool(keep)


@pytest.mark.parametrize("vector", WORKED, ids=lambda vector: str(vector[1]))
@pytest.mark.parametrize("before", [0, 3, 37])
def test_worked_vectors_on_backends(
    vector: tuple[int, str, int, int, str, str, str, str, int], before: int, backend: str
) -> None:
    """A word is known from two thresholds: it is kept below word + 1 and dropped below word."""
    seed, label, step, element, _, _, _, word, keep = vector
    start = max(0, element - before)
    element_map = contiguous_map(101, start)
    for threshold, expected in (
        (int(word, 16) + 1, True),
        (int(word, 16), False),
        (THRESHOLD, bool(keep)),
    ):
        words = kept_words(101, element_map, philox_key(seed, label), step, threshold, 0, backend)
        assert bits_of(words, 101)[element - start] is expected


@pytest.mark.parametrize("purpose", [0, 1, 2, 3, 4])
def test_every_word_of_a_block(purpose: int, backend: str) -> None:
    """All four words at a known counter, by their two thresholds, for every purpose."""
    key = transcription.key_of(5, "words")
    for element in range(4):
        word = transcription.word_of(element, key, 9, purpose)
        for threshold in (word, word + 1):
            words = kept_words(
                4, contiguous_map(4), joined_key(key), 9, threshold, purpose, backend
            )
            assert bits_of(words, 4)[element] is (threshold == word + 1)


@functools.cache
def expected_bits(count: int, first: int, step: int, threshold: int) -> list[bool]:
    key = transcription.key_of(3, "layer.weight")
    return transcription.keep_bits(range(first, first + count), key, step, threshold)


def found_bits(
    count: int, first: int, step: int, backend: str, threshold: int = THRESHOLD
) -> list[bool]:
    key = philox_key(3, "layer.weight")
    words = kept_words(count, contiguous_map(count, first), key, step, threshold, 0, backend)
    return bits_of(words, count)


@pytest.mark.parametrize("numel", LENGTHS)
def test_lengths(numel: int, backend: str) -> None:
    assert found_bits(numel, 0, 1, backend) == expected_bits(numel, 0, 1, THRESHOLD)


@pytest.mark.parametrize("first", [1, 2, 3, 5, 31, 33, 63, 64, 65, 1_000_003])
def test_unaligned_bases(first: int, backend: str) -> None:
    assert found_bits(333, first, 1, backend) == expected_bits(333, first, 1, THRESHOLD)


@pytest.mark.parametrize(
    "first", [2**31 - 9, 2**32 - 9, 2**32, 2**34 - 133, 2**34 - 1, 2**34, 3 * 2**34 - 65, 2**62 - 400]
)  # fmt: skip
def test_elements_beyond_32_bits(first: int, backend: str) -> None:
    assert found_bits(333, first, 4, backend) == expected_bits(333, first, 4, THRESHOLD)
    low = expected_bits(333, first % 2**32, 4, THRESHOLD)
    if first >= 2**32:
        assert expected_bits(333, first, 4, THRESHOLD) != low


@pytest.mark.parametrize("step", STEPS)
def test_steps(step: int, backend: str) -> None:
    assert found_bits(200, 7, step, backend) == expected_bits(200, 7, step, THRESHOLD)
    if step > 2**32:
        assert found_bits(200, 7, step, backend) == found_bits(200, 7, step % 2**32, backend)


@pytest.mark.parametrize("threshold", [1, 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, KEEP_ALL])
def test_thresholds_compare_unsigned(threshold: int, backend: str) -> None:
    expected = expected_bits(1000, 0, 1, threshold)
    assert found_bits(1000, 0, 1, backend, threshold) == expected
    assert all(expected) == (threshold >= 2**32 - 1)


@pytest.mark.parametrize("threshold", [-1, 0, 2**32 + 1])
def test_thresholds_out_of_range(threshold: int) -> None:
    with pytest.raises(ValueError, match=f"threshold={threshold}"):
        ops.keep_words(4, contiguous_map(4), 0, 1, threshold)


# Element maps.

_STRIDES = st.one_of(st.just(1), st.integers(1, 70), st.integers(0, 2**36))


@st.composite
def element_maps(draw: st.DrawFn) -> tuple[int, IndexMap]:
    """A number of elements and a map of one to four levels that holds as many."""
    inner = draw(st.integers(1, 90))
    sizes = [*draw(st.lists(st.integers(1, 5), max_size=3)), inner]
    levels = tuple((size, draw(_STRIDES)) for size in sizes)
    base = draw(st.one_of(st.integers(0, 200), st.integers(0, 2**40)))
    return draw(st.integers(0, min(600, math.prod(sizes)))), IndexMap(base, levels)


@settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    drawn=element_maps(),
    key=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**33),
    threshold=st.one_of(st.integers(1, KEEP_ALL), st.just(THRESHOLD)),
    purpose=st.integers(0, 4),
)
def test_any_element_map(
    backend: str, drawn: tuple[int, IndexMap], key: int, step: int, threshold: int, purpose: int
) -> None:
    numel, element_map = drawn
    elements = [transcription.mapped(local, *element_map) for local in range(numel)]
    halves = key & 0xFFFFFFFF, key >> 32
    expected = transcription.keep_bits(elements, halves, step, threshold, purpose)
    words = kept_words(numel, element_map, key, step, threshold, purpose, backend)
    assert words.tolist() == transcription.packed(expected)


def test_maps_of_views_are_their_elements() -> None:
    """strided_map of a view of a row-major tensor, by the plain definition, is the view itself."""
    whole = torch.arange(6 * 5 * 8 * 9).view(6, 5, 8, 9)
    views = [whole, whole[:, :3, :, 0::2], whole.permute(3, 1, 0, 2), whole[1:, 2:, 1::2, 3:7]]
    for view in [*views, whole[0, 1:2, :, 3], whole[5, 4, 7, 8]]:
        element_map = strided_map(view.shape, view.stride(), int(view.storage_offset()))
        assert len(element_map.levels) <= 4
        elements = [transcription.mapped(local, *element_map) for local in range(view.numel())]
        assert elements == view.flatten().tolist()


# What chance may do.


def counted(p: float, key: int, step: int, backend: str, numel: int = 200_000) -> Tensor:
    """Keep bits as a bool tensor."""
    words = kept_words(numel, contiguous_map(numel), key, step, round(p * 2**32), 0, backend)
    return ops.unpack_mask(words.cpu(), (numel,), backend="reference")


def check_share(bits: Tensor, p: float) -> None:
    """The number of set bits lies within DEVIATIONS of a binomial count."""
    deviation = math.sqrt(bits.numel() * p * (1 - p))
    assert abs(int(bits.sum()) - bits.numel() * p) <= DEVIATIONS * deviation


@pytest.mark.parametrize("p", [0.02, 0.1, 0.3, 0.5, 0.9])
def test_kept_share(p: float, backend: str) -> None:
    bits = counted(p, philox_key(1, "layer.weight"), 1, backend)
    check_share(bits, p)
    for lane in range(4):
        check_share(bits[lane::4], p)


def test_children_are_nested(backend: str) -> None:
    key = philox_key(1, "layer.weight")
    kept = [counted(p, key, 6, backend) for p in (0.02, 0.1, 0.3, 0.9, 1.0)]
    for smaller, larger in itertools.pairwise(kept):
        assert not (smaller & ~larger).any()
        assert larger.sum() > smaller.sum()


def test_masks_are_independent(backend: str) -> None:
    """Two masks that differ in seed, label, step or place agree as often as independent ones do."""
    p = 0.3
    key = philox_key(1, "layer.weight")
    first = counted(p, key, 1, backend)
    others = [
        counted(p, philox_key(2, "layer.weight"), 1, backend),
        counted(p, philox_key(1, "layer.bias"), 1, backend),
        counted(p, key, 2, backend),
        counted(p, key, 2**31, backend),
        first.roll(1),
        first.roll(4),
        first.roll(64),
    ]
    for left, right in itertools.combinations([first, *others[:4]], 2):
        check_share(left == right, p * p + (1 - p) * (1 - p))
    for moved in others[4:]:
        check_share(first == moved, p * p + (1 - p) * (1 - p))
