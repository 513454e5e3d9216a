"""examples/glue.py: metrics, data, the grid on made-up tasks, going on where it stopped, transfer, errors."""

from __future__ import annotations

import csv
import gc
import json
import math
import sys
from collections.abc import Iterator, Sequence
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

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["the", "printer", "server", "is", "out", "of", "paper", "lost", "its", "network", "not"]
TRAIN, VALIDATION, BATCH = 24, 12, 4
SHORT = ["--cpu", "--batch-size", str(BATCH), "--epochs", "1", "--seeds", "2", "--max-length", "16",
         "--learning-rates", "1e-3", "--reserve-p-f", "0.3", "--reserve-p-d", "0.2"]  # fmt: skip


class TestMetrics:
    def test_accuracy(self) -> None:
        assert metrics.accuracy([1, 0, 1, 1], [1, 0, 0, 1]) == 75

    def test_f1_is_of_class_one(self) -> None:
        # Two hits of three said and four there: precision 2/3, recall 1/2.
        assert metrics.f1([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]) == pytest.approx(100 * 4 / 7)
        assert metrics.f1([0, 0], [1, 0]) == 0

    def test_matthews(self) -> None:
        # Of class 1: 2 hits, 1 false, 1 missed; 1 right 0: (2·1 − 1·1) / √(3·3·2·2).
        assert metrics.matthews([1, 1, 1, 0, 0], [1, 1, 0, 1, 0]) == pytest.approx(100 / 6)
        assert metrics.matthews([0, 1], [1, 0]) == pytest.approx(-100)
        assert metrics.matthews([1, 1, 1], [1, 0, 1]) == 0

    def test_spearman(self) -> None:
        assert metrics.spearman([0.1, 0.2, 9.0, 10.0], [1, 2, 3, 4]) == pytest.approx(100)
        # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
        assert metrics.spearman([0, 5, 5, 6], [1, 2, 3, 4]) == pytest.approx(
            100 * 4.5 / math.sqrt(4.5 * 5)
        )
        assert metrics.spearman([2.0, 2.0], [1, 2]) == 0

    def test_every_task_has_one_and_the_papers_four_have_the_papers(self) -> None:
        assert {task.metric for task in tasks.TASKS.values()} <= set(metrics.METRICS)
        found = [tasks.TASKS[name].metric for name in tasks.PAPER_TASKS]
        assert found == ["accuracy", "F1", "Matthews correlation", "Spearman correlation"]


def sentence(number: int) -> str:
    return " ".join(WORDS[(number * step) % len(WORDS)] for step in (1, 2, 3, 5))


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT, and data of RTE, STS-B and MNLI."""
    folder = tmp_path_factory.mktemp("glue")
    model, vocabulary = folder / "model", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    model.mkdir()
    (model / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    configuration = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    transformers.set_seed(0)
    transformers.BertModel(configuration).save_pretrained(model)  # heads are drawn by the seed
    transformers.BertTokenizerFast.from_pretrained(model).save_pretrained(model)
    pair, inference = ("sentence1", "sentence2", "label"), ("premise", "hypothesis", "label")
    for split, count in (("train", TRAIN), ("validation", VALIDATION)):
        names = tasks.TASKS["rte"].labels
        rows = [(sentence(n), sentence(n + n % 2), names[n % 2]) for n in range(count)]
        write_csv(folder / "rte" / f"{split}.csv", pair, rows)
        lines = [
            json.dumps(
                dict(zip(pair, (sentence(n), sentence(n + n % 5), n % 5 + 0.25), strict=True))
            )
            for n in range(count)
        ]
        (folder / "stsb").mkdir(exist_ok=True)
        (folder / "stsb" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        numbered = [(sentence(n), sentence(n + n % 3), n % 3) for n in range(count)]
        name = {"validation": "validation_matched"}.get(split, split)
        write_csv(folder / "mnli" / f"{name}.csv", inference, numbered)
    return folder


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
        tuning = self.child_tuning
        Recorder.runs.append(
            {
                "mode": (tuning.child_mode, tuning.scale_learning_rate),
                "share": tuning.reserve_p,
                "mask": self.child_mask,
                "rates": self.rates,
                "weights": np.concatenate([each.numpy().ravel() for each in weights]),
            }
        )
        return output

    def training_step(self, *arguments: Any, **options: Any) -> Any:
        self.rates.append(self.optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        return super().training_step(*arguments, **options)


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

    def test_another_order_of_numbers_with_names(self) -> None:
        columns: dict[str, list[Any]] = {
            "premise": ["a"] * 3,
            "hypothesis": ["b"] * 3,
            "label": [0, 1, 2],
        }
        names = ("contradiction", "entailment", "neutral")
        table = data.Table(columns, names, "made up")
        assert data._of_task(table, tasks.TASKS["mnli"]).labels == [2, 0, 1]
        assert np.argmax(training.right_classes(names), axis=1).tolist() == [2, 0, 1]


class TestData:
    def test_parquet_files_name_their_labels(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        names = ["not_entailment", "entailment"]
        features = datasets.Features(
            {each: datasets.Value("string") for each in ("sentence1", "sentence2")}
            | {"label": datasets.ClassLabel(names=names)}
        )
        (tmp_path / "rte").mkdir()
        for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
            rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [1, 0]}
            made = datasets.Dataset.from_dict(rows, features)
            made.to_parquet(tmp_path / "rte" / f"{name}.parquet")
        train, validation = data.read_task(tasks.TASKS["rte"], tmp_path)
        assert train.labels == [0, 1, 0, 1]
        assert validation.texts == [("a", "c"), ("b", "d")]

    def test_tsv_files_have_no_quoting_and_hidden_labels_are_left_out(self, tmp_path: Path) -> None:
        (tmp_path / "cola").mkdir()
        text = 'sentence\tlabel\n"He said" so.\t1\nNot "so\t0\nhidden\t-1\n'
        for split in ("train", "validation"):
            (tmp_path / "cola" / f"{split}.tsv").write_text(text, encoding="utf-8")
        train, _ = data.read_task(tasks.TASKS["cola"], tmp_path)
        assert train.texts == [('"He said" so.',), ('Not "so',)]
        assert train.labels == [1, 0]


class TestErrors:
    def error(self, capsys: pytest.CaptureFixture[str], *options: str) -> str:
        assert glue.main([*options, "--cpu"]) == 2
        message = capsys.readouterr().err
        assert len(message.strip().splitlines()) == 1
        return message

    def test_no_hub(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        datasets = pytest.importorskip("datasets")

        def unreachable(*arguments: Any, **options: Any) -> None:
            raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub\nand so on")

        monkeypatch.setattr(datasets, "load_dataset", unreachable)
        message = self.error(capsys, "--tasks", "mrpc", "--out", str(tmp_path))
        assert "cannot load nyu-mll/glue/mrpc from the hub (Couldn't reach" in message
        assert "give --data FOLDER with a subfolder mrpc" in message
        assert "columns sentence1, sentence2, label" in message
        monkeypatch.setitem(sys.modules, "datasets", None)
        message = self.error(capsys, "--tasks", "mrpc", "--out", str(tmp_path))
        assert "python -m pip install datasets; or give --data FOLDER" in message
        assert not list(tmp_path.iterdir())

    def test_missing_folder_file_and_column(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ("--tasks", "rte", "--data", str(tmp_path), "--out", str(tmp_path / "out"))
        assert f"no such folder: {tmp_path / 'rte'}" in self.error(capsys, *given)
        write_csv(tmp_path / "rte" / "validation.csv", ("sentence1", "label"), [("a", "0")])
        assert "has no file train.(csv|tsv" in self.error(capsys, *given)
        write_csv(tmp_path / "rte" / "train.csv", ("sentence1", "label"), [("a", "0")])
        message = self.error(capsys, *given)
        assert "has no column 'sentence2'; its columns are 'sentence1', 'label'" in message

    @pytest.mark.parametrize("label", ["2", "maybe", "0.5"])
    def test_unknown_label(
        self, label: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for split in ("train", "validation"):
            header = ("sentence1", "sentence2", "label")
            write_csv(tmp_path / "rte" / f"{split}.csv", header, [("a", "b", label)])
        message = self.error(capsys, "--tasks", "rte", "--data", str(tmp_path))
        assert (
            f"has a label '{label}'; expected are 0 or entailment, 1 or not_entailment" in message
        )

    def test_labels_that_cannot_be_mapped(
        self, made_up: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        header = ("premise", "hypothesis", "label")
        given = (
            "--transfer",
            "--tasks",
            "mnli",
            "--data",
            str(made_up),
            "--evaluate-on",
            f"x={tmp_path}",
        )
        write_csv(tmp_path / "test.csv", header, [("a", "b", "true"), ("a", "b", "false")])
        message = self.error(capsys, *given)
        assert "--evaluate-on x: the labels false, true of " in message
        assert "cannot be mapped by name to entailment, neutral, contradiction" in message
        write_csv(tmp_path / "test.csv", header, [("a", "b", "1"), ("a", "b", "0")])
        assert "its labels are numbers, and nothing says what they mean" in self.error(
            capsys, *given
        )

    def test_more_training_examples_than_there_are(
        self, made_up: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = ("--tasks", "rte", "--data", str(made_up), "--train-examples", "25")
        assert f"--train-examples 25 is more than the {TRAIN} of rte" in self.error(capsys, *given)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--tasks", "squad"], "invalid choice: 'squad'"),
            (["--warmup-ratio", "1"], "not within [0, 1)"),
            (["--epochs", "cola=6", "--tasks", "rte"], "cola is not among --tasks rte"),
            (["--evaluate-on", "sick"], "no effect without --transfer"),
            (["--transfer", "--tasks", "rte"], "--transfer starts from mnli or snli, not from rte"),
            (["--transfer", "--evaluate-on", "hans"], "neither NAME=FOLDER nor one of mnli-m"),
            (["--transfer", "--data", "x"], "needs --evaluate-on"),
        ],
    )
    def test_options(
        self, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            glue.main(options)
        assert said in capsys.readouterr().err
