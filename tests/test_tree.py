"""Paths and trees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from autofunc import tree
from autofunc.errors import ModelError

names = st.text("abc01", min_size=1, max_size=3)
paths = st.lists(names, min_size=1, max_size=4).map(".".join)


def is_prefix_free(found: set[str]) -> bool:
    return not any(a != b and b.startswith(a + ".") for a in found for b in found)


@given(st.sets(paths, max_size=8).filter(is_prefix_free))
def test_nesting_and_flattening_are_inverse(found: set[str]) -> None:
    flat = {path: torch.tensor(float(index)) for index, path in enumerate(sorted(found))}
    assert tree.flatten(tree.nest(flat)).keys() == flat.keys()
    again = tree.flatten(tree.to_tensordict(flat))
    assert set(again) == found
    assert list(again) == sorted(again, key=tree.split_path), "sorted as paths"
    assert all(torch.equal(again[path], flat[path]) for path in flat)


@given(st.sets(paths, max_size=6))
def test_a_name_cannot_be_leaf_and_folder(found: set[str]) -> None:
    if is_prefix_free(found):
        tree.check_prefix_free(found)
    else:
        with pytest.raises(ModelError, match="cannot both be names in one tree"):
            tree.check_prefix_free(found)


def test_order_does_not_depend_on_insertion() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    first = tree.to_tensordict({"b.c": b, "a": a})
    assert list(first.keys()) == list(tree.to_tensordict({"a": a, "b.c": b}).keys()) == ["a", "b"]


def test_flatten_takes_any_nested_mapping() -> None:
    leaf = torch.zeros(1)
    assert list(tree.flatten({"h.0": {"w": leaf}, "h.1": TensorDict({"w": leaf})})) == ["h.0.w", "h.1.w"]


@pytest.mark.parametrize("path", ["", "a..b", ".a", "a."])
def test_invalid_paths(path: str) -> None:
    with pytest.raises(ModelError, match="is not a path"):
        tree.split_path(path)


def test_patterns_cross_dots() -> None:
    assert tree.matches("h.0.attn.bias", ["*.bias"]) and tree.matches("lm_head.weight", ["wte*", "lm_head*"])
    assert not tree.matches("h.0.attn.weight", ["*.bias"])


def test_leaf_names() -> None:
    assert tree.leaf_names(torch.zeros(1), "x") == ["x"]
    assert tree.leaf_names({"a": torch.zeros(1), "b": (torch.zeros(1), 3)}, "x") == ["x.a", "x.b.0", "x.b.1"]
