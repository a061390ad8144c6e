"""The plans of a pipeline, one per batch signature seen, with the connections they need."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autofunc.batch import Microbatch, check_device, shapes_of, signature
from autofunc.errors import some_of
from autofunc.outside import Outside
from autofunc.runtime.agree import agree
from autofunc.runtime.heap import keep_freed_memory
from autofunc.runtime.pair_groups import Transfers
from autofunc.runtime.plan import Blueprint, Mode, Plan, build_plan
from autofunc.runtime.position import here
from autofunc.runtime.transport import DistributedTransport
from autofunc.surroundings import surroundings
from autofunc.timing import clock

_MANY_CHANGES = 3  # of values read from outside, after which a warning explains where changing numbers belong
_MOST_PLANS = 64  # batch signatures a pipeline remembers; beyond that the oldest is forgotten
_MOST_NODES = 100_000  # in the graphs of all plans: half a GB


class Plans:
    """Plans, built on demand.

    Args:
        blueprint: of the pipeline.
        group: of the pp axis; None if all pp ranks are in this process.
        ranks: global ranks along it, by pp rank.
        transfers: options of the transfers.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        group: dist.ProcessGroup | None,
        ranks: Sequence[int] | None,
        transfers: Transfers,
    ) -> None:
        self._blueprint, self._group, self._ranks, self._transfers = blueprint, group, ranks, transfers
        self._built: dict[Any, tuple[Plan, DistributedTransport | None]] = {}
        self._outside = Outside(self._frozen)

    def __len__(self) -> int:
        return len(self._built)

    def __iter__(self) -> Iterator[Plan]:
        """Iterate over the plans, oldest first."""
        return (plan for plan, _ in self._built.values())

    def of(
        self, mode: Mode, params: Mapping[str, Tensor], device: torch.device, microbatches: Sequence[Microbatch]
    ) -> tuple[Plan, DistributedTransport | None]:
        """Return the plan of a step and the transport to other processes (None without any). All pp ranks call it alike.

        Raises:
            BatchError: if ranks' batches differ, or the batch is not on the device.
            ModelError: if parameters are missing, or a stage cannot be captured.
            PeerLostError: if another rank does not prepare the same step.
        """
        parameters = self._blueprint.parameters
        described = tuple(
            (path, leaf.shape, leaf.dtype, leaf.stride(), parameters.lies_right(leaf))
            for path, leaf in sorted(params.items())
        )
        around = (mode, len(microbatches), signature(microbatches[0]), described, device, surroundings())
        key = (around, self._outside.key())
        if key not in self._built:
            self._warn_of_changes(around)
            parameters.check(params)
            check_device(microbatches[0], device)
            made = self._make(mode, params, device, microbatches)
            self._outside.renew()  # the new capture may read more from outside, and fill a list
            key = (around, self._outside.key())
            self._built[key] = made
        return self._built[key]

    def close(self) -> None:
        """Free all plans, their memory, and connections without other users. All pp ranks call it."""
        for _, transport in self._built.values():
            if transport is not None:
                transport.close()
        self._built.clear()
        for pool in self._blueprint.pools.values():
            pool.clear()
        self._blueprint.graph_memory.clear()

    def _make(
        self, mode: Mode, params: Mapping[str, Tensor], device: torch.device, microbatches: Sequence[Microbatch]
    ) -> tuple[Plan, DistributedTransport | None]:
        dtypes = {path: leaf.dtype for path, leaf in params.items()}
        held = [plan.num_nodes for plan in self]
        if self._group is not None:
            here.enter(f"preparing a step with {shapes_of(microbatches[0])}")
            dtypes, held = agree(self._group, mode.value, microbatches, dtypes, held)
        self._forget(held)
        of_all_ranks = {path: torch.empty((), dtype=dtype, device="meta") for path, dtype in dtypes.items()}
        of_all_ranks |= self._blueprint.parameters.laid_out(params)
        if device.type == "cpu":
            keep_freed_memory()
        with here.building():
            plan = build_plan(self._blueprint, mode, of_all_ranks, device, microbatches)
        clock.done("capturing the stages")
        if self._group is None or self._ranks is None:
            return plan, None
        return plan, DistributedTransport(self._group, self._ranks, plan.device, plan.channels, self._transfers)

    def _forget(self, held: Sequence[int]) -> None:
        """Make room for another plan.

        Args:
            held: number of graph nodes in each plan, oldest first; the same on all ranks.
        """
        for number in range(len(held)):
            if number > len(held) - _MOST_PLANS and sum(held[number:]) <= _MOST_NODES:
                break
            self._built.pop(next(iter(self._built)))

    def _frozen(self) -> list[Any]:
        """Return what captures of this pipeline read besides their arguments; the eager engine has no captures."""
        blueprint = self._blueprint
        if blueprint.options.engine != "graph":
            return [*blueprint.stages[0].model.frozen]
        model = blueprint.stages[0].model
        return [*model.frozen, *(layer.apply for layer in model.layers.values()), blueprint.loss]

    def _warn_of_changes(self, around: Any) -> None:
        """Warn of changing outside values that keep rebuilding plans for known batches."""
        known, changed = sum(each == around for each, _ in self._built), self._outside.changed
        if known == _MANY_CHANGES and changed:
            warnings.warn(
                f"{some_of(changed)} changed between steps, and each change recaptures the pipeline ({known} times so "
                "far): put changing numbers into the batch, as zero-dim tensors",
                stacklevel=2,
            )
