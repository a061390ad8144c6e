"""Reading a checkpoint into the layout of a pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from autofunc import tree
from autofunc.checkpoint.folder import AVERAGE, OPTIMIZER, PARAMS, STATE, read_extra, read_metadata
from autofunc.checkpoint.write import flat_trees, hush, message_of, with_cuts
from autofunc.errors import CheckpointError, some_of
from autofunc.model import Model
from autofunc.optim import Optimizer
from autofunc.optim.state import OUTSIDE, path_of_slot
from autofunc.pipe import Pipeline
from autofunc.shard.dtensors import local
from autofunc.shard.fused import fill
from autofunc.shown import shown

Saved = Mapping[str, TensorStorageMetadata]
"""The tensors of a checkpoint, by name."""


@dataclass(frozen=True)
class Checkpoint:
    """The result of `af.load`: this process's part of everything."""

    params: TensorDict
    state: TensorDict  # of layers that keep some; empty if none does
    optimizer_state: TensorDict | None  # None if no optimizer was given
    extra: dict[str, Any]  # the `extra` given to `af.save`
    average: TensorDict | None = None  # None if not requested or absent


@torch.inference_mode(False)
@torch.no_grad()
def load(
    path: str | os.PathLike[str],
    pipe: Pipeline,
    *,
    optimizer: Optimizer | None = None,
    device: torch.device | str | None = None,
    average: bool = False,
) -> Checkpoint:
    """Read a checkpoint of `af.save`, written in any layout, into a pipeline's layout. Each process reads only its part.

    Args:
        path: the folder.
        pipe: whose parameters to read.
        optimizer: whose state was saved; without it the state is not read.
        device: of the tensors; by default as for `pipe.init`.
        average: whether to also read the average of the parameters, if the checkpoint has one.

    Raises:
        CheckpointError: if there is no checkpoint, or it belongs to a different model or optimizer; names the differences.
    """
    extra, saved = read_extra(path), _saved(Path(path))
    _check_model(path, saved, pipe.stages[0].model)
    params = pipe.blank(_dtypes(saved, PARAMS), device)
    slots: Mapping[str, Any] | None = None
    if optimizer is not None:
        params, slots = _slots(path, optimizer, params, pipe, saved)
    state = pipe.init_state(device)
    averaged = _blank_average(pipe, saved, device) if average else None
    _read(path, flat_trees(params, state, slots, averaged), saved)
    return Checkpoint(params, state, tree.to_tensordict(slots) if slots is not None else None, extra, averaged)


def _dtypes(saved: Saved, prefix: str) -> dict[str, torch.dtype]:
    names = (name for name in saved if name.startswith(f"{prefix}."))
    return {name.removeprefix(f"{prefix}."): saved[name].properties.dtype for name in names}


def _blank_average(pipe: Pipeline, saved: Saved, device: torch.device | str | None) -> TensorDict | None:
    """Return tensors to read an average into, laid out like its parameters; None if the checkpoint has none."""
    has = _dtypes(saved, AVERAGE)
    if not has:
        return None
    blank = tree.flatten(pipe.blank(_dtypes(saved, PARAMS) | has, device))
    return tree.to_tensordict({path: leaf for path, leaf in blank.items() if path in has})


def check_fits(path: str | os.PathLike[str], model: Model) -> dict[str, Any]:
    """Refuse a checkpoint of a different model, without reading tensors; return its `extra`.

    Raises:
        CheckpointError: naming the differences.
    """
    extra, saved = read_extra(path), _saved(Path(path))
    _check_model(path, saved, model)
    return extra


def _saved(path: Path) -> dict[str, TensorStorageMetadata]:
    entries = read_metadata(path).state_dict_metadata
    return {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


def _check_model(path: str | os.PathLike[str], saved: Saved, model: Model) -> None:
    differences = []
    for prefix, kind, spec in ((PARAMS, "parameters", model.spec), (STATE, "state", model.state_spec)):
        expected = {name: leaf for name, leaf in spec.items() if name not in model.ties}
        has = {name.removeprefix(f"{prefix}."): each for name, each in saved.items() if name.startswith(f"{prefix}.")}
        differences += _names(kind, has, expected)
        differences += [
            f"{name} has shape {tuple(has[name].size)} there, and {tuple(leaf.shape)} here"
            for name, leaf in expected.items()
            if name in has and not _same_shape(has[name].size, leaf.shape)
        ]
    if differences:
        listed = "; ".join(differences[:4]) + (f"; and {len(differences) - 4} more" if len(differences) > 4 else "")
        raise CheckpointError(f"{shown(path)} is a checkpoint of a different model than {model.title}: {listed}")


def _names(kind: str, has: Iterable[str], wants: Iterable[str]) -> list[str]:
    """Describe the names that only one side has."""
    has, wants = list(has), list(wants)
    missing, more = [name for name in wants if name not in set(has)], [name for name in has if name not in set(wants)]
    found = [f"it lacks {kind} {some_of(missing)}"] if missing else []
    return found + ([f"it has {kind} {some_of(more)}, which the model does not have"] if more else [])


def _same_shape(one: torch.Size, other: torch.Size) -> bool:
    """Return whether two shapes are the same. A zero-dim parameter has one dim if it is sharded."""
    return one == other or (one.numel() == other.numel() == 1 and max(len(one), len(other)) == 1)


def _slots(
    path: str | os.PathLike[str], optimizer: Optimizer, params: TensorDict, pipe: Pipeline, saved: Saved
) -> tuple[TensorDict, dict[str, Tensor]]:
    """Return (params, tensors to read an optimizer's state into), from an update: only the optimizer knows its layout."""
    model = pipe.stages[0].model
    zeros = {name: torch.zeros_like(leaf) for name, leaf in tree.flatten(params).items() if model.is_trainable(name)}
    fresh = optimizer.init(params)
    has = {name.removeprefix(f"{OPTIMIZER}.") for name in saved if name.startswith(f"{OPTIMIZER}.")}
    if not has:  # saved before the first update
        return params, tree.flatten(fresh)
    params, made = optimizer.update(zeros, fresh, params)
    slots = tree.flatten(made)
    outside = {name for name in has if name.startswith(OUTSIDE)}
    missing = [name for name in slots if name not in has and not name.startswith(OUTSIDE)]
    more = sorted(name for name in has - set(slots) if path_of_slot(name, zeros))
    if missing or more:
        differs = f"it lacks {some_of(missing)}" if missing else f"it keeps {some_of(more)}, which this one does not"
        raise CheckpointError(f"{shown(path)} is a checkpoint of a different optimizer than {optimizer!r}: {differs}")
    slots = {name: leaf for name, leaf in slots.items() if name in has}
    # entries an optimizer keeps outside its slots come and go; every process holds all of them
    slots |= {name: _empty(saved[f"{OPTIMIZER}.{name}"]) for name in outside - set(slots)}
    return params, slots


def _empty(entry: TensorStorageMetadata) -> Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _read(path: str | os.PathLike[str], wanted: Mapping[str, Tensor], saved: Saved) -> None:
    """Read tensors in place."""
    # a zero-dim parameter has one dim if it is sharded; it is a single number, so read it whole
    cuts = {name: cut for name, (_, cut) in with_cuts(wanted).items() if cut is not None}
    others = {name: _empty(saved[name]) for name, leaf in wanted.items() if leaf.shape != saved[name].size or name in cuts}
    hush()
    try:
        dcp.load({**wanted, **others}, checkpoint_id=path, no_dist=True)
    except (CheckpointException, OSError, RuntimeError) as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {message_of(error)}") from error
    for name, value in others.items():
        if name in cuts:
            fill(wanted[name], value, cuts[name])
            continue
        part = local(wanted[name])
        part.copy_(value.expand(part.shape) if part.numel() else part)
