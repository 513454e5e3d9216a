"""examples/glue.py before it trains: metrics, data from folders and the hub, errors."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.insert(0, str(EXAMPLES))

import glue  # noqa: E402
from glue_tasks import data, metrics, tasks  # noqa: E402

from .made_up_glue import TRAIN, write_csv, write_data  # noqa: E402


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A folder with data of RTE, STS-B and MNLI."""
    write_data(tmp_path / "made_up")
    return tmp_path / "made_up"


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

    def test_another_order_of_numbers_with_names(self) -> None:
        columns: dict[str, list[Any]] = {
            "premise": ["a"] * 3,
            "hypothesis": ["b"] * 3,
            "label": [0, 1, 2],
        }
        names = ("contradiction", "entailment", "neutral")
        table = data.Table(columns, names, "made up")
        assert data._of_task(table, tasks.TASKS["mnli"]).labels == [2, 0, 1]
        found = tasks.accepted_classes(names)
        assert found == [("contradiction",), ("entailment",), ("neutral",)]


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
