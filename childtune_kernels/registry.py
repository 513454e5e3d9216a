"""One table op x backend: which kernel serves a device, and why (design: the house)."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch

# In order of preference. A cell holds the module below backends/ that serves the op, or None where
# that column has no kernel for it.
BACKENDS = ("triton", "cpp", "reference")
TABLE: dict[str, dict[str, str | None]] = {
    "child_adamw": {
        "triton": "triton.child_adamw",
        "cpp": "cpp",
        "reference": "reference.child_adamw",
    },
    "gradient_norm": {
        "triton": "triton.gradient_norm",
        "cpp": "cpp",
        "reference": "reference.gradient_norm",
    },
    "observe": {"triton": None, "cpp": "cpp", "reference": "reference.observe"},
    "keep_words": {
        "triton": "triton.keep_words",
        "cpp": "cpp",
        "reference": "reference.keep_words",
    },
    "bitmask": {"triton": "triton.bitmask", "cpp": "cpp", "reference": "reference.bitmask"},
    "fisher_accumulate": {
        "triton": "triton.fisher_accumulate",
        "cpp": "cpp",
        "reference": "reference.fisher_accumulate",
    },
    "topk_select": {
        "triton": "triton.topk_select",
        "cpp": "cpp",
        "reference": "reference.topk_select",
    },
}

_warned: set[str] = set()


@dataclass(frozen=True)
class Choice:
    """One cell of the table for one device; ``on_request``: it serves only those who name it."""

    op: str
    backend: str
    available: bool
    reason: str
    on_request: bool = False

    @cached_property
    def module(self) -> ModuleType:
        """The module whose functions are the op's kernels."""
        cell = TABLE[self.op][self.backend]
        return importlib.import_module(f".backends.{cell}", __package__)


def _cell(op: str, backend: str, device: torch.device) -> Choice:
    if TABLE[op][backend] is None:
        return Choice(op, backend, False, "no kernel: this op runs on the host, for every device")
    if backend == "reference":
        return Choice(op, backend, True, "plain PyTorch, serves every device")
    if backend == "triton":
        absent = _triton_absent(device)
        if device.type == "cpu":
            reason = absent or "runs in Triton's interpreter, where it is asked for"
            return Choice(op, backend, absent is None, reason, on_request=True)
        return Choice(op, backend, absent is None, absent or "compiled when first used")
    if device.type != "cpu" and op != "observe":  # which reads no tensor's memory
        return Choice(op, backend, False, f"serves CPU tensors, not {device.type}")
    from .backends import cpp

    absent = cpp.load()
    if absent is not None:
        return Choice(op, backend, False, absent)
    try:
        capability = cpp.CAPABILITIES[cpp.capability()]
    except RuntimeError as error:
        return Choice(op, backend, False, str(error))
    return Choice(op, backend, True, f"compiled, runs {capability}")


def _triton_absent(device: torch.device) -> str | None:
    """None, or why Triton kernels cannot run on a device."""
    if device.type not in ("cpu", "cuda"):
        return f"serves CUDA and HIP devices, not {device.type}"
    try:
        from .backends.triton import launch
    except Exception as error:  # one that does not go with this torch or Python fails in many ways
        return f"triton does not load ({error}); pip install triton"
    if device.type == "cpu" and not launch.INTERPRETED:
        return "for GPUs; CPU tensors only under TRITON_INTERPRET=1, set before Triton is imported"
    return launch.failure(device.type)


def survey(device: torch.device | str = "cpu") -> list[Choice]:
    """Every cell of the table for a device, op by op in order of preference."""
    device = torch.device(device)
    return [_cell(op, backend, device) for op in TABLE for backend in BACKENDS]


def check_requested(requested: str | None) -> None:
    """Refuse the name of a backend that there is not.

    Raises:
        ValueError: names it.
    """
    if requested is not None and requested not in BACKENDS:
        raise ValueError(f"backend={requested!r} is unknown; use one of {BACKENDS} or None")


def choose(op: str, device: torch.device | str, requested: str | None = None) -> Choice:
    """The backend that serves ``op`` on ``device``: the requested one, else the first available.

    Where only the reference is left, one warning says why.

    Raises:
        ValueError: ``requested`` is not a backend.
        RuntimeError: the requested backend does not serve this op here; the message says the remedy.
    """
    device = torch.device(device)
    check_requested(requested)
    if requested is not None:
        cell = _cell(op, requested, device)
        if not cell.available:
            raise RuntimeError(_refusal(cell, device))
        return cell
    cells = [_cell(op, backend, device) for backend in BACKENDS]
    chosen = next(cell for cell in cells if cell.available and not cell.on_request)
    if chosen.backend == "reference":
        _refuse_forced_capability(device)
        if op != "observe" or device.type == "cpu":
            _warn_once(cells, device)
    return chosen


def _refusal(cell: Choice, device: torch.device) -> str:
    from .backends import cpp

    remedy = "use backend=None to take what is available"
    if cell.backend == "cpp" and device.type == "cpu":
        remedy = f"{cpp.REMEDY}, or {remedy}"
    return (
        f"backend={cell.backend!r} cannot serve {cell.op} on {device.type}: {cell.reason}; {remedy}"
    )


def _refuse_forced_capability(device: torch.device) -> None:
    """Raise where the C++ column is out only because an instruction set was asked for in vain."""
    from .backends import cpp

    if device.type == "cpu" and cpp.load() is None:
        cpp.capability()


def _warn_once(cells: list[Choice], device: torch.device) -> None:
    if device.type in _warned:
        return
    _warned.add(device.type)
    reasons = "; ".join(f"{c.backend}: {c.reason}" for c in cells if not c.available)
    warnings.warn(
        f"childtune_kernels runs its slow reference on {device.type} ({reasons})",
        RuntimeWarning,
        stacklevel=4,
    )


def explain(device: torch.device | str = "cpu") -> str:
    """A table of op x backend for a device: what is available, what is chosen, and why.

    Args:
        device: a torch device or its name.

    Returns:
        Lines of text; the chosen backend of each op is marked with ``*``.
    """
    lines = [f"{'op':<19}{'backend':<12}{'':<3}why"]
    chosen: set[str] = set()
    for cell in survey(device):
        mark = "-"
        if cell.available:
            mark = "+" if cell.on_request or cell.op in chosen else "*"
            chosen |= {cell.op} if mark == "*" else set()
        lines.append(f"{cell.op:<19}{cell.backend:<12}{mark:<3}{cell.reason}")
    lines.append("* chosen   + available   - not available")
    return "\n".join(lines)
