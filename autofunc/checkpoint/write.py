"""Writing a checkpoint: every process writes its part, and the result is all or nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from autofunc import tree
from autofunc.checkpoint.folder import AVERAGE, OPTIMIZER, PARAMS, STATE, prepare, publish, remove
from autofunc.errors import AutofuncError, CheckpointError, in_brief
from autofunc.optim.state import path_of_slot
from autofunc.shard.fused import fused_cut, in_order
from autofunc.shown import shown
from autofunc.spreading import Cut


def save(
    path: str | os.PathLike[str],
    *,
    params: tree.Nested,
    state: tree.Nested | None = None,
    optimizer_state: tree.Nested | None = None,
    average: tree.Nested | None = None,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that `af.load` reads into a pipeline of any layout: other ranks, splits, schedules, shards.

    All processes of the default process group call it, if there is one, and the folder must be visible to all of them.
    The checkpoint gets its name only once it is complete.

    Args:
        path: the folder to create; it must not exist yet.
        params: this process's parameters.
        state: of layers that keep some, such as batch normalisation.
        optimizer_state: returned by `optimizer.init` or `update`.
        average: of all or some of the parameters, such as `af.ema` returns.
        extra: further values to store, such as the step: anything JSON can hold.

    Raises:
        CheckpointError: on every process, if one of them cannot write its part.

    Example:
        af.save("checkpoints/step_100", params=params, optimizer_state=state, extra={"step": 100})
        checkpoint = af.load("checkpoints/step_100", pipe, optimizer=optimizer)
        params, state, step = checkpoint.params, checkpoint.optimizer_state, checkpoint.extra["step"]
    """
    begin_save(
        path, params=params, state=state, optimizer_state=optimizer_state, average=average, extra=extra
    ).finish()  # fmt: skip


class Saving:
    """A checkpoint being written; returned by `begin_save`."""

    def __init__(self, path: Path, extra: Mapping[str, Any], written: Future[Any] | None, error: str | None) -> None:
        self.path = path
        self._extra, self._written, self._error = dict(extra), written, error

    @property
    def is_written(self) -> bool:
        """True once this process's part is written, so that `finish` does not wait for it."""
        return self._written is None or self._written.done()

    def finish(self) -> None:
        """Wait until all parts are written, and publish the checkpoint. All processes call it.

        Raises:
            CheckpointError: on every process, if one of them could not write; then there is no checkpoint.
        """
        error = self._error
        if error is None and self._written is not None:
            error = message_of(self._written.exception())
        if error is None and is_first():
            try:
                publish(self.path, self._extra)
            except (OSError, TypeError, ValueError) as failed:
                error = in_brief(failed)
        errors = [each for each in _of_all(error) if each is not None]
        if errors:
            if is_first():
                remove(self.path)
            raise CheckpointError(f"{shown(self.path)} cannot be written: {errors[0]}")


def begin_save(
    path: str | os.PathLike[str],
    *,
    params: tree.Nested,
    state: tree.Nested | None = None,
    optimizer_state: tree.Nested | None = None,
    average: tree.Nested | None = None,
    extra: Mapping[str, Any] | None = None,
    background: dist.ProcessGroup | bool = False,
) -> Saving:
    """Begin to write a checkpoint; call `finish` on the result to complete it. All processes call it, as `save`.

    Args:
        path: see `save`.
        params: see `save`; all trees may be modified as soon as this returns.
        state: see `save`.
        optimizer_state: see `save`.
        average: see `save`.
        extra: see `save`.
        background: True copies the tensors to the host and writes them while the caller continues; with several processes
            pass a gloo group of all of them, which nothing else may use in the meantime.

    Raises:
        CheckpointError: on every process, if the folder cannot be created.
    """
    folder = Path(path)
    error, partial = None, Path()
    if is_first():
        try:
            partial = prepare(folder)
        except CheckpointError as failed:
            error = str(failed)
    error, partial = of_first((error, partial))
    if error is not None:
        raise CheckpointError(error)
    tensors = {
        name: leaf if cut is None else in_order(leaf, cut)
        for name, (leaf, cut) in with_cuts(flat_trees(params, state, optimizer_state, average)).items()
    }
    alone = not dist.is_initialized()
    hush()
    if background:
        group = background if isinstance(background, dist.ProcessGroup) else None
        written = dcp.async_save(tensors, checkpoint_id=partial, process_group=group, no_dist=alone)
        assert isinstance(written, Future), "async_save returns the writer thread's future"
        return Saving(folder, extra or {}, written, None)
    try:
        with torch.no_grad():
            dcp.save(tensors, checkpoint_id=partial, no_dist=alone)
    except (CheckpointException, OSError, RuntimeError) as failed:
        error = message_of(failed)
    return Saving(folder, extra or {}, None, error)


def flat_trees(
    params: tree.Nested, state: tree.Nested | None, optimizer_state: tree.Nested | None, average: tree.Nested | None
) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by their names in it: `params.h.0.weight`, `optimizer.exp_avg.h.0.weight`.

    Raises:
        AutofuncError: for a leaf that is not a tensor.
    """
    found: dict[str, Tensor] = {}
    for prefix, given in ((PARAMS, params), (STATE, state), (OPTIMIZER, optimizer_state), (AVERAGE, average)):
        for path, leaf in tree.flatten(given if given is not None else {}).items():
            if not isinstance(leaf, Tensor):
                raise AutofuncError(f"{prefix}: {path!r} is a {type(leaf).__name__}; expected a tensor")
            found[f"{prefix}.{path}"] = leaf.detach()
    return found


def with_cuts(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Cut | None]]:
    """Return each tensor of a checkpoint with its cut, for fused weights and their slots, or None."""
    found: dict[str, tuple[Tensor, Cut | None]] = {}
    params = {name.partition(".")[2] for name in tensors if name.startswith(f"{PARAMS}.")}
    for name, leaf in tensors.items():
        kind, _, rest = name.partition(".")
        path = path_of_slot(rest, dict.fromkeys(params, leaf)) if kind == OPTIMIZER else rest
        found[name] = leaf, None if path is None else fused_cut(leaf, path)
    return found


def hush() -> None:
    """Silence torch's warning about a missing process group, raised even with `no_dist=True`, also in its threads."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def message_of(error: BaseException | None) -> str | None:
    """Return the first rank's error in brief: torch raises a table of all ranks' errors with tracebacks."""
    if isinstance(error, CheckpointException):
        rank, (first, _) = min(error.failures.items())
        return in_brief(first) + (f" (rank {rank})" if dist.is_initialized() else "")
    return None if error is None else in_brief(error)


def is_first() -> bool:
    """Return whether this is the first process, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def of_first(value: Any) -> Any:
    """Return the first process's value, on every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _of_all(value: Any) -> list[Any]:
    """Return every process's value, in rank order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
