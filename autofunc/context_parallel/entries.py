"""What the layers of a stage see of a microbatch, flattened to named tensors and rebuilt from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.captured.model import Shared
from autofunc.fake import FakeTensorMode, fake_like


def named_tensors(entries: Any) -> dict[str, Tensor]:
    """Return the tensors in the result of `Specialised.share`, under names that are the same for every stage."""
    plain = {"values": entries.values, "key": entries.key} if isinstance(entries, Shared) else dict(entries)
    leaves = zip(tree.leaf_names(plain, "entries"), tree.leaves_and_spec(plain)[0], strict=True)
    return {name: leaf for name, leaf in leaves if isinstance(leaf, Tensor)}


def with_tensors(entries: Any, given: Mapping[str, Tensor]) -> Any:
    """Return the entries with the tensors in `given` replaced by name."""
    plain = {"values": entries.values, "key": entries.key} if isinstance(entries, Shared) else dict(entries)
    leaves, spec = tree.leaves_and_spec(plain)
    names = tree.leaf_names(plain, "entries")
    made = tree.from_leaves([given.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)], spec)
    return replace(entries, **made) if isinstance(entries, Shared) else made


def faked(mode: FakeTensorMode, microbatch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the microbatch with fake tensors of a mode."""
    made: dict[str, Any] = tree.map_leaves(
        lambda leaf: fake_like(mode, leaf) if isinstance(leaf, Tensor) else leaf, dict(microbatch)
    )
    return made


def device_of(entries: Any) -> torch.device:
    """Return the device of the first tensor; the CPU if there are none."""
    return next((leaf.device for leaf in named_tensors(entries).values()), torch.device("cpu"))


def tensors_in(x: Any) -> list[Tensor]:
    """Return the tensors of a tree, in leaf order."""
    return [leaf for leaf in tree.leaves_and_spec(x)[0] if isinstance(leaf, Tensor)]


def refilled(x: Any, tensors: Sequence[Tensor]) -> Any:
    """Replace the tensors of a tree, in leaf order."""
    remaining = iter(tensors)
    return tree.map_leaves(lambda leaf: next(remaining) if isinstance(leaf, Tensor) else leaf, x)


@dataclass(frozen=True)
class TokenEntries:
    """What the layers of a cp rank see: the tensors all ranks have, and this rank's pieces of some of them."""

    tensors: Mapping[str, Tensor]
    device: torch.device
