"""The tasks of GLUE and the sets of the transfer experiment: columns, labels, metric, place on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HubSet:
    """Where ``datasets.load_dataset`` finds a data set."""

    path: str
    configuration: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.path, self.configuration)))


@dataclass(frozen=True)
class Task:
    """What a model is fine-tuned on.

    Args:
        name: on the command line, and the name of its subfolder of ``--data``.
        columns: of the one sentence, or of the two.
        labels: in the order of the hub's numbers; empty for a task of regression.
        metric: a key of ``metrics.METRICS``, the one that the paper reports.
        validation: the split that is evaluated.
        hub: None: GLUE's configuration of the same name.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metric: str = "accuracy"
    validation: str = "validation"
    hub: HubSet | None = None

    @property
    def hub_set(self) -> HubSet:
        """Where the hub has it."""
        return self.hub or HubSet("nyu-mll/glue", self.name)

    @property
    def splits(self) -> tuple[str, str]:
        """The splits that are read: train and validation."""
        return "train", self.validation


_PAIR = ("sentence1", "sentence2")
_PREMISE = ("premise", "hypothesis")
_ENTAILED = ("entailment", "not_entailment")
INFERENCE = ("entailment", "neutral", "contradiction")
SNLI = HubSet("stanfordnlp/snli")

_ALL = (
    Task("rte", _PAIR, _ENTAILED),
    Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), "F1"),
    Task("cola", ("sentence",), ("unacceptable", "acceptable"), "Matthews correlation"),
    Task("stsb", _PAIR, (), "Spearman correlation"),
    Task("sst2", ("sentence",), ("negative", "positive")),
    Task("qnli", ("question", "sentence"), _ENTAILED),
    Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate")),
    Task("mnli", _PREMISE, INFERENCE, validation="validation_matched"),
    Task("wnli", _PAIR, ("not_entailment", "entailment")),
    Task("snli", _PREMISE, INFERENCE, hub=SNLI),
)
TASKS = {task.name: task for task in _ALL}
PAPER_TASKS = ("rte", "mrpc", "cola", "stsb")
TRANSFER_TASKS = ("mnli", "snli")


@dataclass(frozen=True)
class EvaluationSet:
    """What a model tuned on ``mnli`` or ``snli`` is evaluated on as it is.

    Args:
        name: in the table.
        columns: of premise and hypothesis; None: the first of ``PAIRS`` that a folder's file has.
        labels: in the order of the numbers that stand for them; empty: the file must name them.
        splits: the first one that is there.
        hub: its place on the hub, if known.
        folder: its subfolder of ``--data``, or the folder itself.
    """

    name: str
    columns: tuple[str, str] | None
    labels: tuple[str, ...]
    splits: tuple[str, ...]
    hub: HubSet | None
    folder: str


PAIRS = (_PREMISE, _PAIR, ("sentence_A", "sentence_B"), ("question1", "question2"))

_MNLI, _QQP = TASKS["mnli"], TASKS["qqp"]
# SICK's own branch is a script, which datasets 4 and later do not run; the converted one is the hub's.
_SICK = HubSet("RobZamp/sick", revision="refs/convert/parquet")
_KNOWN = (
    EvaluationSet("mnli-m", _PREMISE, INFERENCE, ("validation_matched",), _MNLI.hub_set, "mnli"),
    EvaluationSet(
        "mnli-mm", _PREMISE, INFERENCE, ("validation_mismatched",), _MNLI.hub_set, "mnli"
    ),
    EvaluationSet("snli", _PREMISE, INFERENCE, ("test",), SNLI, "snli"),
    EvaluationSet("sick", ("sentence_A", "sentence_B"), INFERENCE, ("test",), _SICK, "sick"),
    EvaluationSet(
        "scitail", _PREMISE, (), ("test",), HubSet("allenai/scitail", "tsv_format"), "scitail"
    ),
    EvaluationSet(
        "qqp", ("question1", "question2"), _QQP.labels, ("validation",), _QQP.hub_set, "qqp"
    ),
)
EVALUATION_SETS = {each.name: each for each in _KNOWN}

# Labels of other sets, in those of natural language inference.
_MEANINGS = {
    **{label: (label,) for label in INFERENCE},
    "entails": ("entailment",),
    "contradicts": ("contradiction",),
    "not_entailment": ("neutral", "contradiction"),
    "non_entailment": ("neutral", "contradiction"),
    "duplicate": ("entailment",),
    "not_duplicate": ("neutral", "contradiction"),
}


def plain(label: object) -> str:
    """A label's name as it is compared: small letters, one kind of joint."""
    return str(label).strip().casefold().replace("-", "_").replace(" ", "_")


def accepted_classes(names: Sequence[str]) -> list[tuple[str, ...]] | None:
    """For each label of an evaluation set: the classes of ``INFERENCE`` that are right for it.

    In a set without contradictions one that is predicted counts as neutral.

    Returns:
        None where a name is unknown.
    """
    known = [_MEANINGS.get(plain(name)) for name in names]
    classes = [each for each in known if each is not None]
    if len(classes) < len(known):
        return None
    if not any("contradiction" in each for each in classes):
        return [(*each, "contradiction") if each == ("neutral",) else each for each in classes]
    return classes
