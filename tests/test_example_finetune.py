"""examples/finetune.py: its data, its errors, the short run and a checkpoint of transformers."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from childtune_kernels import ChildMask, FisherAccumulator, load_child

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SCRIPT = EXAMPLES / "finetune.py"
SECTIONS = {"database", "editors", "graphics", "mail", "video", "web"}

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
sys.path.insert(0, str(EXAMPLES))

import finetune  # noqa: E402
from finetuning import child_files, hashed_words, labelled_text, methods, report  # noqa: E402
from finetuning.children import CHILDREN  # noqa: E402
from finetuning.comparison import ContenderResult  # noqa: E402
from finetuning.small_encoder import SmallEncoder  # noqa: E402


def write_csv(path: Path, rows: Sequence[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("subject", "team"), *rows])
    return path


def toy_rows(count: int) -> list[tuple[str, str]]:
    kinds = (("the printer is out of paper", "office"), ("the server lost its network", "servers"))
    return [(f"{kinds[row % 2][0]} {row}", kinds[row % 2][1]) for row in range(count)]


def run_short(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--short", *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


class TestData:
    def test_the_file_is_the_one_that_its_readme_describes(self) -> None:
        digest = hashlib.sha256(labelled_text.DEBIAN_CSV.read_bytes()).hexdigest()
        assert digest in (labelled_text.DEBIAN_CSV.parent / "README.md").read_text("utf-8")
        packages = labelled_text.read_debian_packages()
        assert len(packages) == 10_295
        assert len({row.section for row in packages}) == 14

    def test_fine_tuning_never_sees_a_pretraining_section(self) -> None:
        data = labelled_text.fine_tuning_sections(labelled_text.read_debian_packages())
        assert set(data.label_names) == SECTIONS
        assert not SECTIONS & set(labelled_text.PRETRAINING_SECTIONS)
        assert len(data.texts) == len(data.labels) == 2045

    @pytest.mark.parametrize("rows", [8, 9, 100, 2045, 50_000])
    def test_splits_are_disjoint_and_cover_all_rows(self, rows: int) -> None:
        split = labelled_text.split_rows(rows)
        parts = [split.pool, split.validation, split.test]
        assert all(parts)
        assert sorted(row for part in parts for row in part) == list(range(rows))
        assert labelled_text.split_rows(rows) == split

    def test_training_sets_come_from_the_pool_and_depend_on_the_seed(self) -> None:
        split = labelled_text.split_rows(2045)
        first, second = split.training_set(200, seed=0), split.training_set(200, seed=1)
        assert set(first) | set(second) <= set(split.pool)
        assert len(set(first)) == 200
        assert first != second
        assert first == split.training_set(200, seed=0)

    def test_the_tokenizer_gives_the_same_buckets_in_every_process(self) -> None:
        pieces = hashed_words.encode_texts(["Mail server", ""])
        assert pieces.shape == (2, hashed_words.LONGEST_TEXT, hashed_words.LONGEST_WORD)
        # Kept from one run; a hash salted by the process would give others in the next.
        assert pieces[0, 0, :6].tolist() == [906, 3940, 8147, 3288, 6223, hashed_words.PADDING]
        assert pieces[1, 0, 0] == hashed_words.EMPTY_TEXT
        assert hashed_words.trimmed(pieces[:1]).shape == (1, 2, 7)


class TestReport:
    def result(self, title: str, method: str, accuracies: list[float]) -> ContenderResult:
        rates = {1e-3: 70.0, 2e-3: 71.0, 4e-3: 71.0}
        return ContenderResult(title, method, True, rates, accuracies)

    def test_a_difference_inside_the_noise_is_called_so(self) -> None:
        baseline = self.result("AdamW", "adamw", [70.0, 72.0, 71.0])
        noisy = self.result("CT_F", "ct_f", [71.0, 71.0, 72.0])
        better = self.result("CT_D", "ct_d", [75.0, 77.1, 76.0])
        first, second = report.verdicts([baseline, noisy, better])
        assert first.startswith("CT_F against AdamW: +0.3 ± ")
        assert "within noise" in first
        assert "better, beyond the noise" in second

    @pytest.mark.parametrize(
        ("lowest", "verdict"),
        [
            ([70.0, 72.0, 71.0], "+5.1 ± 0.1 points (paired over 3 seeds, 95 % interval): better"),
            ([80.0, 82.0, 81.0], "-4.9 ± 0.1 points (paired over 3 seeds, 95 % interval): worse"),
            ([75.0, 76.0, 77.0], "within noise"),
        ],
    )
    def test_the_fisher_child_is_held_against_its_controls(
        self, lowest: list[float], verdict: str
    ) -> None:
        child = self.result("CT_D", "ct_d", [75.05, 77.1, 76.05])
        controls = [
            self.result("random", "ct_d_random", [75.0, 77.0, 76.0]),
            self.result("lowest", "ct_d_lowest", lowest),
        ]
        said = report.verdicts([child, *controls])
        assert len(said) == 2
        assert said[0].startswith("Fisher child against lowest-Fisher child: ")
        assert verdict in said[0]
        assert said[1].startswith("Fisher child against random child: ")

    def test_of_equal_learning_rates_the_smallest_is_taken(self) -> None:
        result = self.result("AdamW", "adamw", [70.0])
        assert result.learning_rate == 2e-3
        assert not result.at_edge_of_grid

    def test_child_tuning_gets_the_square_root_law(self) -> None:
        assert methods.Method("adamw").learning_rates([1e-3, 3e-3]) == [1e-3, 3e-3]
        assert methods.Method("ct_f", 0.25).learning_rates([1e-3, 3e-3]) == [2e-3, 6e-3]

    @pytest.mark.parametrize("name", ["ct_d", "ct_d_random", "ct_d_lowest"])
    def test_controls_try_the_learning_rates_of_the_fisher_child(self, name: str) -> None:
        assert methods.Method(name, 0.25).learning_rates([1e-3, 3e-3]) == [2e-3, 6e-3]
        assert methods.Method(name, 0.25).title.startswith(
            "CT_D" if name == "ct_d" else "control: "
        )


class TestErrors:
    def error(self, capsys: pytest.CaptureFixture[str], *options: str) -> str:
        assert finetune.main(options) == 2
        return capsys.readouterr().err

    def test_missing_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "no such file" in self.error(capsys, "--csv", str(tmp_path / "absent.csv"))

    def test_unknown_column(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_csv(tmp_path / "tickets.csv", toy_rows(20))
        message = self.error(capsys, "--csv", str(path), "--text-column", "body")
        assert "no column 'body'; its columns are 'subject', 'team'" in message

    def test_a_single_label(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_csv(tmp_path / "tickets.csv", [("a", "x"), ("b", "x"), ("c", "")])
        columns = ("--text-column", "subject", "--label-column", "team")
        assert "at least 2 labels, found x" in self.error(capsys, "--csv", str(path), *columns)

    def test_too_few_rows(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_csv(tmp_path / "tickets.csv", toy_rows(40))
        columns = ("--text-column", "subject", "--label-column", "team")
        message = self.error(capsys, "--csv", str(path), *columns)
        assert "more than the 10 rows left" in message

    def test_transformers_is_not_installed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        assert "python -m pip install transformers" in self.error(capsys, "--model", "some/model")

    def test_a_folder_without_a_model(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("transformers")
        assert "cannot load the tokenizer" in self.error(capsys, "--model", str(tmp_path))

    @pytest.mark.parametrize(
        "options", [("--reserve-p", "0"), ("--seeds", "0"), ("--device", "abacus")]
    )
    def test_options_out_of_range(self, options: tuple[str, ...]) -> None:
        with pytest.raises(SystemExit, match="2"):
            finetune.main(options)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the short run printed, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("finetune")
    done = run_short("--out", str(folder))
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


class TestRuns:
    def test_the_short_run_prints_the_table_and_draws_the_plot(
        self, short_run: tuple[str, Path]
    ) -> None:
        printed, folder = short_run
        titles = [
            "AdamW, not pretrained",
            "AdamW",
            "CT_F (p=0.3)",
            "CT_D (p=0.3)",
            "control: random child (p=0.3)",
            "control: lowest-Fisher child (p=0.3)",
        ]
        for title in titles:
            assert f"\n{title}  " in printed
        assert "against AdamW" in printed
        assert "Fisher child against lowest-Fisher child" in printed
        assert (folder / "finetune.png").read_bytes().startswith(b"\x89PNG")
        saved = json.loads((folder / "finetune.json").read_text("utf-8"))
        assert [row["title"] for row in saved["results"]] == titles
        for row in saved["results"]:
            assert len(row["accuracies"]) == saved["plan"]["seeds"] == 3
            # Six labels, the commonest a third of all rows: what learns nothing stays below 40 %.
            assert all(40 < accuracy < 100 for accuracy in row["accuracies"])
            assert 0 < row["step_milliseconds"] < math.inf
            assert len(row["validation"]) == len(saved["plan"]["learning_rates"])

    def test_the_state_of_a_child_is_compact(self, short_run: tuple[str, Path]) -> None:
        saved = json.loads((short_run[1] / "finetune.json").read_text("utf-8"))
        size = {row["method"]: row["state_bytes"] for row in saved["results"]}
        mask = ChildMask.load(short_run[1] / child_files.MASK)
        saving = 8 * (mask.numel() - mask.count())  # two fp32 moments an element outside
        overhead = mask.numel() / 4  # words, ranks: 0.25 bytes an element
        for name in CHILDREN:
            assert size["adamw"] - saving < size[name] < size["adamw"] - saving + overhead

    def test_the_short_run_leaves_mask_fisher_and_pictures(
        self, short_run: tuple[str, Path]
    ) -> None:
        printed, folder = short_run
        fisher = FisherAccumulator.load(folder / child_files.FISHER)
        mask = ChildMask.load(folder / child_files.MASK)
        assert (fisher.kind, fisher.examples) == ("per example", 80)
        assert all(name.startswith("layers.") for name in mask.words)
        assert {"pieces.weight", "head.weight"} <= mask.dense_names
        assert mask == fisher.child_mask(reserve_p=0.3)
        for name in (child_files.DENSITY, child_files.OVERLAP, child_files.SPECTRUM):
            assert (folder / name).read_bytes().startswith(b"\x89PNG")
            assert name in printed
        for child in (
            "Fisher child, seed 1",
            "random child, seed 2",
            "lowest-Fisher child, seed 2",
        ):
            assert child in printed

    def test_the_short_run_saves_and_proves_the_tuned_child(
        self, short_run: tuple[str, Path]
    ) -> None:
        printed, folder = short_run
        path = folder / child_files.CHECKPOINT
        assert load_child(path).mask == ChildMask.load(folder / child_files.MASK)
        assert "it gave the tuned model in every bit" in printed
        saved = json.loads((folder / "finetune.json").read_text("utf-8"))
        (tuned,) = (row for row in saved["results"] if row["method"] == "ct_d")
        assert f"{tuned['accuracies'][-1]:.1f} % on the test data" in printed
        weights = sum(p.numel() * 4 for p in SmallEncoder(len(SECTIONS)).parameters())
        assert f"{path.stat().st_size:,} bytes; the model's weights are {weights:,}" in printed

    def test_a_checkpoint_of_transformers_and_a_csv_file(self, tmp_path: Path) -> None:
        checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
        path = write_csv(tmp_path / "tickets.csv", toy_rows(120))
        options = ["--short", "--model", str(checkpoint), "--csv", str(path)]
        options += ["--text-column", "subject", "--label-column", "team", "--seeds", "2"]
        options += ["--train-examples", "16", "--epochs", "1", "--out", str(tmp_path / "out")]
        assert finetune.main(options) == 0
        saved = json.loads((tmp_path / "out" / "finetune.json").read_text("utf-8"))
        assert saved["model"] == "checkpoint"
        assert [row["title"] for row in saved["results"]] == [
            "AdamW",
            "CT_F (p=0.3)",
            "CT_D (p=0.3)",
            "control: random child (p=0.3)",
            "control: lowest-Fisher child (p=0.3)",
        ]
        assert load_child(tmp_path / "out" / child_files.CHECKPOINT).mask.count() > 0


def tiny_checkpoint(folder: Path) -> Path:
    """A BERT of two narrow layers with random weights, saved as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir()
    words = sorted({word for text, _ in toy_rows(2) for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    configuration = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    transformers.BertForSequenceClassification(configuration).save_pretrained(folder)
    transformers.BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder
