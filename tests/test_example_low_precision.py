"""examples/low_precision.py: its verdict, its figures, and the short run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.insert(0, str(EXAMPLES))

import low_precision  # noqa: E402
from finetuning import precision, precision_report  # noqa: E402
from finetuning.precision import (  # noqa: E402
    FP32,
    NONE,
    PRECISIONS,
    SPLIT,
    SPLIT_BF16_MOMENTS,
    STOCHASTIC,
    Experiment,
    PreciseMethod,
    Precision,
    PrecisionResult,
    PrecisionRun,
)
from finetuning.training import TunedModel  # noqa: E402

TITLES = [each.title for each in PRECISIONS]
STATE_BYTES = {FP32: 8, SPLIT: 10, STOCHASTIC: 8, SPLIT_BF16_MOMENTS: 6, NONE: 8}


def result(
    of: Precision, accuracies: Sequence[float], moved: float = 2.0, unchanged: float = 0.0
) -> PrecisionResult:
    runs = [PrecisionRun(each, [1.5, 0.5], moved, unchanged, 2.0, 10.0) for each in accuracies]
    return PrecisionResult(of, 1e-3, runs)


def verdict(reference: Sequence[float], split: Sequence[float]) -> str:
    return precision_report.verdict([result(FP32, reference), result(SPLIT, split)])


class TestVerdict:
    """fp32's seeds at 70, 72 and 74 have a mean of 72 and a deviation of 2."""

    @pytest.mark.parametrize(
        ("split", "said"),
        [
            ([72.0, 72.0, 72.0], "yes. bf16 split differs from fp32 by +0.00 points, within 2.00"),
            ([70.0, 70.0, 70.0], "yes. bf16 split differs from fp32 by -2.00 points, within 2.00"),
            (
                [60.0, 70.0, 79.9],
                "no. bf16 split differs from fp32 by -2.03 points, more than 2.00",
            ),
            (
                [74.0, 74.0, 74.1],
                "no. bf16 split differs from fp32 by +2.03 points, more than 2.00",
            ),
            ([20.0, 21.0, 22.0], "no. bf16 split differs from fp32 by -51.00 points"),
        ],
    )
    def test_the_means_are_held_against_the_deviation_of_fp32(
        self, split: list[float], said: str
    ) -> None:
        assert verdict([70.0, 72.0, 74.0], split).startswith(f"Verdict at 1.0e-03: {said}")

    def test_the_deviation_of_bf16_excuses_nothing(self) -> None:
        assert "no." in verdict([72.0, 72.1, 72.2], [40.0, 70.0, 100.0])

    def test_one_seed_decides_nothing(self) -> None:
        assert "open." in verdict([72.0], [72.0])


class TestReport:
    def test_the_sentence_about_stagnation_has_its_figures(self) -> None:
        results = [result(FP32, [70.0]), result(NONE, [50.0], moved=0.5, unchanged=0.75)]
        said = precision_report.stagnation(results, 1)
        assert "bf16 none at learning rate 1.0e-03: 75.0 % of the layers' weights" in said
        assert "(fp32: 0 %)" in said
        assert "move 25% as far as in fp32" in said
        assert "last loss 0.5000 (fp32: 0.5000)" in said

    def test_smoothed_losses_are_means_of_the_last_steps(self) -> None:
        assert precision_report.smoothed([1.0, 3.0, 5.0, 9.0], 2) == [2.0, 4.0, 7.0]


class Toy(nn.Module):
    """Weights of 1 in a layer, which bf16 keeps in steps of 1/256 below it; a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.head = nn.Linear(8, 2)
        nn.init.ones_(self.layers[0].get_parameter("weight"))
        nn.init.ones_(self.layers[0].get_parameter("bias"))


def toy_run(of: Precision, learning_rate: float) -> PrecisionRun:
    """One step with a gradient of 1 everywhere: every weight of the layer falls by the learning rate."""
    model, start = Toy().to(of.dtype), Toy().to(of.dtype)
    start.load_state_dict(model.state_dict())
    optimizer = PreciseMethod("adamw", precision=of).optimizer(model, learning_rate, 0, None)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state_bytes()
    return precision._measured(TunedModel(model, optimizer, [0.0], state, [1.0]), start, 50.0)


class TestMeasured:
    @pytest.mark.parametrize("of", PRECISIONS, ids=TITLES)
    def test_movement_is_that_of_the_masters_and_of_the_layers_alone(self, of: Precision) -> None:
        run = toy_run(of, 1e-4)  # below half a place
        if of == NONE:
            assert (run.moved, run.unchanged) == (0.0, 1.0)
        elif of == STOCHASTIC:
            assert 0.8 < run.unchanged < 1
        else:
            assert run.unchanged == 0
            # 72 weights; a master near 1 has steps of 6e-8, and bf16 moments carry 8 bits.
            tolerance = 0.01 if of.state_dtype else 1e-3
            assert run.moved == pytest.approx(72**0.5 * 1e-4, rel=tolerance)

    @pytest.mark.parametrize("of", PRECISIONS, ids=TITLES)
    def test_bytes_are_those_of_a_weight_and_of_its_state(self, of: Precision) -> None:
        run = toy_run(of, 1e-4)
        steps = 8 * 4 / 90  # an int64 for each of four parameters, shared by 90 weights
        assert run.weight_bytes == of.dtype.itemsize
        assert run.state_bytes == pytest.approx(STATE_BYTES[of] + steps)


class ShortRun(NamedTuple):
    """What the short run printed and saved, and the experiment that it was."""

    printed: str
    folder: Path
    rows: list[dict[str, Any]]
    experiment: Experiment


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShortRun]:
    folder = tmp_path_factory.mktemp("low_precision") / "out"
    experiments = []

    def compare(experiment: Experiment, *rest: Any) -> list[list[PrecisionResult]]:
        experiments.append(experiment)
        return precision.compare_precisions(experiment, *rest)

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(low_precision, "compare_precisions", compare)
        assert low_precision.main(["--short", "--rate", "1e-3", "--out", str(folder)]) == 0
    saved = json.loads((folder / "low_precision.json").read_text("utf-8"))
    yield ShortRun(printed.getvalue(), folder, saved["results"], experiments[0])
    torch.set_num_threads(threads)


class TestShortRun:
    def test_a_table_and_a_verdict_for_both_learning_rates(self, short_run: ShortRun) -> None:
        for title in TITLES:
            assert short_run.printed.count(f"\n{title}  ") == 2
        for rate in ("1.8e-03", "9.1e-05"):
            assert f"CT_F (p=0.3), learning rate {rate}" in short_run.printed
            assert f"\nVerdict at {rate}: " in short_run.printed
            assert f"\nbf16 none at learning rate {rate}: " in short_run.printed

    def test_picture_and_figures_are_saved(self, short_run: ShortRun) -> None:
        picture = (short_run.folder / "low_precision.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert [row["precision"] for row in short_run.rows] == TITLES * 2
        for row, of in zip(short_run.rows, PRECISIONS * 2, strict=True):
            assert len(row["runs"]) == low_precision.SHORT.seeds
            for run in row["runs"]:
                assert len(run["losses"]) == 2
                assert STATE_BYTES[of] < run["state_bytes"] < STATE_BYTES[of] + 0.01

    def test_split_masters_go_the_way_of_fp32_and_bare_weights_stay_behind(
        self, short_run: ShortRun
    ) -> None:
        low = dict(zip(PRECISIONS, short_run.rows[len(PRECISIONS) :], strict=True))
        moved = {of: row["runs"][0]["moved"] for of, row in low.items()}
        unchanged = {of: row["runs"][0]["unchanged"] for of, row in low.items()}
        for of in (SPLIT, SPLIT_BF16_MOMENTS):
            assert moved[of] == pytest.approx(moved[FP32], rel=0.02)
            assert unchanged[of] < 1e-3
        assert moved[NONE] < 0.85 * moved[FP32]
        assert unchanged[NONE] > 0.5

    @pytest.mark.slow
    def test_processes_of_their_own_give_the_same_figures(self, short_run: ShortRun) -> None:
        rate = short_run.rows[0]["learning_rate"]
        (found,) = precision.compare_precisions(short_run.experiment, [rate], 1, processes=2)
        for each, row in zip(found, short_run.rows, strict=False):
            assert asdict(each.runs[0]) == row["runs"][0]


@pytest.mark.parametrize("options", [("--rate", "0"), ("--seeds", "0"), ("--method", "ct_g")])
def test_options_out_of_range(options: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="2"):
        low_precision.main(options)
