"""Labels of parameters and the Philox keys made of them (SPEC.md, eq. 4 and "Label")."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

_WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def label_of(name: str) -> str:
    """The label of a parameter's name: the name without the prefixes that wrappers add.

    ``module.`` goes at the front only (DataParallel and DistributedDataParallel); ``_orig_mod.``
    (torch.compile), ``_fsdp_wrapped_module.`` and ``_checkpoint_wrapped_module.`` go anywhere.

    Raises:
        ValueError: nothing of the name is left.
    """
    components = [part for part in name.split(".") if part not in _WRAPPER_COMPONENTS]
    while len(components) > 1 and components[0] == "module":
        del components[0]
    label = ".".join(components)
    if not label:
        raise ValueError(f"the parameter name {name!r} has no label; give the parameter a name")
    return label


def shortened(labels: Sequence[str], most: int = 6) -> str:
    """The first labels as text, and how many more there are; nothing of none."""
    more = len(labels) - most
    return ", ".join(labels[:most]) + (f" and {more} more" if more > 0 else "")


class Aliases:
    """Labels that stand in the place of others: of a weight that two stages of a pipeline hold.

    Attributes:
        labels: label → the label in its place.
        met: those of the former that a name has had.
    """

    def __init__(self, aliases: Mapping[str, str] | None = None) -> None:
        self.labels = {label_of(name): label_of(other) for name, other in (aliases or {}).items()}
        self.met: set[str] = set()

    def label_of(self, name: str) -> str:
        """The label of a parameter's name, as the function has it, or the one in its place."""
        label = label_of(name)
        if label in self.labels:
            self.met.add(label)
        return self.labels.get(label, label)


def philox_key(seed: int, label: str) -> int:
    """The 64-bit Philox key of a parameter, k0 in the low word (SPEC.md, eq. 4)."""
    digest = hashlib.sha256((seed % 2**64).to_bytes(8, "little") + label.encode()).digest()
    return int.from_bytes(digest[:8], "little")


def positional_label(index: int) -> str:
    """The label of the index-th parameter of an optimizer that was given no names."""
    return f"#{index}"


def is_positional(label: str) -> bool:
    """Whether a label stands for a position and not for a name."""
    return label.startswith("#")
