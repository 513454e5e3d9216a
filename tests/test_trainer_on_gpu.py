"""What only a GPU shows of ChildTuningTrainer: fp16 with its loss scale, its random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from childtune_kernels import ChildMask, FusedChildAdamW, apply_child

from .cases import assert_same_bits

pytest.importorskip("transformers")

from childtune_kernels.integrations import transformers as integration
from childtune_kernels.integrations.transformers import ChildTuningArguments, fisher_of_train_set

from .tiny_transformers import (
    BATCH,
    EXAMPLES,
    LAYERS,
    batches_of,
    data_of,
    decays,
    model_of,
    trainer_of,
    weights_of,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="there is no GPU, and fp16's loss scale needs one"
    ),
]

F = ChildTuningArguments("F", 0.3, scale_learning_rate=False)
D = ChildTuningArguments("D", 0.1)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, None: torch.float32}


def trainer_on_gpu(
    folder: Path, tuning: ChildTuningArguments, precision: str | None, **options: Any
) -> Any:
    if precision is not None:
        options[precision] = True
    return trainer_of(folder, tuning, use_cpu=False, **options)


def train_by_loop(trainer: Any, precision: str | None, steps: int = 4, **options: Any) -> Any:
    """The tuned model of a loop as torch's documentation of mixed precision has it; clips inside the step."""
    device = torch.device("cuda")
    model = model_of("Bert").to(device).train()
    named = list(model.named_parameters())
    optimizer = FusedChildAdamW(
        [
            {"params": [(n, p) for n, p in named if decays(n)], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in named if not decays(n)], "weight_decay": 0.0},
        ],
        lr=0.0123, seed=42, max_grad_norm=0.5, **options,
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    batches = batches_of(data_of("Bert"), BATCH)
    for _ in range(steps):
        (batch,), items = trainer.get_batch_samples(batches, 1, device)
        batch = {name: each.to(device) for name, each in batch.items()}
        with torch.autocast("cuda", DTYPES[precision], enabled=precision is not None):
            loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("precision", DTYPES)
class TestTheTrainerIsThePlainLoop:
    def test_of_mode_f(self, precision: str | None, tmp_path: Path) -> None:
        trainer = trainer_on_gpu(tmp_path, F, precision)
        trainer.train()
        model = train_by_loop(trainer, precision, reserve_p=0.3)
        assert_same_bits(weights_of(trainer.model), weights_of(model))
        self._assert_moved(trainer)

    def test_of_mode_d(self, precision: str | None, tmp_path: Path) -> None:
        trainer = trainer_on_gpu(tmp_path, D, precision)
        trainer.train()
        mask = ChildMask.load(tmp_path / integration.MASK_NAME)
        assert mask == trainer.child_mask
        model = train_by_loop(trainer, precision, child_mask=mask)
        assert_same_bits(weights_of(trainer.model), weights_of(model))
        self._assert_moved(trainer)
        base = model_of("Bert")
        apply_child(base, tmp_path / integration.CHILD_NAME)
        assert_same_bits(
            weights_of(base), {n: each.cpu() for n, each in weights_of(trainer.model).items()}
        )

    @staticmethod
    def _assert_moved(trainer: Any) -> None:
        """Of four steps a loss scale that is found too large skips one or two, not all."""
        before = weights_of(model_of("Bert"))
        moved = [
            not torch.equal(each.cpu(), before[n]) for n, each in weights_of(trainer.model).items()
        ]
        assert sum(moved) > len(moved) / 2

    def test_and_a_resumed_run_is_the_whole_run(
        self, precision: str | None, tmp_path: Path
    ) -> None:
        whole = trainer_on_gpu(tmp_path / "whole", D, precision, dropout=True, max_steps=4)
        whole.train()
        options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "dropout": True}
        part = trainer_on_gpu(tmp_path / "part", D, precision, max_steps=4, **options)
        part.train()
        resumed = trainer_on_gpu(tmp_path / "part", D, precision, max_steps=4, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
        assert_same_bits(weights_of(part.model), weights_of(whole.model))
        assert_same_bits(weights_of(resumed.model), weights_of(whole.model))


def test_fp16_measures_in_fp32_and_bf16_under_autocast(tmp_path: Path) -> None:
    exact = fisher_of_train_set(trainer_on_gpu(tmp_path, D, None))
    for precision, is_exact in (("fp16", True), ("bf16", False)):
        found = fisher_of_train_set(trainer_on_gpu(tmp_path, D, precision))
        same = [torch.equal(found[name], exact[name]) for name in exact.names]
        assert all(same) if is_exact else not any(same)


def test_measuring_leaves_the_random_numbers_of_the_gpu(tmp_path: Path) -> None:
    drawn: list[float] = []

    class Noisy(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            drawn.append(torch.rand((), device="cuda").item())
            return super().__getitem__(index)

    trainer = trainer_on_gpu(tmp_path, D, None, train_set=Noisy(data_of("Bert")))
    state = torch.cuda.get_rng_state()
    fisher = fisher_of_train_set(trainer, [LAYERS["Bert"]])
    assert len(set(drawn)) == fisher.examples == EXAMPLES
    assert torch.equal(torch.cuda.get_rng_state(), state)
