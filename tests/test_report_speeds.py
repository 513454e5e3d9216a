"""The table and the verdict of optimizers side by side, from measurements that are made up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from childtune_kernels.contenders import NAMES, entrants_of
from childtune_kernels.model_shapes import ModelShapes
from childtune_kernels.report.speeds import note, speeds_table, standing, verdict
from childtune_kernels.side_by_side import Measured, SideBySide

CPU = torch.device("cpu")


def made_up(
    ratios: Mapping[str, tuple[float, float, float]], *, rounds: int = 20, **changes: Any
) -> SideBySide:
    """Measurements of a billion parameters: quartiles of times in relation to a base of 100 ms."""
    titles = {each.name: each.title for each in entrants_of(NAMES, CPU, torch.float32, 0.3, 0.1)}
    state = {"ct_d": 1.03, "ct_d_runs": 0.91}
    measured = tuple(
        Measured(
            name,
            titles[name],
            name in ("plain", "ct_f", "ct_d", "ct_d_runs"),
            seconds=(0.1 * low, 0.1 * middle, 0.1 * high),
            of_base=(low, middle, high),
            rounds=rounds,
            state_bytes=int(1e9 * state.get(name, 8.0)),
        )
        for name, (low, middle, high) in {"torch-fused": (1.0, 1.0, 1.0), **ratios}.items()
    )
    model = ModelShapes("made for a test", {"w": (10**9,)})
    found = {
        "model": model, "device": CPU, "dtype": torch.float32, "backend": "cpp", "absent": "",
        "measured": measured,
    }  # fmt: skip
    return SideBySide(**{**found, **changes})


def test_the_verdict_tells_faster_from_slower() -> None:
    ratios = {
        "unfused": (24.0, 25.0, 26.0), "plain": (0.97, 1.01, 1.05), "ct_f": (1.09, 1.10, 1.12),
        "ct_d": (0.55, 0.57, 0.60),
    }  # fmt: skip
    speed, state, unfused = verdict(made_up(ratios))
    assert speed == (
        "Of the time of torch's fused AdamW, plain FusedChildAdamW takes 1.01 (about as fast), CT_F at "
        "p = 0.3 takes 1.10 (slower) and CT_D at density 0.1 takes 0.57 (faster)."
    )
    assert state == (
        "CT_D at density 0.1 keeps 1.03 bytes of state a parameter instead of 8.00: 6.97 GB less for this "
        "model."
    )
    assert unfused == ("An unfused Child-Tuning step takes 23 times as long as CT_F at p = 0.3.")


@pytest.mark.parametrize(
    ("quartiles", "rounds", "expected"),
    [
        ((0.50, 0.60, 0.70), 20, "faster"),
        ((0.50, 0.80, 0.99), 20, "faster"),
        ((1.06, 1.10, 1.60), 20, "slower"),
        ((0.97, 1.01, 1.06), 20, "about as fast"),
        ((0.96, 0.98, 0.99), 20, "about as fast"),
        ((1.01, 1.02, 1.03), 20, "about as fast"),
        ((0.80, 0.90, 1.10), 20, "unclear"),
        ((0.20, 0.45, 1.80), 20, "unclear"),
        ((0.60, 0.61, 0.62), 4, "unclear"),
        ((0.39, 0.40, 0.41), 4, "faster"),
        ((2.90, 3.00, 3.10), 1, "slower"),
    ],
)
def test_standing(quartiles: tuple[float, float, float], rounds: int, expected: str) -> None:
    (base, measured) = made_up({"ct_f": quartiles}, rounds=rounds).measured
    assert standing(measured, base) == expected


def test_where_the_spread_is_large_nothing_is_claimed() -> None:
    noisy = {"plain": (0.7, 1.01, 1.4), "ct_f": (0.8, 0.9, 1.2)}
    speed, _ = verdict(made_up(noisy))
    assert speed.startswith(
        "Whether plain FusedChildAdamW or CT_F at p = 0.3 is faster cannot be told"
    )
    assert "idle machine" in speed
    assert "takes" not in speed
    speed, *_ = verdict(made_up({**noisy, "ct_d": (0.5, 0.6, 0.7)}))
    assert "CT_D at density 0.1 takes 0.60 (faster); whether plain" in speed


def test_a_base_that_varies_is_said() -> None:
    found = made_up({"ct_d": (0.3, 0.3, 0.3)})

    def with_base(*seconds: float) -> list[str]:
        base = Measured(**{**vars(found.base), "seconds": seconds})
        return verdict(made_up({}, measured=(base, *found.measured[1:])))

    assert len(with_base(0.09, 0.1, 0.105)) == 2
    caution, speed, _ = with_base(0.09, 0.1, 0.13)
    assert "themselves differ by 40%" in caution
    assert "takes 0.30 (faster)" in speed
    caution, speed, _ = with_base(0.08, 0.1, 0.14)
    assert "themselves differ by 60%" in caution
    assert speed.startswith("Whether CT_D at density 0.1 is faster cannot be told")


@pytest.mark.parametrize("default", [0.03, 0.79, 0.81])
def test_a_base_that_something_held_up_proves_nothing(default: float) -> None:
    """torch's default step does more than its fused one; beside a stalled base all look fast."""
    found = made_up({"torch-default": (default, default, default), "plain": (0.02, 0.02, 0.02)})
    first, *others = verdict(found)
    if default < 0.8:
        assert first.startswith("torch's fused AdamW took longer than torch's AdamW by default")
        assert others[0].startswith("Whether plain FusedChildAdamW is faster cannot be told")
    else:
        assert "plain FusedChildAdamW takes 0.02 (faster)" in first


def test_figures_of_the_reference_do_not_stand_for_the_package() -> None:
    slow = made_up({"ct_f": (30, 31, 32)}, backend="reference", absent="cpp: no C++ compiler")
    caution, speed, _ = verdict(slow)
    assert caution.startswith("These times do not stand for the package, whose slow reference")
    assert "(cpp: no C++ compiler)" in caution
    assert "CT_F at p = 0.3 takes 31 (slower)" in speed


def test_more_state_and_equal_state_are_said() -> None:
    plain = made_up({"plain": (1.0, 1.0, 1.0)})
    assert verdict(plain)[1].startswith(
        "plain FusedChildAdamW keeps as much state as torch's fused"
    )
    base = Measured(**{**vars(plain.base), "state_bytes": 4 * 10**9})
    more = made_up({}, measured=(base, *plain.measured[1:]), dtype=torch.bfloat16)
    assert verdict(more)[1].endswith("8.00 bytes of state a parameter instead of 4.00: 4.00 GB more for "
                                     "this model.")  # fmt: skip
    assert "fp32 moments" in note(more)
    assert note(plain) == ""


def test_ours_alone_are_judged_and_failures_have_a_row() -> None:
    failed = Measured("ct_d", "CT_D", True, failure="out of memory")
    found = made_up({"unfused": (24.0, 25.0, 26.0)})
    found = made_up({}, measured=(*found.measured, failed))
    assert verdict(found) == []
    assert not found.sound
    rows = {line[:4]: line.split() for line in speeds_table(found).splitlines()}
    assert rows["CT_D"] == ["CT_D", "failed", "-", "-", "-", "-"]
    assert rows["unfu"][-5:] == ["2,500", "25", "24–26", "20", "8.00"]
