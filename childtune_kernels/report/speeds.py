"""What optimizers measured side by side come to: a table, and a verdict in sentences."""

from __future__ import annotations

import torch

from ..side_by_side import LEAST_ROUNDS, Measured, SideBySide
from .text_table import aligned, milliseconds

_EQUAL = 0.03  # nobody feels less
_WIDE = 0.1  # quartiles on both sides of 1 that are further apart leave it open which is faster
_UNSTEADY = 0.2  # of the median, between the quartiles of the base's own steps
_WILD = 0.5
_OVERTAKEN = 0.8  # of the base's time
_FAR = 2.0  # a factor that a few noisy rounds cannot make up


def speeds_table(found: SideBySide) -> str:
    """Plain text: a row a contender with its time, its relation to the base's, and its state."""
    of_base = f"of {found.base.title}"
    header = ("contender", "ms a step", of_base, "quartiles", "rounds", "state bytes/param.")
    return aligned([header, *(_row(each, found.model.parameters) for each in found.measured)])


def _row(measured: Measured, parameters: int) -> tuple[str, str, str, str, str, str]:
    if measured.failure is not None:
        return measured.title, "failed", "-", "-", "-", "-"
    low, middle, high = measured.of_base
    return (
        measured.title,
        milliseconds(measured.seconds[1]),
        _times(middle),
        f"{_times(low)}–{_times(high)}",
        str(measured.rounds),
        f"{measured.state_bytes / parameters:.2f}",
    )


def verdict(found: SideBySide) -> list[str]:
    """What FusedChildAdamW gives here, in one to three sentences that follow from the figures."""
    caution = _of_reference(found) or _of_unsteadiness(found)
    said = [caution, _of_speed(found), _of_state(found), "" if caution else _of_unfused(found)]
    return [sentence for sentence in said if sentence]


def _of_reference(found: SideBySide) -> str:
    if found.backend != "reference":
        return ""
    reason = f" ({found.absent})" if found.absent else ""
    return (
        f"These times do not stand for the package, whose slow reference serves here{reason}; the command "
        "info says what else could."
    )


def _overtaken(found: SideBySide) -> list[Measured]:
    """Those that do more than the base and took clearly less time: then something held the base up.

    Seen with other work on both cores: every step of the base waited for its second thread, 50 times as
    long as it takes, and its quartiles lay close together.
    """
    others = [each for each in found.measured if not each.ours and each.failure is None]
    return [each for each in others if each.of_base[1] < _OVERTAKEN]


def _of_unsteadiness(found: SideBySide) -> str:
    """That the base's own steps differ, or come last, as they do on a machine with other work."""
    if faster := _overtaken(found):
        return (
            f"{found.base.title} took longer than {faster[0].title}, which does more: something else seems "
            "to hold it up, and its figures say nothing. Measure on an idle machine, or with --threads 1."
        )
    spread = _spread(found.base)
    if spread <= _UNSTEADY:
        return ""
    return (
        f"The steps of {found.base.title} themselves differ by {spread:.0%} (between quartiles): something "
        "else seems to run here, and an idle machine may well give other figures."
    )


def _spread(measured: Measured) -> float:
    first, median, third = measured.seconds
    return (third - first) / median


def _of_speed(found: SideBySide) -> str:
    """How much of the base's time everybody of ours takes, and of whom nothing can be said."""
    clear, unclear = [], []
    for each in found.measured:
        if each.ours and each.failure is None:
            how = "unclear" if _overtaken(found) else standing(each, found.base)
            if how == "unclear":
                unclear.append(each.title)
            else:
                clear.append(f"{each.title} takes {_times(each.of_base[1])} ({how})")
    said = []
    if clear:
        said.append(f"of the time of {found.base.title}, {_listed(clear)}")
    if unclear:
        said.append(
            f"whether {_listed(unclear, 'or')} is faster cannot be told, so few the rounds are or so far "
            "apart: measure on an idle machine, or with more --seconds"
        )
    sentence = "; ".join(said)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def _listed(items: list[str], word: str = "and") -> str:
    return f" {word} ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def standing(measured: Measured, base: Measured) -> str:
    """Beside the base an optimizer is ``"faster"``, ``"about as fast"``, ``"slower"`` or ``"unclear"``.

    What is within 3 per cent is as fast. Where the quartiles lie on both sides of 1 and far apart, the
    rounds are few and the ratio is below 2, or the base's own steps differ by half, nothing is clear.
    """
    # Other work delays whoever waits for all its threads more than others: then ratios are wrong, too.
    if _spread(base) > _WILD:
        return "unclear"
    low, middle, high = measured.of_base
    far = not 1 / _FAR < middle < _FAR
    if not far and measured.rounds < LEAST_ROUNDS:
        return "unclear"
    if low <= 1 <= high and high - low > _WIDE:
        return "unclear"
    if low <= 1 <= high or abs(middle - 1) <= _EQUAL:
        return "about as fast"
    return "faster" if middle < 1 else "slower"


def _of_state(found: SideBySide) -> str:
    """The one of ours with the least state, beside the base's."""
    ours = [each for each in found.measured if each.ours and each.failure is None]
    if not ours:
        return ""
    least = min(ours, key=lambda each: each.state_bytes)
    parameters = found.model.parameters
    own, other = least.state_bytes / parameters, found.base.state_bytes / parameters
    if abs(own - other) < 0.05:
        return (
            f"{least.title} keeps as much state as {found.base.title}: {own:.2f} bytes a parameter."
        )
    size = _size(abs(found.base.state_bytes - least.state_bytes))
    return (
        f"{least.title} keeps {own:.2f} bytes of state a parameter instead of {other:.2f}: "
        f"{size} {'less' if own < other else 'more'} for this model."
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _of_unfused(found: SideBySide) -> str:
    """CT_F beside the step that it replaces, where both were measured."""
    by_name = {each.name: each for each in found.measured if each.failure is None}
    if "unfused" not in by_name or "ct_f" not in by_name:
        return ""
    times = by_name["unfused"].of_base[1] / by_name["ct_f"].of_base[1]
    return f"An unfused Child-Tuning step takes {_times(times)} times as long as {by_name['ct_f'].title}."


def note(found: SideBySide) -> str:
    """What a reader must know to compare the states; empty where there is nothing."""
    if found.dtype == torch.float32:
        return ""
    return (
        "In 16 bits torch's AdamW rounds moments and weights to bf16; FusedChildAdamW keeps fp32 moments and "
        "the bits that weights lose (state_dtype and master_weight choose otherwise)."
    )


def _times(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2f}"
