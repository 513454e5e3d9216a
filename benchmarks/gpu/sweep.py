"""How fast other tiles and warps are than those in launch.py: a table to fill that one from by hand.

Kernels are never tuned while they work on somebody's weights: this runs on tensors of its own.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from childtune_kernels import registry
from childtune_kernels.backends.triton import launch
from childtune_kernels.backends.triton.launch import Config
from childtune_kernels.rounds import Contender, Seconds, interleave, quartiles, ratio

from ..cases import Case, Workload
from ..contests import Competitor, Contest, fisher, selection
from ..correctness import fault_of
from ..traffic import bytes_per_parameter
from ..variants import (
    CT_D,
    CT_D_RUNS,
    CT_D_SPARSE,
    CT_D_SPARSEST,
    CT_F,
    CT_F_SPLIT,
    PLAIN,
    PLAIN_SPLIT,
    Variant,
)
from .bandwidth import copy_contender
from .cases import BERT_LARGE, tiny_of
from .contests import FISHER_NAMES, SELECTION_NAME, contests_for
from .ledger import Ledger
from .setting import Setting, say

_TILES, _WARPS = (512, 1024, 2048, 4096), (4, 8, 16)
_TINY_CONFIGS = (Config(2048, 1), Config(4096, 1))
_ELEMENTS_A_THREAD = range(4, 17)
_COPIED_BYTES, _TINY_COPIED_BYTES = 2**30, 2**14
_SECONDS_OF_ROUNDS = 15.0
_COPY = "copy"

#: Whose step shows how an op is cut up best.
SWEPT: dict[str, tuple[Variant, ...]] = {
    "child_adamw_light": (PLAIN, CT_F),
    "child_adamw": (PLAIN_SPLIT, CT_F_SPLIT),
    "child_adamw_compact": (CT_D, CT_D_SPARSE, CT_D_SPARSEST),
    "child_adamw_runs": (CT_D_RUNS,),
}
SWEPT_CONTESTS = {
    FISHER_NAMES[BERT_LARGE.name]: fisher.OURS,
    SELECTION_NAME: selection.SELECT,
}


@contextlib.contextmanager
def configured(op: str, config: Config) -> Iterator[None]:
    """An op is cut up as said, until the end of the block."""
    original = launch.config

    def chosen(name: str, of_generation: str) -> Config:
        return config if name == op else original(name, of_generation)

    launch.config = chosen  # type: ignore[assignment]
    try:
        yield
    finally:
        launch.config = original


def configs(op: str, setting: Setting) -> list[Config]:
    """The configuration that an op has on the device, first, and others near it."""
    generation = launch.generation(setting.device)
    present = launch.config(op, generation)
    if setting.tiny:
        return list(dict.fromkeys([present, *_TINY_CONFIGS]))
    lanes = launch.warp_size(generation)
    near = [
        Config(tile, warps)
        for tile in _TILES
        for warps in _WARPS
        if tile // (warps * lanes) in _ELEMENTS_A_THREAD
    ]
    return list(dict.fromkeys([present, *near]))


def run_sweep(setting: Setting, ledger: Ledger, unproven: Mapping[str, str]) -> None:
    """Measure the neighbours of every configuration, and print what was found."""
    if (
        registry.choose("child_adamw", setting.device, setting.backend("child_adamw")).backend
        != "triton"
    ):
        raise RuntimeError("no Triton kernels serve this device, so that there is nothing to sweep")
    case = tiny_of(BERT_LARGE) if setting.tiny else BERT_LARGE
    for op, variants in SWEPT.items():
        for variant in variants[:1] if setting.tiny else variants:
            if setting.left() < 0:
                ledger.fault(case.name, f"sweep of {variant.name}", "out of time")
                continue
            say(f"sweep of {op}: {variant.title}")
            steps = _steps_of(op, variant, case, setting, ledger)
            field = _Field(case.name, case.parameters, case.rounds)
            _compare(op, variant.name, field, steps, setting, ledger)
    known = contests_for(setting)
    for name, competitor in SWEPT_CONTESTS.items():
        contest = known[name]
        op = contest.op
        if op in unproven or setting.absent(op) or registry.TABLE[op]["triton"] is None:
            ledger.fault(name, f"sweep of {op}", "no proven Triton kernel")
        elif setting.left() < 0:
            ledger.fault(name, f"sweep of {op}", "out of time")
        else:
            say(f"sweep of {op}: {competitor.title}")
            field = _Field(name, contest.elements, contest.rounds)
            steps = _steps_of_contest(contest, competitor, setting, ledger)
            _compare(op, competitor.name, field, steps, setting, ledger)


class _Field(NamedTuple):
    """On what configurations are compared."""

    case: str
    elements: int
    rounds: int


Steps = dict[Config, tuple[Callable[[], object], float]]


def _steps_of(op: str, variant: Variant, case: Case, setting: Setting, ledger: Ledger) -> Steps:
    """Configuration → a step with it, and the bytes a parameter that it moves; only what is right."""
    backend = setting.backend("child_adamw")
    workload = Workload(case.shapes(), setting.device, dtype=variant.dtype)
    steps: Steps = {}
    for config in configs(op, setting):
        try:
            with configured(op, config):
                fault = fault_of(variant, case, setting.device, backend)
                optimizer = variant.build(workload.named, backend)
                workload.share_moments(optimizer)
                optimizer.step()
        except Exception as error:  # a configuration that does not compile is one that is not taken
            fault = f"{type(error).__name__}: {error}"[:500]
        if fault is not None:
            ledger.fault(case.name, f"{variant.name} with {tuple(config)}", fault)
            continue
        moved = bytes_per_parameter(variant, optimizer, case.parameters)
        steps[config] = (_within(op, config, optimizer.step), moved)
    return steps


def _steps_of_contest(
    contest: Contest, competitor: Competitor, setting: Setting, ledger: Ledger
) -> Steps:
    """The same for a competitor of a contest."""
    op, name = contest.op, competitor.name
    step = contest.prepare(contest.shapes(), setting.device).steps[name]
    moved = float(competitor.bytes_per_element or 0)
    steps: Steps = {}
    for config in configs(op, setting):
        try:
            with configured(op, config):
                fault = contest.faults(contest.miniature(), setting.device).get(name)
        except Exception as error:  # as above
            fault = f"{type(error).__name__}: {error}"[:500]
        if fault is None:
            steps[config] = (_within(op, config, step), moved)
        else:
            ledger.fault(contest.name, f"{name} with {tuple(config)}", fault)
    return steps


def _within(op: str, config: Config, step: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with configured(op, config):
            step()

    return run


def _compare(
    op: str, variant: str, field: _Field, steps: Steps, setting: Setting, ledger: Ledger
) -> None:
    """Time the configurations in the same rounds, beside a copy."""
    if not steps:
        return
    copied = _TINY_COPIED_BYTES if setting.tiny else _COPIED_BYTES
    contenders = {str(tuple(config)): Contender(step) for config, (step, _) in steps.items()}
    contenders[_COPY] = copy_contender(copied, setting.device)
    deadline = time.monotonic() + min(_SECONDS_OF_ROUNDS, max(0.0, setting.left()))
    seconds: dict[str, Seconds] = interleave(
        contenders, field.rounds, setting.device, deadline=deadline
    )
    present = str(tuple(next(iter(configs(op, setting)))))
    records = []
    for config, (_, moved) in steps.items():
        own = seconds[str(tuple(config))]
        record: dict[str, Any] = {
            "case": field.case,
            "variant": f"{op} {variant} {config.tile} {config.num_warps}",
            "op": op,
            "of": variant,
            "tile": config.tile,
            "num_warps": config.num_warps,
            "present": str(tuple(config)) == present,
            "seconds": quartiles(list(own.values()))[1],
        }
        if moved:
            over_copy = ratio(own, seconds[_COPY])[1]
            record["share_of_copy"] = moved * field.elements / (2 * copied) / over_copy
        if present in seconds:
            record["ratio_to_present"] = ratio(own, seconds[present])[1]
        records.append(record)
    ledger.put("sweep", records, field.case)
    del steps, contenders
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
