"""What the layers of a stage see of a microbatch, flattened to named tensors and rebuilt from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.captured.model import Shared


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


@dataclass(frozen=True)
class TokenEntries:
    """What the layers of a cp rank see: the tensors all ranks have, and this rank's pieces of some of them."""

    tensors: Mapping[str, Tensor]
    device: torch.device
