"""examples/glue.py trains: the grid on made-up tasks, going on where it stopped, the choice, transfer."""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
sys.path.insert(0, str(EXAMPLES))

import glue  # noqa: E402
from childtune_kernels import lr_for  # noqa: E402
from childtune_kernels.integrations.transformers import ChildTuningTrainer  # noqa: E402
from glue_tasks import data, grid, metrics, report, tasks, training  # noqa: E402
from glue_tasks.results import Results  # noqa: E402

from .made_up_glue import BATCH, TRAIN, VALIDATION, sentence, write_csv, write_data, write_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = ["--cpu", "--batch-size", str(BATCH), "--epochs", "1", "--seeds", "2", "--max-length", "16",
         "--learning-rates", "1e-3", "--reserve-p-f", "0.3", "--reserve-p-d", "0.2"]  # fmt: skip


def options_of(folder: Path, out: Path, *more: str) -> list[str]:
    given = ["--model", str(folder / "model"), "--data", str(folder), "--out", str(out)]
    return [*given, *SHORT, *more]


class Recorder(ChildTuningTrainer):
    """Keeps what each trained run was: mode, learning rates a step, examples in order, first weights."""

    runs: list[dict[str, Any]] = []  # noqa: RUF012

    def train(self, *arguments: Any, **options: Any) -> Any:
        self.rates: list[float] = []
        weights = [each.detach().clone() for each in self.model.parameters()]  # type: ignore[union-attr]
        output = super().train(*arguments, **options)
        tuning, mask = self.child_tuning, self.child_mask
        Recorder.runs.append(
            {
                "mode": (tuning.child_mode, tuning.scale_learning_rate),
                "share": round(mask.density(), 2) if mask else tuning.reserve_p,
                "mask": mask,
                "rates": self.rates,
                "weights": np.concatenate([each.numpy().ravel() for each in weights]),
            }
        )
        return output

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        self.rates.append(self.optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        return super().training_step(*arguments, **options)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT, and data of RTE, STS-B and MNLI."""
    folder = tmp_path_factory.mktemp("glue")
    write_model(folder)
    write_data(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _quick_collections() -> Iterator[None]:
    """Every run of a Trainer collects garbage, among a million objects of imported modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(training, "ChildTuningTrainer", Recorder)
    monkeypatch.setattr(Recorder, "runs", [])
    return Recorder.runs


def count_fisher_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gains the number of examples of each measurement."""
    measured: list[int] = []
    original = training.fisher_of_train_set

    def counted(trainer: Any, *arguments: Any, **options: Any) -> Any:
        fisher = original(trainer, *arguments, **options)
        measured.append(fisher.examples)
        return fisher

    monkeypatch.setattr(training, "fisher_of_train_set", counted)
    return measured


class TestGrid:
    def test_the_papers_grid(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert glue.main(["--dry-run", "--scale-learning-rate", "no", "--seeds", "10"]) == 0
        printed = capsys.readouterr().out
        assert (
            "rte   vanilla                     rates 1e-05 2e-05 4e-05, 10 seeds: 30 runs"
            in printed
        )
        assert "stsb  CT_D                 p=0.1" in printed
        # (1 + 3 + 3) times 3 rates, 10 seeds, 4 tasks.
        assert "840 runs in all, 840 to do; 40 Fisher runs" in printed

    def test_all_methods_differ_in_the_child_alone(
        self,
        made_up: Path,
        tmp_path: Path,
        recorded: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        measured = count_fisher_runs(monkeypatch)
        options = options_of(made_up, tmp_path, "--tasks", "rte", "stsb", "--fisher-examples", "10")
        assert glue.main(options) == 0
        assert len(recorded) == 2 * 2 * 4
        steps = TRAIN // BATCH
        for run in recorded:
            peak = lr_for(0.3, 1e-3) if run["mode"] == ("F", True) else 1e-3
            warm_up = math.ceil(0.1 * steps)
            assert warm_up == 1
            assert run["rates"][0] == 0
            falling = [peak * (steps - step) / (steps - 1) for step in range(1, steps)]
            assert run["rates"][1:] == pytest.approx(falling)
        for first in range(0, len(recorded), 4):
            group = recorded[first : first + 4]
            assert [run["mode"] for run in group] == [
                ("none", None),
                ("F", False),
                ("F", True),
                ("D", None),
            ]
            assert [run["share"] for run in group] == [None, 0.3, 0.3, 0.2]
            assert all(np.array_equal(run["weights"], group[0]["weights"]) for run in group)
            density = group[3]["mask"].count() / group[3]["mask"].numel()
            assert density == pytest.approx(0.2, abs=1e-3)
        assert not np.array_equal(recorded[0]["weights"], recorded[4]["weights"])
        assert measured == [10] * 4
        self.check_report(tmp_path, capsys.readouterr().out)

    def check_report(self, out: Path, printed: str) -> None:
        lines = [json.loads(line) for line in (out / "runs.jsonl").read_text("utf-8").splitlines()]
        assert len(lines) == 16
        assert {line["run"]["task"] for line in lines} == {"rte", "stsb"}
        own = [line["scores"]["validation"] for line in lines
               if line["run"]["task"] == "stsb" and line["run"]["method"] == "ct_d"]  # fmt: skip
        assert "rte (accuracy, %)" in printed
        assert "stsb (Spearman correlation, %)" in printed
        row = next(line for line in reversed(printed.splitlines()) if line.startswith("CT_D  "))
        assert row.split()[1] == "1"  # configurations tried
        assert f"{np.mean(own):.1f} ± {np.std(own, ddof=1):.1f}" in row
        assert "CT_F, rate / sqrt(p) against vanilla: " in printed
        assert "test labels are not public" in printed
        assert "--hold-out" in printed
        assert (out / "glue.png").read_bytes().startswith(b"\x89PNG")

    def test_an_interrupted_grid_goes_on_where_it_stopped(
        self, made_up: Path, tmp_path: Path, recorded: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        options = options_of(made_up, tmp_path, "--tasks", "rte", "--methods", "vanilla", "ct_d",
                             "--reserve-p-d", "0.1", "0.2")  # fmt: skip
        original = Results.append
        measured = count_fisher_runs(monkeypatch)

        def stopped(results: Results, *arguments: Any, **others: Any) -> None:
            if len(results.scores) == 2:
                raise KeyboardInterrupt
            original(results, *arguments, **others)

        with monkeypatch.context() as patch:
            patch.setattr(Results, "append", stopped)
            with pytest.raises(KeyboardInterrupt):
                glue.main(options)
        file = tmp_path / "runs.jsonl"
        with file.open("a", encoding="utf-8") as half:
            half.write('{"run": {"task": "rt')
        recorded.clear()
        measured.clear()
        assert glue.main([*options, "--report-only"]) == 0
        assert "no configuration is finished on all 2 seeds" in capsys.readouterr().out
        assert recorded == []
        assert glue.main(options) == 0
        printed = capsys.readouterr().out
        assert "6 runs in all, 4 to do; 2 Fisher runs" in printed
        assert "1 broken lines" in printed
        assert [run["share"] for run in recorded] == [0.2, None, 0.1, 0.2]
        shares = [run["mask"] and run["mask"].count() / run["mask"].numel() for run in recorded]
        assert [share and round(share, 2) for share in shares] == [0.2, None, 0.1, 0.2]
        assert measured == [TRAIN, TRAIN]  # once a seed
        recorded.clear()
        assert glue.main([*options, "--hold-out"]) == 0
        printed = capsys.readouterr().out
        assert "0 to do" in printed
        assert "chosen on one half" in printed
        assert recorded == []
        glue.main([*options, "--warmup-ratio", "0.2", "--dry-run"])
        assert "6 runs in all, 6 to do" in capsys.readouterr().out
        # What is CT_D's alone leaves the others' runs as they are.
        glue.main([*options, "--fisher-examples", "3", "--dry-run"])
        assert "6 runs in all, 4 to do" in capsys.readouterr().out


class TestChoice:
    SETTINGS = grid.Settings("m", "d", 8, 4, 1, 0.1, 0.0, False, None, (), None, 1)

    def test_p_is_chosen_on_one_score_and_reported_on_the_other(self) -> None:
        rates = {"vanilla": (1.0,), "ct_f": (1.0, 2.0)}
        own = grid.Grid(("vanilla", "ct_f"), {"ct_f": (0.2, 0.3)}, rates, seeds=2)
        scores: dict[str, dict[str, float]] = {}
        for number, configuration in enumerate(own.configurations()):
            for seed in range(2):
                run = grid.Run("rte", configuration, seed, self.SETTINGS)
                first = [50, 60, 80, 70, 10][number] + seed
                scores[run.key] = {"validation": 0, "first_half": first, "second_half": 90 - first}
        (column,) = report.columns_of({"rte": self.SETTINGS}, hold_out=True)
        vanilla, ct_f = report.results_of(column, own, self.SETTINGS, scores)
        assert (vanilla.tried, ct_f.tried) == (1, 4)
        assert ct_f.chosen == report.Entry(grid.Configuration("ct_f", 0.2, 2.0), (10, 9))
        assert [entry.configuration.learning_rate for entry in ct_f.by_share] == [2.0, 1.0]
        said = "\n".join(report.caveats([vanilla, ct_f], hold_out=True))
        assert "vanilla 1, CT_F 4" in said
        assert "0.7" in report.details([vanilla, ct_f])  # the deviation of 10 and 9

    def test_halves_are_disjoint_and_cover_all(self) -> None:
        first, second = training.halves(277)
        assert sorted([*first, *second]) == list(range(277))
        assert abs(len(first) - len(second)) == 1


class TestTransfer:
    def test_labels_are_mapped_by_name(
        self, made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The model says class 0, 1, 2, 0, ...: entailment, neutral, contradiction, ...
        monkeypatch.setattr(
            training.TunedTask, "_predicted", lambda self, trainer, rows: np.arange(len(rows)) % 3
        )
        said = ["ENTAILMENT", "NEUTRAL", "CONTRADICTION"] * 4
        write_csv(tmp_path / "sick" / "test.csv", ("sentence_A", "sentence_B", "label"),
                  [(sentence(n), sentence(n), label) for n, label in enumerate(said)])  # fmt: skip
        two = ["neutral", "neutral", "entails", "entails", "neutral", "neutral"]
        write_csv(tmp_path / "scitail" / "validation.csv", ("premise", "hypothesis", "gold_label"),
                  [(sentence(n), sentence(n), label) for n, label in enumerate([*two, "-"])])  # fmt: skip
        options = options_of(made_up, tmp_path / "out", "--transfer", "--tasks", "mnli",
                             "--methods", "vanilla", "--train-examples", "8", "--seeds", "1", "--evaluate-on",
                             f"sick={tmp_path / 'sick'}", f"two={tmp_path / 'scitail'}")  # fmt: skip
        assert glue.main(options) == 0
        (line,) = (tmp_path / "out" / "runs.jsonl").read_text("utf-8").splitlines()
        scores = json.loads(line)["scores"]
        assert scores["on sick"] == 100
        # Wrong where neutral and entailment meet: rows 0 and 2; a contradiction is as good as neutral.
        assert scores["on two"] == pytest.approx(100 * 4 / 6)
        assert scores["validation"] == 100


class Says:
    """A Trainer that predicts given logits."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits

    def predict(self, examples: Any) -> Any:
        assert not any("labels" in each for each in examples)
        return argparse.Namespace(predictions=self.logits[: len(examples)])


class TestOneTask:
    SETTINGS = grid.Settings("m", "d", 8, 4, 3, 0.1, 0.25, False, 10, (), None, 1)

    def tuned(self, made_up: Path, name: str) -> training.TunedTask:
        task, tokens = tasks.TASKS[name], training.Tokens(str(made_up / "model"), max_length=8)
        train, validation = data.read_task(task, made_up)
        return training.TunedTask(task, self.SETTINGS, tokens, train, validation, {}, cpu=True)

    def test_a_regression_is_scored_by_its_values(self, made_up: Path) -> None:
        tuned = self.tuned(made_up, "stsb")
        values = np.exp(np.array(tuned.validation.labels))[:, None]
        assert tuned._scores(Says(values))["validation"] == pytest.approx(100)  # type: ignore[arg-type]

    def test_classes_are_scored_by_the_tasks_metric_on_both_halves(self, made_up: Path) -> None:
        tuned = self.tuned(made_up, "rte")
        tuned.task = replace(tuned.task, metric="F1")
        classes = np.ones(VALIDATION, dtype=int)
        scores = tuned._scores(Says(np.eye(2)[classes]))  # type: ignore[arg-type]
        labels = np.array(tuned.validation.labels)
        assert scores["validation"] == pytest.approx(200 / 3)  # half of them are of class 1
        for name, rows in zip(
            ("first_half", "second_half"), training.halves(VALIDATION), strict=True
        ):
            assert scores[name] == metrics.f1(classes[rows], labels[rows])

    def test_the_trainer_gets_the_settings(self, made_up: Path) -> None:
        tuned = self.tuned(made_up, "rte")
        drawn = []
        for seed in (0, 1, 1):
            plain = training.ChildTuningArguments("none")
            trainer, folder = tuned._trainer(seed, 1e-3, plain)
            with folder:
                arguments = trainer.args
                assert (arguments.weight_decay, arguments.per_device_train_batch_size) == (0.25, 4)
                assert arguments.warmup_steps == 1  # of 9: 3 epochs of 3 batches
                assert (arguments.seed, arguments.num_train_epochs) == (seed, 3)
                drawn.append([each["input_ids"] for each in trainer.train_dataset])  # type: ignore[union-attr]
        assert [len(rows) for rows in drawn] == [10] * 3
        assert drawn[0] != drawn[1]
        assert drawn[1] == drawn[2]
        assert max(map(len, drawn[0])) == 8  # two sentences of four words and three marks, cut off
