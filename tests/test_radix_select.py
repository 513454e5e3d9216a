"""Where the k-th score lies: by a bracket that a sample gives, as by digits (eq. 15)."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from childtune_kernels import ChildMask, ops, radix_select, registry, select_child, selection
from childtune_kernels.radix_select import Place, place_of

from .cases import generator_of
from .columns import placed

OPS = ("topk_select",)
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
        assert place_of(_parts(placed(SCORES[scores], backend)), k, largest, backend) == expected
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
    place = place_of({"w": placed(scores, backend)}, k, largest, backend)
    assert radix_select.value_of(int(place.key)) == float(expected)
    assert bracketed == ([] if backend == "triton" else [None])


def test_few_scores_are_not_sampled(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(radix_select, "_place_in_bracket", None)
    ones = placed(torch.ones(70), backend)
    assert place_of({"w": ones}, 3, True, backend) == Place(0x3F800000, 3, 70)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("at", [0, 1, NUMEL - 1])  # in the sample and beside it
def test_what_has_no_order_is_named(
    bad: float, at: int, backend: str, bracketed: list[Place | None]
) -> None:
    scores = _spread(NUMEL)
    scores[at] = bad
    fisher = {"v": placed(_spread(100), backend), "w": placed(scores, backend)}
    with pytest.raises(ValueError, match=rf"Fisher information of w: {bad} at element {at} "):
        select_child(fisher, reserve_p=0.3, backend=backend)


@pytest.mark.threads
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thread_counts_change_nothing(
    threads: int, column: str, bracketed: list[Place | None]
) -> None:
    scores = {"w": torch.cat([_spread(NUMEL)] * 8)}
    torch.set_num_threads(threads)
    place = place_of(scores, 100_000, True, column)
    expected, _ = radix_select._place_by_digits([*scores.values()], 100_000, True, "reference")
    assert place == expected


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


class _Watch(TorchDispatchMode):
    """While it is on, nothing may bring a tensor's contents to the host."""

    on = False

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            self.refuse(function.name())
        return function(*arguments, **(options or {}))

    def refuse(self, name: str) -> None:
        assert not self.on, f"{name} reads before the report"


@pytest.fixture
def watch(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Selections go the way of devices, and kernels alone look into tensors before the report.

    Yields:
        What ran, in order: the names of the kernels, and "report".
    """
    ran: list[str] = []
    guard = _Watch()

    def unwatched(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            ran.append(name)
            before, guard.on = guard.on, False
            result = function(*arguments, **options)
            guard.on = before
            return result

        return call

    def selected(*arguments: Any, **options: Any) -> Any:
        guard.on = True
        return select(*arguments, **options)

    def settle(*arguments: Any) -> Any:
        ran.append("report")
        guard.on = False
        return read(*arguments)

    def watched(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            guard.refuse(name)
            return function(*arguments, **options)

        return call

    select, read = selection._selected, selection._settle
    monkeypatch.setattr(selection, "_selected", selected)
    monkeypatch.setattr(selection, "_settle", settle)
    monkeypatch.setattr(radix_select, "_is_host_memory", lambda *_: False)
    for name in ("tolist", "cpu", "numpy", "item", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(Tensor, name, watched(name, getattr(Tensor, name)))
    if backend == "triton":
        from childtune_kernels.backends.triton import launch

        run = launch.launch
        monkeypatch.setattr(
            launch,
            "launch",
            lambda kernel, *rest: unwatched(_op_of(kernel), run)(kernel, *rest),
        )
    else:
        for op, names in _KERNELS.items():
            module = registry.choose(op, "cpu", backend).module
            for name in names:
                monkeypatch.setattr(module, name, unwatched(name, getattr(module, name)))
    with guard:
        yield ran


_KERNELS = {
    "topk_select": (
        "digit_histogram",
        "bracket_histogram",
        "select_words",
        "take_ties_",
        "run_scores",
    ),
    "bitmask": ("unpack_mask",),
}


def _op_of(kernel: Any) -> str:
    name: str = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
    return {"take_ties": "take_ties_"}.get(name, name)


PASSES = ["digit_histogram"] * 3 + ["select_words", "take_ties_"]
PASSES_BY_SAMPLE = ["bracket_histogram"] * 2 + ["select_words", "take_ties_"]


@pytest.mark.parametrize("by_sample", [False, True], ids=["digits", "sample"])
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("largest", [True, False])
def test_a_device_is_not_asked_before_the_report(
    scores: str,
    largest: bool,
    by_sample: bool,
    backend: str,
    watch: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By either way, the k-th in the middle and at the ends, in one bin of many keys and of one."""
    fisher = _parts(placed(SCORES[scores], backend))
    ordered = torch.cat([part.view(-1) for part in _parts(SCORES[scores]).values()])
    if by_sample:
        monkeypatch.setattr(radix_select, "_WORTH_A_SAMPLE", 1)
        monkeypatch.setattr(radix_select, "_SAMPLE", 256)
    passes = PASSES_BY_SAMPLE if by_sample else PASSES
    for k, bits in itertools.product((1, NUMEL // 3, NUMEL), (20, 8) if by_sample else (20,)):
        monkeypatch.setattr(radix_select, "_BITS_OF_BINS", bits)
        watch.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            mask = select_child(fisher, k=k, largest=largest, backend=backend)
        assert watch[: len(passes) + 1] == [*passes, "report"]
        first = ordered.argsort(descending=largest, stable=True)[:k]
        expected = torch.zeros(NUMEL, dtype=torch.bool).index_fill(0, first, True)
        found = torch.cat([mask.dense(name).view(-1).cpu() for name in fisher])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("largest", [True, False])
def test_a_device_selects_again_where_a_sample_misled(
    largest: bool, backend: str, watch: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = _spread(NUMEL)
    scores[:: NUMEL // 1024 | 1] += 1000  # the sample sees nothing else
    monkeypatch.setattr(radix_select, "_WORTH_A_SAMPLE", 1)
    monkeypatch.setattr(radix_select, "_SAMPLE", 256)
    k, fisher = NUMEL // 3, {"w": placed(scores, backend)}
    mask = select_child(fisher, k=k, largest=largest, backend=backend)
    assert watch[:11] == [*PASSES_BY_SAMPLE, "report", *PASSES, "report"]
    ordered = scores.argsort(descending=largest, stable=True)
    expected = torch.zeros(NUMEL, dtype=torch.bool).index_fill(0, ordered[:k], True)
    assert torch.equal(mask.dense("w").cpu(), expected)
    place = place_of(fisher, k, largest, backend)
    assert radix_select.value_of(int(place.key)) == float(scores[ordered[k - 1]])


_THREE_PARTS = {name: part for name, part in _parts(SCORES["spread"]).items() if part.numel()}
_OPTIONS: dict[str, dict[str, Any]] = {
    "scopes": {"scope": "tensor", "reserve_p": 0.3},
    "runs": {"granularity": 64, "reserve_p": 0.3},
}


@pytest.fixture(scope="module")
def by_the_reference() -> dict[str, ChildMask]:
    return {
        name: select_child(_THREE_PARTS, backend="reference", **options)
        for name, options in _OPTIONS.items()
    }


@pytest.mark.parametrize("what", _OPTIONS)
def test_all_scopes_and_runs_are_reported_at_once(
    what: str, backend: str, by_the_reference: dict[str, ChildMask], watch: list[str]
) -> None:
    fisher = {name: placed(part, backend) for name, part in _THREE_PARTS.items()}
    mask = select_child(fisher, backend=backend, **_OPTIONS[what])
    passes = [each for each in watch if each != "unpack_mask"]
    expected = PASSES * 3 if what == "scopes" else ["run_scores", *PASSES]
    assert passes == [*expected, "report"]
    assert mask == by_the_reference[what]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("granularity", [1, 64])
def test_what_has_no_order_is_named_by_the_report(
    bad: float, granularity: int, backend: str, watch: list[str]
) -> None:
    scores = _spread(1000)
    scores[[70, 71]] = bad
    fisher = {"v": placed(_spread(100), backend), "w": placed(scores, backend)}
    message = rf"Fisher information of w: {bad} at element 70 \(2 such"
    for k in (1, 5, 15):
        with pytest.raises(ValueError, match=message):
            select_child(fisher, k=k, granularity=granularity, backend=backend)
    full = {"v": fisher["v"], "w": placed(torch.full((99,), 3e38), backend)}
    with pytest.raises(ValueError, match=r"information of w: the sum over a run of 64 .*overflows"):
        select_child(full, k=1, granularity=64, backend=backend)
    assert watch.count("report") == 4
