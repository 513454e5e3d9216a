"""select_child and random_child against a stable sort, plain loops and NumPy (SPEC.md, "Selection")."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from childtune_kernels import ChildMask, random_child, select_child
from childtune_kernels.selection import child_size

from .cases import generator_of
from .columns import placed
from .ops import transcription

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = ("topk_select", "bitmask")
SUBNORMAL = 1e-45


def chosen(mask: ChildMask) -> list[tuple[str, int]]:
    """(name, element) of the child, in the order of the mask."""
    return [
        (name, element)
        for name in mask.words
        for element in mask.dense(name).flatten().nonzero().flatten().tolist()
    ]


def sorted_child(fisher: Mapping[str, Tensor], k: int, largest: bool) -> list[tuple[str, int]]:
    """The first k of a stable sort in plain Python, back in the order of the mask."""
    order = {name: at for at, name in enumerate(fisher)}
    elements = [
        (name, element, value)
        for name, values in fisher.items()
        for element, value in enumerate(values.flatten().tolist())
    ]
    elements.sort(key=lambda each: -each[2] if largest else each[2])
    first = [(name, element) for name, element, _ in elements[:k]]
    return sorted(first, key=lambda each: (order[each[0]], each[1]))


def check_selection(fisher: Mapping[str, Tensor], k: int, largest: bool, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mask = select_child(fisher, k=k, largest=largest, backend=backend)
    assert mask.count() == k
    assert chosen(mask) == sorted_child(fisher, k, largest)


def split(values: Tensor, *sizes: int) -> dict[str, Tensor]:
    """One tensor in parts under names that are not in alphabetical order, an empty one among them."""
    assert sum(sizes) == values.numel()
    parts = values.split(list(sizes))
    return {f"{(7 * at + 3) % 11}.{at}": part for at, part in enumerate(parts)}


def ulps(count: int) -> Tensor:
    """Neighbouring fp32 numbers around 1."""
    return (torch.arange(count, dtype=torch.int32) + 0x3F800000 - count // 2).view(torch.float32)


def shuffled(values: Tensor, *what: object) -> Tensor:
    return values[torch.randperm(values.numel(), generator=generator_of(*what))]


NUMEL = 700
SIZES = (300, 0, 64, 1, 335)
VALUES: dict[str, Tensor] = {
    "random": torch.rand(NUMEL, generator=generator_of("random")),
    "squares of many sizes": (torch.randn(NUMEL, generator=generator_of("squares")) * 1e-6).square(),
    "all equal": torch.full((NUMEL,), 0.125),
    "all zero": torch.zeros(NUMEL),
    "zeros of both signs": torch.tensor([0.0, -0.0, -0.0, 0.0, 1.0]).repeat(NUMEL // 5),
    "80 % zeros": torch.rand(NUMEL, generator=generator_of("zeros")).sub(0.8).clamp(min=0),
    "subnormal": shuffled(torch.arange(NUMEL) % 50, "subnormal") * SUBNORMAL,
    "one ulp apart": shuffled(ulps(NUMEL // 2).repeat(2), "ulps"),
    "a bin's borders": shuffled(
        torch.tensor([0x3F7FFFFF, 0x3F800000, 0x3F8003FF, 0x3F800400, 0x3F8FFFFF, 0x3F900000, 0x7F7FFFFF])
        .to(torch.int32).view(torch.float32).repeat(NUMEL // 7), "borders"),
}  # fmt: skip


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_selection_is_a_stable_sort(values: str, largest: bool, backend: str) -> None:
    fisher = split(placed(VALUES[values], backend), *SIZES)
    assert list(fisher) != sorted(fisher)
    for k in (1, 2, 137, 350, NUMEL - 1, NUMEL):
        check_selection(fisher, k, largest, backend)


_SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, SUBNORMAL, 1.0, float(np.nextafter(np.float32(1), 2)), 3.4e38]),
    st.floats(0, 2.0**127, width=32),
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(parts=st.lists(st.lists(_SCORES, max_size=90), min_size=1, max_size=6), data=st.data())
def test_any_split(backend: str, parts: list[list[float]], data: st.DataObject) -> None:
    names = data.draw(st.permutations([f"layer.{at}" for at in range(len(parts))]))
    fisher = {
        name: placed(torch.tensor(part, dtype=torch.float32), backend)
        for name, part in zip(names, parts, strict=True)
    }
    numel = sum(map(len, parts))
    if numel:
        k = data.draw(st.integers(1, numel))
        check_selection(fisher, k, data.draw(st.booleans()), backend)
    else:
        assert select_child(fisher, reserve_p=0.5, backend=backend).count() == 0


# Size, scope and what is asked for.


@pytest.mark.parametrize(
    ("p", "numel", "k"),
    [
        (0.3, 0, 0), (0.3, 1, 1), (1e-12, 10, 1), (1.0, 10, 10), (0.5, 1, 1), (0.5, 3, 2), (0.25, 10, 3),
        (0.3, 5, 1),  # 0.3 is a little below 3/10: not 2, which 0.3 * 5 + 0.5 would give
        (0.1, 5, 1), (0.1, 2**62 + 1, 461168601842738816),  # and 0.1 a little above 1/10
    ],
)  # fmt: skip
def test_the_size_of_a_child_is_exact(p: float, numel: int, k: int) -> None:
    assert child_size(p, numel) == k
    if 0 < numel < 100:
        assert select_child({"w": torch.rand(numel)}, reserve_p=p).count() == k
        assert random_child({"w": (numel,)}, p, 0).count() == k


def test_nothing_to_select_from(backend: str) -> None:
    empty = {"a": placed(torch.zeros(0), backend), "b": placed(torch.zeros(3, 0), backend)}
    for options in ({}, {"scope": "tensor"}, {"granularity": 64}, {"rule": "percentile"}):
        mask = select_child(empty, reserve_p=0.3, backend=backend, dense=["head"], **options)
        assert mask.numel() == mask.count() == 0
        assert mask.names == ["a", "b", "head"]
    assert random_child({"a": (0,)}, 0.3, 0).count() == 0
    assert select_child({}, reserve_p=0.3, dense=["head"]).names == ["head"]
    with pytest.raises(ValueError, match=r"k=1 must lie in 1\.\.0"):
        select_child(empty, k=1, backend=backend)


def test_scope_tensor_is_each_by_itself(backend: str) -> None:
    fisher = split(placed(VALUES["squares of many sizes"], backend), *SIZES)
    mask = select_child(fisher, reserve_p=0.1, scope="tensor", backend=backend)
    for name, values in fisher.items():
        k = child_size(0.1, values.numel())
        assert [each for each in chosen(mask) if each[0] == name] == sorted_child(
            {name: values}, k, True
        )
    assert mask != select_child(fisher, reserve_p=0.1, backend=backend)


@pytest.mark.filterwarnings("ignore:k=.* is more than:UserWarning")
@pytest.mark.parametrize("granularity", [32, 64, 128, 1024])
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_granularity_is_its_definition(granularity: int, largest: bool, backend: str) -> None:
    fisher = split(placed(VALUES["80 % zeros"], backend), 333, 0, 64, 1, 302)
    fisher["tail"] = placed(torch.rand(1057), backend)
    starts = {name: range(0, values.numel(), granularity) for name, values in fisher.items()}
    by_run = {
        name: torch.from_numpy(transcription.run_scores(values.tolist(), granularity))
        for name, values in fisher.items()
    }
    runs = sum(map(len, starts.values()))
    for k in {1, runs // 2, runs}:
        mask = select_child(fisher, k=k, granularity=granularity, largest=largest, backend=backend)
        expected = [
            (name, element)
            for name, run in sorted_child(by_run, k, largest)
            for element in range(
                starts[name][run], min(starts[name][run] + granularity, fisher[name].numel())
            )
        ]
        assert chosen(mask) == expected
    half = select_child(fisher, reserve_p=0.5, granularity=granularity, backend=backend)
    assert half == select_child(
        fisher, k=child_size(0.5, runs), granularity=granularity, backend=backend
    )


def test_equal_runs_follow_their_position(backend: str) -> None:
    fisher = {"b": placed(torch.ones(100), backend), "a": placed(torch.ones(64), backend)}
    mask = select_child(fisher, k=3, granularity=32, backend=backend)
    assert chosen(mask) == [("b", element) for element in range(96)]


def test_wrapped_names_and_shapes(backend: str) -> None:
    values = placed(torch.rand(3, 4, 5), backend)
    mask = select_child({"module._orig_mod.w": values}, k=7, dense=["module.head"], backend=backend)
    assert mask.names == ["w", "head"]
    assert mask.shapes["w"] == (3, 4, 5)
    assert torch.equal(mask.dense("w"), values >= values.flatten().sort().values[-7])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_types_are_ordered_by_their_values(dtype: torch.dtype, backend: str) -> None:
    fisher = split(placed(VALUES["random"].to(dtype), backend), *SIZES)
    for k in (1, 300):
        check_selection(fisher, k, True, backend)


def test_any_layout_is_read_row_major(backend: str) -> None:
    whole = placed(torch.rand(9, 8, 10, generator=generator_of("layout")), backend)
    views = {"t": whole.permute(2, 0, 1), "s": whole[::2, :, 3:], "p": torch.nn.Parameter(whole)}
    before = whole.clone()
    plain = {name: view.detach().contiguous() for name, view in views.items()}
    assert select_child(views, k=500, backend=backend) == select_child(
        plain, k=500, backend=backend
    )
    assert torch.equal(whole, before)


@pytest.mark.parametrize("granularity", [1, 32])
@pytest.mark.parametrize(
    ("bad", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-1.0, "-1.0"), (-SUBNORMAL, "-1.4")]
)
def test_what_has_no_order_is_named(bad: float, shown: str, granularity: int, backend: str) -> None:
    values = torch.rand(100)
    values[70] = bad
    fisher = {
        name: placed(each, backend)
        for name, each in (
            ("fine", torch.rand(200)),
            ("module.bad.weight", values),
            ("late", values),
        )
    }
    for rule in ["exact", "percentile"][: 2 if granularity == 1 else 1]:
        message = rf"Fisher information of bad\.weight: {shown}\S* at element 70 \(1 such"
        with pytest.raises(ValueError, match=message):
            select_child(fisher, reserve_p=0.3, granularity=granularity, rule=rule, backend=backend)


def test_a_run_that_overflows_is_named(backend: str) -> None:
    large = placed(torch.full((64,), 3e38), backend)
    fisher = {"fine": large, "big": large[:32].clone()}
    fisher["fine"][1:32] = fisher["fine"][33:] = 0
    with pytest.raises(ValueError, match="of big: the sum over a run of 32 elements overflows"):
        select_child(fisher, k=1, granularity=32, backend=backend)
    assert select_child(fisher, k=1, backend=backend).count() == 1


@pytest.mark.parametrize(("granularity", "nonzero"), [(1, 40), (32, 2)])
def test_a_child_of_zeros_is_warned_of(granularity: int, nonzero: int, backend: str) -> None:
    fisher = {"a": placed(torch.zeros(320), backend), "b": placed(torch.ones(40), backend)}
    options: dict[str, Any] = {"granularity": granularity, "backend": backend}
    message = f"k={nonzero + 3} is more than the {nonzero} non-zero values"
    with pytest.warns(UserWarning, match=message) as caught:
        mask = select_child(fisher, k=nonzero + 3, **options)
    assert caught[0].filename == __file__
    assert mask.count("a") == 3 * granularity
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_child(fisher, k=nonzero, **options).count("b") == 40
        select_child(fisher, k=nonzero + 3, largest=False, **options)


def test_zeros_in_several_tensors_are_one_warning() -> None:
    fisher = {"a": torch.zeros(10), "full": torch.ones(10), "b": torch.tensor([1.0] + [0.0] * 9)}
    with pytest.warns(UserWarning, match="of a, b") as caught:
        select_child(fisher, reserve_p=0.5, scope="tensor")
    assert [str(each.message).split(";")[0] for each in caught] == [
        "k=10 is more than the 1 non-zero values of Fisher information of a, b"
    ]


F = {"w": torch.ones(70)}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "reserve_p=None and k=None: give exactly one"),
    ({"reserve_p": 0.3, "k": 3}, "reserve_p=0.3 and k=3: give exactly one"),
    ({"reserve_p": 0.0}, r"reserve_p=0.0 must lie in \(0, 1\]"),
    ({"reserve_p": 1.5}, "reserve_p=1.5"),
    ({"reserve_p": math.nan}, "reserve_p=nan"),
    ({"reserve_p": True}, "reserve_p=True"),
    ({"reserve_p": "0.3"}, "reserve_p='0.3'"),
    ({"k": 0}, r"k=0 must lie in 1\.\.70, the number of elements"),
    ({"k": 71}, r"k=71 must lie in 1\.\.70"),
    ({"k": 4, "granularity": 32}, r"k=4 must lie in 1\.\.3, the number of runs of 32 elements"),
    ({"k": 2.0}, "k=2.0 must be an int"),
    ({"k": 2, "scope": "tensor"}, "use reserve_p"),
    ({"k": 2, "scope": "layer"}, "scope='layer' must be one of"),
    ({"k": 2, "granularity": 48}, "granularity=48 must be 1 or a multiple of 32"),
    ({"k": 2, "granularity": 0}, "granularity=0"),
    ({"k": 2, "granularity": 32.0}, "granularity=32.0"),
    ({"k": 2, "rule": "median"}, "rule='median' must be one of"),
    ({"k": 2, "rule": "percentile"}, "goes with reserve_p alone"),
    ({"reserve_p": 0.3, "rule": "percentile", "largest": False}, "goes with reserve_p alone"),
    ({"reserve_p": 0.3, "rule": "percentile", "granularity": 32}, "goes with reserve_p alone"),
    ({"reserve_p": 0.3, "rule": "percentile", "scope": "tensor"}, "goes with reserve_p alone"),
    ({"k": 2, "backend": "cuda"}, "backend='cuda' is unknown"),
    ({"k": 2, "dense": ["w"]}, "w cannot be dense and have a mask"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda each: str(each))
def test_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_child(F, **options)


@pytest.mark.parametrize(
    ("fisher", "message"),
    [
        ({"w": torch.ones(3).double()}, "of w: dtype torch.float64; use float32"),
        ({"w": torch.ones(3, dtype=torch.int32)}, "of w: dtype torch.int32"),
        ({"w": torch.eye(3).to_sparse()}, "of w: torch.sparse_coo; a dense tensor"),
        ({"w": [1.0]}, "of w: list; a dense tensor"),
        ({"w": torch.ones(3, device="meta")}, "of w: a Tensor on meta has no memory"),
        ({"w": F["w"], "module.w": F["w"]}, "'w' stands for two parameters"),
    ],
    ids=str,
)
def test_tensors_are_refused(fisher: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_child(fisher, k=1)


@pytest.mark.threads
def test_thread_counts_change_nothing(backend: str) -> None:
    values = torch.rand(200_000, generator=generator_of("threads")).mul(5000).floor()
    fisher = split(values, 70_001, 0, 65_536, 64_463)
    torch.set_num_threads(1)
    expected = select_child(fisher, reserve_p=0.3, backend="reference")
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert select_child(fisher, reserve_p=0.3, backend=backend) == expected


# The original code's rule.


@pytest.mark.parametrize("values", VALUES)
def test_the_percentile_rule_is_numpys(values: str, backend: str) -> None:
    fisher = split(placed(VALUES[values], backend), *SIZES)
    wide = VALUES[values].double().numpy()
    for p in (1.0, 0.999, 0.9, 0.5, 0.3, 0.25, 0.1, 0.0015, 1e-6, 1e-18):
        mask = select_child(fisher, reserve_p=p, rule="percentile", backend=backend)
        kept = torch.from_numpy(wide >= np.percentile(wide, 100 * (1 - p)))
        found = torch.cat([mask.dense(name).flatten() for name in fisher])
        assert torch.equal(found.cpu(), kept)


def test_the_percentile_rule_keeps_everything_where_most_is_zero() -> None:
    fisher = {"w": VALUES["80 % zeros"]}
    assert select_child(fisher, reserve_p=0.3, rule="percentile").count() == NUMEL
    with pytest.warns(UserWarning, match="non-zero"):
        assert select_child(fisher, reserve_p=0.3).count() == child_size(0.3, NUMEL)


def test_percentiles_that_rounding_moves_off_a_value() -> None:
    """(N - 1) q is whole but for rounding: numpy's percentile is then a value, or just beside one."""
    moved = 0
    for numel in range(2, 60):
        values = (torch.arange(numel) * 7 % numel) / 3
        wide = values.double().numpy()
        for tenths in range(1, 10):
            p = tenths / 10
            position = (numel - 1) * (100 * (1 - p) / 100)
            moved += 0 < position - math.floor(position) < 1e-12
            mask = select_child({"w": values}, reserve_p=p, rule="percentile")
            assert mask.dense("w").tolist() == (wide >= np.percentile(wide, 100 * (1 - p))).tolist()
    assert moved > 0


def test_default_devices_and_types_change_nothing(backend: str) -> None:
    fisher = split(placed(VALUES["80 % zeros"], backend), *SIZES)
    options: list[dict[str, Any]] = [
        {}, {"granularity": 32}, {"rule": "percentile"}, {"scope": "tensor"}
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for each in options:
            expected = select_child(fisher, reserve_p=0.3, backend=backend, **each)
            with torch.device("meta"), torch.inference_mode():
                found = select_child(fisher, reserve_p=0.3, backend=backend, **each)
            assert found == expected
    expected = random_child({"w": (100,)}, 0.3, 0)
    with torch.device("meta"):
        assert random_child({"w": (100,)}, 0.3, 0) == expected


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=40),
    p=st.floats(0, 1, exclude_min=True),
)
def test_any_percentile(values: list[float], p: float) -> None:
    fisher = {"w": torch.tensor(values, dtype=torch.float32)}
    wide = fisher["w"].double().numpy()
    kept = wide >= np.percentile(wide, 100 * (1 - p))
    mask = select_child(fisher, reserve_p=p, rule="percentile")
    assert mask.dense("w").tolist() == kept.tolist()
