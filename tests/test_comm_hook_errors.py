"""What the communication hook refuses: masks that ranks do not share, steps by other masks, other models."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from childtune_kernels import ChildMask, FusedChildAdamW, register_child_comm_hook

from .ranks import Ranks
from .test_comm_hook import OPTIONS, Model, Values, batch, child_of, optimizer_of


def message_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def disagreeing(how: str) -> str:
    """The error where rank 1 differs: at the registration, or in a backward after it."""
    second = torch.distributed.get_rank() == 1
    model = DistributedDataParallel(Values())
    options: dict[str, Any] = {"lr": 1e-2, "seed": 7, "reserve_p": 0.3}
    if how == "seed":
        options["seed"] += second
    if how.endswith("mask"):
        halves = torch.arange(733) % 2 == int(second and how == "mask")
        mask = ChildMask.from_dense({"weight": halves[:700], "bias": halves[700:]})
        options |= {"reserve_p": 1.0, "child_mask": mask}
    optimizer = FusedChildAdamW(model.named_parameters(), **options)
    if how == "registration" and second:
        optimizer.param_groups[0]["reserve_p"] = 2.0
    registered = message_of(lambda: register_child_comm_hook(model, optimizer))
    if how in ("seed", "mask", "registration"):
        return registered
    assert registered == "nothing"
    if second and how == "p":
        optimizer.param_groups[0]["reserve_p"] = 0.4
    if second and how == "late seed":
        optimizer.param_groups[0]["seed"] = 8
    if second and how == "late mask":
        optimizer.state[model.module.weight]["mask_words"].zero_()
    if second and how == "step":
        for state in optimizer.state.values():
            state["step"] += 1
    if second and how == "option":
        optimizer.param_groups[0]["reserve_p"] = float("nan")
    return message_of(lambda: model(torch.ones(733)).backward())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("seed", "seed=8 on rank 1, 7 on rank 0"),
        ("mask", "child_mask of weight, bias on rank 1 is another than on rank 0"),
        ("registration", r"reserve_p of weight, bias is 2\.0 on rank 1 and 0\.3 on rank 0"),
        ("late seed", "0 and 1 would send other elements of weight: seed 7 and 8; give the optimi"),
        ("late mask", "other elements of weight: child mask [0-9a-f]+ and [0-9a-f]+;"),
        ("p", r"other elements of weight: reserve_p 0\.3 and 0\.4;"),
        ("step", "other elements of weight: steps done 0 and 1;"),
        ("option", "reserve_p=nan"),
    ],
    ids=["seed", "mask", "registration", "late seed", "late mask", "p", "step", "option"],
)
def test_masks_that_differ_are_an_error_on_every_rank(ranks: Ranks, how: str, message: str) -> None:
    for found in ranks.run(2, disagreeing, how):
        assert re.search(message, found), found


def changed_before_the_step(change: str) -> tuple[str, bool]:
    """What a step says whose masks changed after the backward, and whether it left the weights alone."""
    plain = Model()
    model = DistributedDataParallel(plain)
    optimizer = optimizer_of(plain, "both")
    register_child_comm_hook(model, optimizer)
    before = {name: value.detach().clone() for name, value in plain.named_parameters()}
    model(batch(0)).square().sum().backward()
    if change == "mask":
        optimizer.set_child_mask(child_of(plain, seed=5))
    elif change == "words":
        # As a checkpoint that is loaded in place does it.
        next(s["mask_words"] for s in optimizer.state.values() if "mask_words" in s).zero_()
    elif change != "in the closure":
        optimizer.param_groups[0]["reserve_p"] = {"larger": 0.6, "smaller": 0.4, "between": 0.6}[
            change
        ]
    if change == "between":
        model(batch(0)).square().sum().backward()
    if change == "in the closure":

        def closure() -> float:
            optimizer.param_groups[0]["reserve_p"] = 0.6
            return 0.0

        said = message_of(lambda: optimizer.step(closure))
    else:
        said = message_of(optimizer.step)
    return said, all(torch.equal(before[name], p) for name, p in plain.named_parameters())


def test_a_step_by_another_mask_than_the_sent_one_is_refused(ranks: Ranks) -> None:
    for change in ("mask", "words", "larger", "between", "in the closure"):
        for said, untouched in ranks.run(1, changed_before_the_step, change):
            assert "was changed after its gradient had been reduced" in said, change
            assert untouched
    assert ranks.run(1, changed_before_the_step, "smaller") == [("nothing", False)]


def dropped() -> tuple[str, bool]:
    """Gradients that are dropped unused, another p, and an ordinary step; the weight has no child."""
    model = DistributedDataParallel(Values())
    masks = {
        "weight": torch.zeros(700, dtype=torch.bool),
        "bias": torch.zeros(33, dtype=torch.bool),
    }
    optimizer = FusedChildAdamW(
        model.named_parameters(), **OPTIONS, child_mask=ChildMask.from_dense(masks)
    )
    hook = register_child_comm_hook(model, optimizer)
    model(torch.ones(733)).backward()
    optimizer.zero_grad()
    optimizer.set_child_mask(None)
    model(torch.ones(733)).backward()
    said = message_of(optimizer.step)
    return said, hook.sent_bytes == 4 * 733 and hook.whole_bytes == 8 * 733


def dropped_and_drawn_anew() -> tuple[float, str]:
    """The same step twice, by a larger p the second time: the share of elements that were sent for it."""
    model = DistributedDataParallel(Values())
    optimizer = FusedChildAdamW(model.named_parameters(), **OPTIONS, reserve_p=0.3)
    register_child_comm_hook(model, optimizer)
    for _ in range(2):  # DDP rebuilds its buckets once
        model(torch.ones(733)).backward()
        optimizer.zero_grad()
    optimizer.param_groups[0]["reserve_p"] = 0.9
    model(torch.ones(733)).backward()
    sent = torch.cat([parameter.grad for parameter in model.parameters()])  # type: ignore[misc]
    return float(sent.mean()), message_of(optimizer.step)


def test_a_mask_is_drawn_anew_within_one_step(ranks: Ranks) -> None:
    for share, said in ranks.run(2, dropped_and_drawn_anew):
        assert 0.85 < share < 0.95
        assert said == "nothing"


def test_dropped_gradients_allow_another_mask_and_an_empty_child_sends_nothing(
    ranks: Ranks,
) -> None:
    assert ranks.run(2, dropped) == [("nothing", True)] * 2


def refusals() -> dict[str, str]:
    model = DistributedDataParallel(Values())
    named = list(model.named_parameters())
    optimizer = FusedChildAdamW(named, **OPTIONS, reserve_p=0.3)
    said = {
        "no DDP": message_of(lambda: register_child_comm_hook(Values(), optimizer)),
        "AdamW": message_of(
            lambda: register_child_comm_hook(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]
        ),
        "other model": message_of(
            lambda: register_child_comm_hook(
                model, FusedChildAdamW(Values().named_parameters(), **OPTIONS)
            )
        ),
        "sparse": message_of(
            lambda: register_child_comm_hook(
                DistributedDataParallel(embedding), FusedChildAdamW(embedding.parameters(), lr=1e-2)
            )
        )
        if (embedding := nn.Embedding(4, 3, sparse=True))
        else "",
    }
    with optimizer.release_gradients():
        said["released"] = message_of(lambda: register_child_comm_hook(model, optimizer))
    register_child_comm_hook(model, optimizer)
    said["twice"] = message_of(lambda: register_child_comm_hook(model, optimizer))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whole = DistributedDataParallel(Values())
        register_child_comm_hook(whole, FusedChildAdamW(whole.named_parameters(), **OPTIONS))
    said["no mask"] = f"{caught[-1].filename}: {caught[-1].message}"
    return said


def test_what_cannot_be_served_is_refused_with_a_remedy(ranks: Ranks) -> None:
    said = ranks.run(1, refusals)[0]
    assert re.match("TypeError: ddp_model is a Values, not a Distributed", said["no DDP"])
    assert re.match("TypeError: optimizer is a AdamW, not a Fused", said["AdamW"])
    assert re.match("ValueError: optimizer holds no parameter of ddp_model", said["other model"])
    assert "makes sparse gradients; use sparse=False" in said["sparse"]
    assert re.match(r"RuntimeError: release_gradients\(\) is active", said["released"])
    assert re.search("can only be called once.* make the Distributed", said["twice"])
    assert re.search(
        r"test_comm_hook_errors\.py: .* no parameter of the model has a mask", said["no mask"]
    )
