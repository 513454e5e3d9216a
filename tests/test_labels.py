"""Labels: names without what wrappers put in front of them, and the keys made of labels."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from childtune_kernels.labels import is_positional, label_of, philox_key, positional_label

ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("weight", "weight"),
        ("layer.0.weight", "layer.0.weight"),
        ("module.layer.weight", "layer.weight"),
        ("module.module.layer.weight", "layer.weight"),
        ("layer.module.weight", "layer.module.weight"),
        ("module.layer.module.weight", "layer.module.weight"),
        ("module", "module"),
        ("module.module", "module"),
        ("modules.weight", "modules.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("_orig_mod.layer.weight", "layer.weight"),
        ("layer._orig_mod.weight", "layer.weight"),
        ("_fsdp_wrapped_module.layer.weight", "layer.weight"),
        ("layer._fsdp_wrapped_module.weight", "layer.weight"),
        ("_checkpoint_wrapped_module.layer.weight", "layer.weight"),
        ("layer._checkpoint_wrapped_module.weight", "layer.weight"),
        ("module._orig_mod.layer.weight", "layer.weight"),
        ("_orig_mod.module.layer.weight", "layer.weight"),
        ("module._orig_mod.module.layer.weight", "layer.weight"),
        (
            "_fsdp_wrapped_module.a._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod.b",
            "a.b",
        ),
        ("größe.weight", "größe.weight"),
    ],
)
def test_labels_of_names(name: str, label: str) -> None:
    assert label_of(name) == label
    assert label_of(label) == label


@pytest.mark.parametrize("name", ["", "_orig_mod", "_orig_mod._fsdp_wrapped_module"])
def test_a_name_without_a_label(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} has no label; give the parameter a name"):
        label_of(name)


COMPONENTS = st.lists(st.sampled_from(["a", "b", "0", "weight", "module"]), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(COMPONENTS, st.lists(st.tuples(st.integers(0, 6), st.sampled_from(ANYWHERE)), max_size=4))
def test_wrappers_anywhere_do_not_change_a_label(
    components: list[str], wrappers: list[tuple[int, str]]
) -> None:
    wrapped = list(components)
    for place, wrapper in wrappers:
        wrapped.insert(place, wrapper)
    assert label_of(".".join(wrapped)) == label_of(".".join(components))
    assert label_of("module." + ".".join(wrapped)) == label_of(".".join(components))


def test_positions_are_labels_without_names() -> None:
    assert [positional_label(index) for index in (0, 11)] == ["#0", "#11"]
    assert is_positional("#0")
    assert not is_positional("layer.weight")


@pytest.mark.parametrize(
    ("seed", "label", "low", "high"),
    [
        (0, "#0", 0x0D463690, 0x42FC5763),
        (1234, "encoder.layer.0.attention.self.query.weight", 0x1DFC5D36, 0x8BB4C9D8),
        (-1, "größe.weight", 0x5D260493, 0x18BAC931),
    ],
)
def test_keys_are_those_of_the_specification(seed: int, label: str, low: int, high: int) -> None:
    assert philox_key(seed, label) == high << 32 | low
    assert philox_key(seed + 2**64, label) == philox_key(seed, label)
    assert philox_key(seed + 1, label) != philox_key(seed, label)
