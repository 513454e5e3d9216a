"""What ChildTuningArguments and ChildTuningTrainer take and refuse; adapters of PEFT; many ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from childtune_kernels import ChildMask, FusedChildAdamW, layer_patterns

from .accelerate_launch import as_launched
from .cases import assert_same_bits
from .ranks import Ranks

pytest.importorskip("transformers")

import transformers

from childtune_kernels.integrations import transformers as integration
from childtune_kernels.integrations.transformers import (
    ChildTuningArguments,
    ChildTuningTrainer,
    fisher_of_train_set,
)

from .tiny_transformers import (
    LAYERS,
    arguments_of,
    data_of,
    model_of,
    trainer_of,
    weights_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"child_mode": "ChildTuning-F"}, "child_mode='ChildTuning-F' is unknown; use 'F'"),
        ({"child_mode": "F"}, "reserve_p is missing, which mode F needs; the paper tries 0.2"),
        ({"child_mode": "D"}, "reserve_p is missing, which mode D needs"),
        ({"child_mode": "none", "reserve_p": 0.3}, "reserve_p=0.3 has no effect in mode none"),
        ({"child_mode": "F", "reserve_p": 0.0}, "reserve_p=0.0"),
        ({"child_mode": "D", "reserve_p": 1.5}, r"reserve_p=1.5 .*must lie in \(0, 1\]"),
        ({"child_mode": "D", "reserve_p": 0.1, "child_mask": "m"}, "has no effect beside child_mask"),
        ({"child_mode": "D", "child_mask": "m", "fisher_examples": 3}, "fisher_examples=3 has no effect"),
        ({"child_mode": "F", "reserve_p": 0.1, "child_mask": "m"}, "no effect beside child_mask|of mode D"),
        ({"child_mode": "F", "reserve_p": 0.1, "fisher_examples": 3}, "fisher_examples=3 is of mode D"),
        ({"child_mode": "D", "reserve_p": 0.1, "fisher_examples": 0}, "fisher_examples=0 must be a w"),
        ({"child_mode": "D", "reserve_p": 0.1, "fisher_batch_size": 0}, "fisher_batch_size=0 must be"),
        ({"child_mode": "D", "reserve_p": 0.1, "child_granularity": 48}, "child_granularity=48 must be 1"),
        ({"child_mode": "D", "reserve_p": 0.1, "child_granularity": "32"}, "child_granularity='32' must"),
        ({"child_mode": "D", "reserve_p": 0.1, "fisher_examples": True}, "fisher_examples=True must be a"),
        ({"child_mode": "D", "reserve_p": 0.1, "scale_learning_rate": True}, "scale_learning_rate=True is"),
        ({"child_mode": "D", "reserve_p": 0.1, "fisher_examples": 2.5}, "fisher_examples=2.5 must be"),
        ({"child_mode": "none", "child_seed": 3}, "child_seed=3 has no effect in mode none"),
        ({"child_mode": "none", "optimizer_options": "{"}, "optimizer_options='{' is no JSON"),
        ({"child_mode": "none", "optimizer_options": "[1]"}, "must be a JSON object"),
        ({"child_mode": "none", "optimizer_options": {"lr": 1}}, "lr comes from learning_rate"),
        ({"child_mode": "none", "optimizer_options": {"convntion": 1}}, "no option 'convntion'; it has al"),
    ],
)  # fmt: skip
def test_options_that_would_mislead_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChildTuningArguments(**options)


def test_the_command_line_gives_the_same() -> None:
    parser = transformers.HfArgumentParser(ChildTuningArguments)  # type: ignore[arg-type]
    text = (
        "--child_mode D --reserve_p 0.1 --child_include *attention* *mlp* --child_granularity 256 "
        "--fisher_examples 100 --fisher_batch_size 2 --save_fisher --child_checkpoint False --child_seed 3"
    )
    command = text.split()
    options = '{"convention": "original", "capturable": false}'
    (found,) = parser.parse_args_into_dataclasses([*command, "--optimizer_options", options])
    assert found == ChildTuningArguments(
        "D", 0.1, child_include=["*attention*", "*mlp*"], child_granularity=256, fisher_examples=100,
        fisher_batch_size=2, save_fisher=True, child_checkpoint=False, child_seed=3,
        optimizer_options=options,
    )  # fmt: skip
    assert found.options_of_optimizer() == {"convention": "original", "capturable": False}
    command = ["--child_mode", "F", "--reserve_p", "0.3", "--scale_learning_rate", "True"]
    (found,) = parser.parse_args_into_dataclasses(command)
    assert found == ChildTuningArguments("F", 0.3, scale_learning_rate=True)
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--reserve_p", "0.3"])


def test_the_optimizer_has_the_options(tmp_path: Path) -> None:
    tuning = ChildTuningArguments(
        "F",
        0.25,
        scale_learning_rate=True,
        child_seed=0,
        optimizer_options={"convention": "original"},
    )
    adam: dict[str, Any] = {"adam_beta1": 0.8, "adam_beta2": 0.97, "adam_epsilon": 1e-5}
    trainer = trainer_of(tmp_path, tuning, learning_rate=1e-4, **adam)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, FusedChildAdamW)
    decayed, plain = optimizer.param_groups
    expected = {
        "lr": 2e-4, "betas": (0.8, 0.97), "eps": 1e-5, "reserve_p": 0.25, "seed": 0,
        "convention": "original", "max_grad_norm": 0.5,
    }  # fmt: skip
    for group in (decayed, plain):
        assert {name: group[name] for name in expected} == expected
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert "bert.encoder.layer.0.output.dense.weight" in decayed["param_names"]
    assert {"classifier.bias", "bert.encoder.layer.0.output.LayerNorm.weight"} <= {
        *plain["param_names"]
    }
    names = [*decayed["param_names"], *plain["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model_of("Bert").named_parameters())
    assert trainer.create_optimizer() is optimizer


@pytest.mark.parametrize(
    ("options", "trainer_options", "message"),
    [
        ({"optim": "adafactor"}, {}, "optim='adafactor' is not what trains here"),
        ({"optim": "adamw_torch_8bit"}, {}, "optim='adamw_torch_8bit' is not what trains here"),
        ({"optim_args": "a=1"}, {}, "optim_args='a=1' is not read; use optimizer_options"),
        ({}, {"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, "optimizers or"),
        ({}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1})}, "optimizers or"),
    ],
)  # fmt: skip
def test_settings_that_would_mislead_are_refused(
    tmp_path: Path, options: dict[str, Any], trainer_options: dict[str, Any], message: str
) -> None:
    tuning = ChildTuningArguments("F", 0.3, scale_learning_rate=False)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, tuning, trainer_options=trainer_options, **options)


@pytest.mark.parametrize(
    ("engine", "message"),
    [("is_deepspeed_enabled", "deepspeed is not supported"), ("is_fsdp_enabled", "under FSDP")],
)
def test_engines_without_whole_weights_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, message: str
) -> None:
    build = transformers.Trainer.create_accelerator_and_postprocess

    def built(self: Any) -> None:
        build(self)
        setattr(self, engine, True)

    monkeypatch.setattr(transformers.Trainer, "create_accelerator_and_postprocess", built)
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, ChildTuningArguments("D", 0.3))


def test_options_are_checked_before_anything_is_measured(tmp_path: Path) -> None:
    tuning = ChildTuningArguments("D", 0.3, optimizer_options={"convention": "torhc"})
    with pytest.raises(ValueError, match="convention='torhc'"):
        trainer_of(tmp_path, tuning)
    with pytest.raises(TypeError, match="child_tuning is a dict; give ChildTuningArguments"):
        trainer_of(tmp_path, {"child_mode": "F"})  # type: ignore[arg-type]
    moments = ChildTuningArguments("none", optimizer_options='{"state_dtype": "bfloat16"}')
    optimizer = trainer_of(tmp_path, moments).create_optimizer()
    assert {group["state_dtype"] for group in optimizer.param_groups} == {torch.bfloat16}


def test_a_loss_may_divide_by_the_items_of_a_batch(tmp_path: Path) -> None:
    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        total = nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
        return total / num_items_in_batch

    options = {"compute_loss_func": loss_of}
    tuning = ChildTuningArguments("D", 0.3)
    trainer = trainer_of(tmp_path, tuning, trainer_options=options)
    plain = trainer_of(tmp_path, tuning)
    found, expected = fisher_of_train_set(trainer), fisher_of_train_set(plain)
    for name, value in expected.values().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-10)


def test_an_exclusion_stays_within_the_layers(tmp_path: Path) -> None:
    tuning = ChildTuningArguments("D", 0.3, child_exclude=["*LayerNorm*"])
    trainer = trainer_of(tmp_path, tuning)
    trainer.create_optimizer()
    assert trainer.child_mask is not None
    assert all(".layer." in name and "LayerNorm" not in name for name in trainer.child_mask.words)


def test_a_model_without_layers_asks_for_patterns(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(60, 2)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.table(input_ids).mean(1)
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    with pytest.raises(ValueError, match=r"Plain has no nn\.ModuleList.*\['\*'\] for all weights"):
        trainer_of(tmp_path, ChildTuningArguments("D", 0.5), model=Plain()).train()
    everything = ChildTuningArguments("D", 0.5, child_include=["*"])
    trainer = trainer_of(tmp_path, everything, model=Plain())
    trainer.train()
    assert trainer.child_mask is not None
    assert trainer.child_mask.count() == 60


def test_a_mask_that_was_given_is_the_child(tmp_path: Path) -> None:
    model = model_of("GPT2")
    patterns = layer_patterns(model)
    assert patterns == [LAYERS["GPT2"]]
    bits = {n: torch.rand(p.shape) < 0.2 for n, p in model.named_parameters() if ".h." in n}
    dense = [name for name, _ in model.named_parameters() if ".h." not in name]
    mask = ChildMask.from_dense(bits, dense=dense)
    trainer = trainer_of(tmp_path, ChildTuningArguments("D", child_mask=mask), "GPT2", model=model)
    before = weights_of(model)
    trainer.train()
    for name, bit in bits.items():
        changed = weights_of(model)[name] != before[name]
        assert not (changed & ~bit).any()
        assert changed.any() == bit.any()
    assert trainer.child_mask == mask == ChildMask.load(tmp_path / integration.MASK_NAME)


def test_a_run_that_changed_the_child_says_why_there_is_no_checkpoint(tmp_path: Path) -> None:
    class Changing(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            others["optimizer"].optimizer.set_child_mask(None)

    trainer = trainer_of(
        tmp_path, ChildTuningArguments("D", 0.3), trainer_options={"callbacks": [Changing()]}
    )
    with pytest.warns(UserWarning, match=r"tuned_child\.safetensors is not written: optimizer: "):
        trainer.train()
    assert trainer.state.global_step == 4


def test_a_disk_that_is_full_leaves_the_trained_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(integration, "save_child", no_space)
    trainer = trainer_of(tmp_path, ChildTuningArguments("D", 0.3))
    with pytest.warns(UserWarning, match=r"tuned_child\.safetensors is not written: .*No space"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_a_trial_of_a_search_leaves_no_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last trial is not the best one, and its child would be taken for that."""
    trainer = trainer_of(tmp_path, ChildTuningArguments("D", 0.3))
    trainer.train()
    (tmp_path / integration.CHILD_NAME).unlink()
    monkeypatch.setattr(transformers.Trainer, "train", lambda *_, **__: None)
    trainer.train(trial={"learning_rate": 1e-3})
    trainer.train(None, {"learning_rate": 1e-3})
    assert not (tmp_path / integration.CHILD_NAME).exists()
    trainer.train()
    assert (tmp_path / integration.CHILD_NAME).exists()


class TestAdapters:
    """LoRA of PEFT: frozen weights are nobody's affair, and a fresh adapter has half of its gradients."""

    @staticmethod
    def adapted(architecture: str) -> Any:
        peft = pytest.importorskip("peft")
        kind = "SEQ_CLS" if architecture == "Bert" else "CAUSAL_LM"
        targets = ["query", "value"] if architecture == "Bert" else ["q_proj", "v_proj"]
        configuration = peft.LoraConfig(task_type=kind, r=4, target_modules=targets)
        with torch.random.fork_rng([]):
            torch.manual_seed(1)
            return peft.get_peft_model(model_of(architecture), configuration)

    @pytest.mark.parametrize("architecture", ["Bert", "Llama"])
    @pytest.mark.parametrize("mode", ["F", "D"])
    def test_adapters_train(self, tmp_path: Path, architecture: str, mode: Any) -> None:
        model = self.adapted(architecture)
        assert layer_patterns(model) == [f"base_model.model.{LAYERS[architecture]}"]
        before = weights_of(model)
        tuning = ChildTuningArguments(mode, 0.3, scale_learning_rate=None if mode == "D" else False)
        trainer = trainer_of(tmp_path, tuning, architecture, model=model, learning_rate=0.0123)
        trainer.train()
        trained = {name for name, each in model.named_parameters() if each.requires_grad}
        assert any("lora_A" in name for name in trained)
        after = weights_of(model)
        for name, value in before.items():
            assert name in trained or torch.equal(after[name], value)
        assert any(not torch.equal(after[name], before[name]) for name in trained)
        if mode == "D":
            mask = trainer.child_mask
            assert mask is not None
            counts = {part: sum(mask.count(n) for n in mask.words if part in n) for part in "AB"}
            # B starts at zero, so that A has no gradient, and the child is of B's weights.
            assert counts["A"] == 0 < counts["B"]
            assert (tmp_path / integration.CHILD_NAME).exists()

    def test_the_best_adapter_is_what_is_saved(self, tmp_path: Path) -> None:
        model = self.adapted("Bert")
        losses = iter([0.5, 0.1, 0.9, 0.7])
        trainer = trainer_of(
            tmp_path, ChildTuningArguments("D", 0.5), model=model, load_best_model_at_end=True,
            eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
            metric_for_best_model="made_up", greater_is_better=False,
            trainer_options={
                "eval_dataset": data_of("Bert")[:2],
                "compute_metrics": lambda _: {"made_up": next(losses)},
            },
        )  # fmt: skip
        trainer.train()
        from childtune_kernels import apply_child

        fresh = self.adapted("Bert")
        adapters = weights_of(fresh)
        assert any(not torch.equal(v, adapters[n]) for n, v in weights_of(model).items())
        apply_child(fresh, tmp_path / integration.CHILD_NAME)
        assert_same_bits(weights_of(fresh), weights_of(model))
        assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-2")


class Stream(torch.utils.data.IterableDataset[Any]):
    """Examples without end."""

    def __iter__(self) -> Any:
        while True:
            yield from data_of("Bert")


def trained_on_ranks(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor], ChildMask]:
    """A Trainer under DistributedDataParallel: its Fisher information, weights and child."""
    with as_launched():
        own = f"{folder}/{torch.distributed.get_rank()}"
        arguments = arguments_of(own, per_device_train_batch_size=2)
        assert arguments.world_size == 2
        trainer = ChildTuningTrainer(
            model_of("Bert"),
            arguments,
            train_dataset=data_of("Bert", 7),
            child_tuning=ChildTuningArguments("D", 0.1, fisher_examples=5),
        )
        fisher = fisher_of_train_set(trainer, max_examples=5)
        trainer.train()
        trainer.train_dataset = Stream()
        assert fisher_of_train_set(trainer, max_examples=7).examples == 7  # of both ranks together
        assert trainer.child_mask is not None
        return fisher.values(), weights_of(trainer.model), trainer.child_mask


def test_ranks_share_the_examples_and_the_child(ranks: Ranks, tmp_path: Path) -> None:
    """No example is measured twice, as where loaders make ranks even; the child is the same everywhere."""
    trainer = trainer_of(
        tmp_path / "one", ChildTuningArguments("D", 0.1), train_set=data_of("Bert", 7)
    )
    alone = fisher_of_train_set(trainer, max_examples=5)
    (fisher, weights, mask), other = ranks.run(2, trained_on_ranks, str(tmp_path / "two"))
    assert_same_bits(fisher, other[0])
    assert_same_bits(weights, other[1])
    first, second = tmp_path / "two" / "0", tmp_path / "two" / "1"
    assert mask == other[2] == ChildMask.load(first / integration.MASK_NAME)
    for name, value in alone.values().items():
        torch.testing.assert_close(fisher[name], value, rtol=1e-4, atol=1e-10)
    assert (first / integration.CHILD_NAME).exists()
    assert not second.exists() or not list(second.glob("*.safetensors"))
