"""Finding where a step first becomes non-finite: rank, action, layer, and forward, input gradient or weight gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autofunc import tree
from autofunc.engine import Microbatch
from autofunc.engine.layerwise import all_finite, any_of, first_not_finite
from autofunc.errors import NotFiniteError
from autofunc.mesh import AXES, axis_group
from autofunc.runtime.executor import RankStep
from autofunc.runtime.ops import Backward, BackwardInput, BackwardWeight, Forward, Op
from autofunc.runtime.place import add_place
from autofunc.runtime.plan import Plan
from autofunc.runtime.program import Program
from autofunc.runtime.transport import Ticket
from autofunc.splitting import StageContext

_Given = tuple[list[Tensor], list[Tensor]]  # inputs, and the state before


class FiniteCheck:
    """Ends a step at this rank's first action with non-finite results.

    For debugging only: every action waits for the device, and stages keep their inputs until their backward. Ranks that
    exchange values within a stage tell each other after every action, and look for the layer together.

    Args:
        contexts: by local stage.
    """

    def __init__(self, contexts: Mapping[int, StageContext]) -> None:
        self._contexts = contexts
        self._given: dict[tuple[int, int], _Given] = {}
        self._cotangents: list[Tensor] = []
        self._is_over = False  # this rank, or one that it exchanges values with, has found something

    def before(self, op: Op, step: RankStep, registers: list[Any]) -> None:
        """See `Observer.before`."""
        if self._is_over:
            return
        if isinstance(op, Forward):
            state = [leaf.clone() for leaf in step.state(op.stage, op.microbatch)]
            self._given[op.stage, op.microbatch] = (_copies(registers, op.reads), state)
        elif isinstance(op, (Backward, BackwardInput)):
            self._cotangents = _copies(registers, op.reads)

    def after(self, op: Op, step: RankStep, registers: list[Any], sends: list[Ticket | None]) -> None:
        """See `Observer.after`.

        Raises:
            NotFiniteError: naming the layer.
        """
        if self._is_over or not isinstance(op, (Forward, Backward, BackwardInput, BackwardWeight)):
            return
        bad = self._bad_results(op, step, registers)
        if not any_of(self._contexts[op.stage], bad is not None):
            return
        self._is_over = True
        if isinstance(op, BackwardWeight):  # its inputs are no longer known
            found, which = None, "weight gradient"
        else:
            found, which = self._found(op, step), "forward" if isinstance(op, Forward) else "backward"
        if found or (found is None and bad is not None):
            raise NotFiniteError(f"{which}: {found or bad}{_of_batch(step.microbatches[op.microbatch])}")

    def _bad_results(
        self, op: Forward | Backward | BackwardInput | BackwardWeight, step: RankStep, registers: list[Any]
    ) -> str | None:
        """What is not finite of an action's results, in words; None if everything is."""
        made = [] if isinstance(op, BackwardWeight) else [leaf for register in op.writes for leaf in registers[register]]
        if isinstance(op, Forward):
            produced = step.produced.get(op.microbatch) if not op.writes else None
            if produced is not None:
                made = [leaf for leaf in (produced.sum, *produced.outputs) if leaf is not None]
        if not all_finite(made):
            return "the stage's results are not finite"
        sums = None if isinstance(op, Forward) else step.accumulators[op.stage].held
        paths = step.stages[op.stage].trainable_holders
        bad = [path for path, total in zip(paths, sums, strict=True) if not all_finite([total])] if sums else []
        return f"the gradient of {bad[0]!r} is not finite" if bad else None

    def _found(self, op: Forward | Backward | BackwardInput, step: RankStep) -> str | None:
        """See `first_not_finite`."""
        context, (inputs, state) = self._contexts[op.stage], self._given[op.stage, op.microbatch]
        if context.setting.partitioning.over_tp:
            return None  # rerunning this layer would need the other tp ranks
        leaves = [leaf.detach() for leaf in step.parameters.leaves(step.stages[op.stage])]
        cotangents = None if isinstance(op, Forward) else self._cotangents
        return first_not_finite(context, leaves, state, inputs, step.microbatches[op.microbatch], cotangents)


class FiniteNotes:
    """Records the first finding of a `FiniteCheck` on each rank and lets the step continue, as other ranks wait for it."""

    def __init__(self) -> None:
        self.found: dict[int, NotFiniteError] = {}  # by local rank
        self._checks: dict[int, FiniteCheck] = {}

    def __call__(self, plan: Plan, program: Program, microbatches: Sequence[Microbatch]) -> list[FiniteNotes]:
        """See `step.Observe`."""
        self._checks[program.rank] = FiniteCheck(plan.contexts)
        return [self]

    def before(self, op: Op, step: RankStep, registers: list[Any]) -> None:
        """See `Observer.before`."""
        if step.program.rank not in self.found:
            self._checks[step.program.rank].before(op, step, registers)

    def after(self, op: Op, step: RankStep, registers: list[Any], sends: list[Ticket | None]) -> None:
        """See `Observer.after`."""
        rank = step.program.rank
        if rank not in self.found:
            try:
                self._checks[rank].after(op, step, registers, sends)
            except NotFiniteError as error:
                add_place(error, step, op)
                self.found[rank] = error


def raise_first(found: Iterable[NotFiniteError], mesh: DeviceMesh | None) -> None:
    """Raise the first finding of all processes. They all call it, and all raise the same error or none.

    Args:
        found: by this process.
        mesh: of the pipeline.

    Raises:
        NotFiniteError: if there is a finding.
    """
    first = min(found, key=_order, default=None)
    for axis in AXES:
        group = axis_group(mesh, axis)
        if group is not None:
            each: list[NotFiniteError | None] = [None] * group.size()
            dist.all_gather_object(each, first, group=group)
            first = min((error for error in each if error is not None), key=_order, default=None)
    if first is not None:
        raise first


def _order(error: NotFiniteError) -> tuple[int, ...]:
    """Return a sort key: parameters, forwards, backwards; then by microbatch, then in the order it passes the stages."""
    if error.action is None or error.stage is None:
        return (0,)
    is_forward = "F" in error.action
    return (1 if is_forward else 2, error.microbatch or 0, error.stage if is_forward else -error.stage)


def finite_check(plan: Plan, program: Program, microbatches: Sequence[Microbatch]) -> list[FiniteCheck]:
    """See `step.Observe`."""
    return [FiniteCheck(plan.contexts)]


def unfit_parameters(params: Mapping[str, Tensor]) -> list[NotFiniteError]:
    """Return the error of the first non-finite parameter, if any: then the step before is to blame."""
    for path, leaf in params.items():
        if not all_finite([leaf]):
            count = int((~torch.isfinite(leaf)).sum())
            return [
                NotFiniteError(
                    f"parameter {path!r} is not finite before the step ({count} of {leaf.numel()} elements), "
                    "because of the last update: try a lower learning rate, or clip gradients"
                )
            ]
    return []


def _copies(registers: list[Any], numbers: Sequence[int]) -> list[Tensor]:
    return [tensor.clone() for number in numbers for tensor in registers[number]]


def _of_batch(microbatch: Microbatch) -> str:
    for name, value in microbatch.entries.items():
        if not all_finite(leaf for leaf in tree.leaves_and_spec(value)[0] if isinstance(leaf, Tensor)):
            return f"; entry {name!r} of the batch is not finite"
    return ""
