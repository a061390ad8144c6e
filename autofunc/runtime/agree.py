"""Agreement of a pipeline's ranks before a new kind of step; nothing is exchanged during steps.

Each rank writes its intent to the store that the processes were started with, so that a rank that arrives alone can name
the missing ones.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from autofunc import tree
from autofunc.errors import BatchError, ModelError, PeerLostError
from autofunc.mesh import timeout_of
from autofunc.surroundings import named_settings

# every rank builds the pipelines of a mesh in the same order, so the same number means the same plan
_numbers: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()  # of a group's next plan


@dataclass(frozen=True)
class Intent:
    """What a rank is about to do."""

    mode: str
    num_microbatches: int
    entries: Mapping[str, str]  # of a microbatch: name of a leaf -> its dtype and shape, or its value
    dtypes: Mapping[str, str]  # of its parameters, by path
    settings: Mapping[str, str]  # of torch, by name
    held: Sequence[int]  # number of graph nodes in each of its plans, oldest first


def agree(
    group: dist.ProcessGroup,
    mode: str,
    microbatches: Sequence[Mapping[str, Any]],
    dtypes: Mapping[str, torch.dtype],
    held: Sequence[int],
) -> tuple[dict[str, torch.dtype], list[int]]:
    """Check that all ranks are about to do the same, and share what they know; all ranks of the group call it.

    Args:
        group: of the pp axis.
        mode: what the step is for.
        microbatches: of an example step.
        dtypes: of this rank's parameters, by path.
        held: number of graph nodes in each of this rank's plans, oldest first.

    Returns:
        (dtypes of all ranks' parameters, the most nodes on any rank for each plan). So all ranks forget the same plans: a
        rank that rebuilds one waits here for the others.

    Raises:
        BatchError: if ranks differ in the number of microbatches, in shapes, dtypes or non-tensor values, in the kind of
            step, or in torch's settings.
        ModelError: if a parameter has different dtypes on two ranks.
        PeerLostError: if a rank does not arrive within the group's timeout.
    """
    if dist.get_backend(group) == "fake":  # torch's group without communication: this rank is alone
        return dict(dtypes), list(held)
    number = _numbers.get(group, 0)
    store, rank, size = group.get_group_store(), group.rank(), group.size()
    keys = [f"autofunc/intent/{number}/{each}" for each in range(size)]
    own = Intent(
        mode, len(microbatches), _described(microbatches[0]), {path: _name(dtype) for path, dtype in dtypes.items()},
        named_settings(), held,
    )  # fmt: skip
    store.set(keys[rank], json.dumps(asdict(own)))
    try:
        store.wait(keys, timeout_of(group))
    except RuntimeError as error:  # a `DistStoreError`, except for file stores
        missing = [str(each) for each, key in enumerate(keys) if not store.check([key])]
        store.delete_key(keys[rank])  # the others have not counted this plan either: ranks that try again meet here
        raise PeerLostError(
            f"pp rank {rank} prepares a step ({mode}; {_text(own.entries)}), and rank {', '.join(missing)} does not: it "
            "has run such a step before, or is gone. All ranks must call the pipeline in the same order, with microbatches "
            "of the same shapes, and change parameters' dtypes on all ranks or none"
        ) from error
    _numbers[group] = number + 1
    intents = [Intent(**json.loads(store.get(key))) for key in keys]
    _check(intents)
    known = {path: getattr(torch, name) for intent in intents for path, name in intent.dtypes.items()}
    return known, [max(each) for each in itertools.zip_longest(*(intent.held for intent in intents), fillvalue=0)]


def _check(intents: list[Intent]) -> None:
    first = intents[0]
    known: dict[str, tuple[int, str]] = {}
    for rank, intent in enumerate(intents):
        if intent.mode != first.mode:
            raise BatchError(f"pp rank 0 wants {first.mode}, and rank {rank} wants {intent.mode}; all must call the same")
        for name in {**first.entries, **intent.entries}:
            here, there = (each.entries.get(name, "missing") for each in (first, intent))
            if here != there:
                raise BatchError(
                    f"{name} of a microbatch is {here} on pp rank 0, and {there} on rank {rank}; all pp ranks of a data "
                    "parallel coordinate pass the same batch"
                )
        if intent.num_microbatches != first.num_microbatches:
            raise BatchError(
                f"a batch makes {first.num_microbatches} microbatches on pp rank 0, and {intent.num_microbatches} on rank "
                f"{rank}; all pp ranks of a data parallel coordinate pass the same batch"
            )
        for name, setting in first.settings.items():
            if intent.settings[name] != setting:
                raise BatchError(
                    f"{name} is {setting} on pp rank 0, and {intent.settings[name]} on rank {rank}; set it alike on all"
                )
        for path, dtype in intent.dtypes.items():
            owner, expected = known.setdefault(path, (rank, dtype))
            if dtype != expected:
                raise ModelError(f"parameter {path!r} is {expected} on pp rank {owner}, and {dtype} on rank {rank}")


def _described(microbatch: Mapping[str, Any]) -> dict[str, str]:
    leaves = tree.leaves_and_spec(dict(microbatch))[0]
    named = zip(tree.leaf_names(dict(microbatch), "batch"), leaves, strict=True)
    return {
        name: f"{_name(leaf.dtype)} of shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)
        for name, leaf in named
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(entries: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {what}" for name, what in entries.items())
