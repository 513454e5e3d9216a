"""Where the k-th score lies: by a bracket that a sample gives, as by digits (eq. 15)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from childtune_kernels import ops, radix_select, select_child
from childtune_kernels.radix_select import Place, place_of

from .cases import generator_of

NUMEL = 40_000


def _spread(numel: int) -> Tensor:
    generator = generator_of("spread", numel)
    return torch.randn(numel, generator=generator).square_()


SCORES = {
    "spread": _spread(NUMEL),
    "mostly zero": _spread(NUMEL) * (torch.arange(NUMEL) % 5 == 0),
    "few values": (_spread(NUMEL) * 3).floor(),
    "all equal": torch.ones(NUMEL),
    "ascending": torch.arange(NUMEL, dtype=torch.float32),
}
RANKS = [1, 2, NUMEL // 10, NUMEL // 2, NUMEL - NUMEL // 5, NUMEL - 1, NUMEL]


def _parts(scores: Tensor) -> dict[str, Tensor]:
    return {
        "a": scores[:64].view(8, 8),
        "b": scores[64:64],
        "c": scores[64:30_000],
        "d": scores[30_000:],
    }


@pytest.fixture
def bracketed(monkeypatch: pytest.MonkeyPatch) -> list[Place | None]:
    """Samples of 256 in selections of any size; what each attempt found."""
    monkeypatch.setattr(radix_select, "_WORTH_A_SAMPLE", 1)
    monkeypatch.setattr(radix_select, "_SAMPLE", 256)
    found: list[Place | None] = []
    attempt = radix_select._place_in_bracket

    def noted(*arguments: object) -> tuple[Place, Tensor] | None:
        place = attempt(*arguments)  # type: ignore[arg-type]
        found.append(place[0] if place else None)
        return place

    monkeypatch.setattr(radix_select, "_place_in_bracket", noted)
    return found


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("bytes_of_bins", [1 << 24, 1 << 9])
@pytest.mark.parametrize("scores", SCORES)
def test_a_bracket_finds_what_sorting_finds(
    scores: str,
    bytes_of_bins: int,
    largest: bool,
    backend: str,
    bracketed: list[Place | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        radix_select, "_BYTES_OF_BINS", bytes_of_bins
    )  # few: a second look at a bin
    ordered = SCORES[scores].sort(descending=largest).values
    keys = ordered.view(torch.int32)
    for k in RANKS:
        key = int(keys[k - 1])
        first = int((keys == key).nonzero()[0])
        expected = Place(key, k - first, int((keys == key).sum()))
        assert place_of(_parts(SCORES[scores]), k, largest, backend) == expected
    if backend == "triton":  # goes the way of the devices, without a sample
        assert bracketed == []
        return
    assert len(bracketed) == len(RANKS)
    # A sample of 256 has nothing to say of the first and the last few.
    assert [place is None for place in bracketed] == [k in RANKS[:2] + RANKS[-2:] for k in RANKS]


@pytest.mark.parametrize("largest", [True, False])
def test_a_sample_that_misleads_costs_time_alone(
    largest: bool, backend: str, bracketed: list[Place | None]
) -> None:
    scores = _spread(NUMEL)
    stride = NUMEL // 256 | 1
    scores[::stride] += 1000  # the sample sees nothing else
    k = NUMEL // 3
    expected = scores.sort(descending=largest).values[k - 1]
    place = place_of({"w": scores}, k, largest, backend)
    assert radix_select.value_of(place.key) == float(expected)
    assert bracketed == ([] if backend == "triton" else [None])


def test_few_scores_are_not_sampled(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix_select, "_place_in_bracket", None)
    assert place_of({"w": torch.ones(70)}, 3, True, backend) == Place(0x3F800000, 3, 70)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("at", [0, 1, NUMEL - 1])  # in the sample and beside it
def test_what_has_no_order_is_named(
    bad: float, at: int, backend: str, bracketed: list[Place | None]
) -> None:
    scores = _spread(NUMEL)
    scores[at] = bad
    with pytest.raises(ValueError, match=rf"Fisher information of w: {bad} at element {at} "):
        select_child({"v": _spread(100), "w": scores}, reserve_p=0.3, backend=backend)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_counts_change_nothing(
    threads: int, column: str, bracketed: list[Place | None]
) -> None:
    scores = {"w": torch.cat([_spread(NUMEL)] * 8)}
    torch.set_num_threads(threads)
    place = place_of(scores, 100_000, True, column)
    expected, _ = radix_select._place_by_digits([*scores.values()], 100_000, True, "reference")
    assert place == Place(*(int(number) for number in expected))


@pytest.mark.usefixtures("bracketed")
def test_a_bracket_reads_the_scores_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix_select, "_BYTES_OF_BINS", 1 << 28)
    read: list[int] = []
    count = ops.bracket_histogram

    def noted(scores: list[Tensor], *arguments: object) -> tuple[Tensor, Tensor, Tensor]:
        read.append(sum(score.numel() for score in scores))
        return count(scores, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ops, "bracket_histogram", noted)
    place_of({"w": _spread(NUMEL)}, NUMEL // 3, True, None)
    assert read == [NUMEL]
