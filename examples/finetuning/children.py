"""Child networks of the encoder: by Fisher information, and the controls that the paper compares with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from childtune_kernels import ChildMask, FisherAccumulator, random_child, select_child
from finetuning.labelled_text import InputError

# What a method's fixed child is called in titles and pictures.
CHILDREN = {
    "ct_d": "Fisher child",
    "ct_d_random": "random child",
    "ct_d_lowest": "lowest-Fisher child",
}

LossOfRows = Callable[[nn.Module, Sequence[int]], Tensor]


class ChildNetworks:
    """The children of one model on one training set, found when they are first asked for.

    The Fisher child and the lowest-Fisher child come from the same Fisher run.

    Args:
        model: a fresh model; it is put into eval mode, its weights stay as they are.
        loss_of_rows: the mean loss of a model on some rows.
        rows: training rows.
        seed: of the random child.
        reserve_p: share of the encoder's weights in every child.
        backend: of op fisher_accumulate, None for its own choice.

    Raises:
        InputError: see ``encoder_patterns``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_of_rows: LossOfRows,
        rows: Sequence[int],
        seed: int,
        reserve_p: float,
        backend: str | None = None,
    ) -> None:
        self._model = model.eval()
        self._loss_of_rows = loss_of_rows
        self._rows = rows
        self._seed = seed
        self._reserve_p = reserve_p
        # What is outside the encoder's layers trains densely.
        self._fisher = FisherAccumulator(model, include=encoder_patterns(model), backend=backend)
        self._found: dict[str, ChildMask] = {}

    def child(self, method: str) -> ChildMask | None:
        """The child that a method trains, None where it trains no fixed one."""
        if method not in CHILDREN:
            return None
        if method not in self._found:
            self._found[method] = self._find(method)
        return self._found[method]

    def fisher(self) -> FisherAccumulator:
        """Fisher information of the training rows: one example a backward and no dropout, as in the paper."""
        if not self._fisher.records:
            with self._fisher.recording():
                for row in self._rows:
                    self._loss_of_rows(self._model, [row]).backward()
        return self._fisher

    def _find(self, method: str) -> ChildMask:
        dense = self._fisher.dense_names
        if method == "ct_d":
            return self.fisher().child_mask(self._reserve_p)
        if method == "ct_d_lowest":
            values = self.fisher().values()
            return select_child(values, reserve_p=self._reserve_p, largest=False, dense=dense)
        return random_child(self._fisher.sums, self._reserve_p, self._seed, dense=dense)


def encoder_patterns(model: nn.Module) -> list[str]:
    """Patterns on the names of the parameters of the encoder's layers: those inside an ``nn.ModuleList``.

    Embeddings, norms around the layers and the classifier's head are not among them.

    Raises:
        InputError: the model has no ``nn.ModuleList`` with parameters.
    """
    patterns = [
        f"{name}.*"
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())
    ]
    if not patterns:
        raise InputError(
            f"{type(model).__name__} keeps no layers in an nn.ModuleList, so ct_d and its controls "
            "cannot tell its encoder from its embeddings; use --methods adamw ct_f"
        )
    return patterns
