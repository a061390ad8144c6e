"""Run a program: one rank's step, as a coroutine that yields while it waits.

With the distributed transport it never yields, because waiting blocks. With the in-memory transport every rank of the
pipeline is such a coroutine, and `run_together` takes turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from autofunc.engine import Microbatch, Produced, StageFunctions
from autofunc.errors import AutofuncError, PipelineRunError
from autofunc.runtime.accumulate import Accumulator
from autofunc.runtime.program import Op, Program
from autofunc.runtime.transport import MemoryHub, Port, Ticket
from autofunc.schedule import Kind, grid
from autofunc.shard.parameters import StepParameters
from autofunc.shard.reduce import Reduction
from autofunc.splitting import Stage


class Observer(Protocol):
    """Looks on while a rank runs: for measuring and tracing. Steps that nobody looks at pay nothing for it."""

    def before(self, op: Op) -> None:
        """All that the op reads is there; it has not begun."""
        ...

    def after(self, op: Op, step: RankStep, registers: list[Any], sends: list[Ticket | None]) -> None:
        """The op is done."""
        ...


@dataclass
class RankStep:
    """One rank's step: what goes in, and what comes out."""

    program: Program
    functions: Mapping[int, StageFunctions]  # by stage
    stages: Mapping[int, Stage]  # those of this rank
    parameters: StepParameters
    reduction: Reduction
    accumulators: Mapping[int, Accumulator]  # by stage
    microbatches: Sequence[Microbatch]
    ports: Sequence[Port]  # by number of the channel
    slots: Sequence[Tensor]
    number: int  # of this call, for messages
    observers: Sequence[Observer] = ()
    produced: dict[int, Produced] = field(default_factory=dict)  # by microbatch: what the last stage made


def run_rank(step: RankStep) -> Iterator[None]:
    """Run a rank's ops in order. Yields each time it has to wait.

    Raises:
        PipelineRunError: when an op fails; carries rank, step, action and the grid with the action marked.
    """
    program = step.program
    registers: list[Any] = [None] * program.num_registers
    sends: list[Ticket | None] = [None] * program.num_sends
    ports, slots, observers = step.ports, step.slots, step.observers
    compute = _Compute(step)
    op = None
    try:
        for op in program.ops:
            kind, stage, microbatch, reads, writes, waits, settles, channel, send, into, _ = op
            for register in waits:
                ticket = registers[register]
                while not ticket.arrived():
                    yield
                registers[register] = ticket.tensors
            for number in settles:
                sends[number].settle()  # type: ignore[union-attr]
                sends[number] = None
            for observer in observers:
                observer.before(op)
            if kind >= Kind.UNSHARD:
                compute.place(kind, stage)
            elif channel < 0:
                compute.run(kind, stage, microbatch, reads, writes, registers)
            elif send < 0:
                registers[writes[0]] = ports[channel].receive([slots[slot] for slot in into])
            else:
                sends[send] = ports[channel].send(registers[reads[0]])
                registers[reads[0]] = None
            for observer in observers:
                observer.after(op, step, registers, sends)
        for left in sends:
            if left is not None:
                left.settle()
    except AutofuncError as error:
        raise type(error)(_where(step, op, str(error))) from error
    except Exception as error:
        raise PipelineRunError(_where(step, op, f"{type(error).__name__}: {error}")) from error


class _Compute:
    """Runs F, B, I and W on registers, and what comes before and after them for a stage's parameters."""

    def __init__(self, step: RankStep) -> None:
        self.functions, self.sums = step.functions, step.accumulators
        self.stages, self.parameters, self.reduction = step.stages, step.parameters, step.reduction
        self.bound: dict[int, Any] = {}  # by stage, while its parameters are there: what `StageFunctions.bind` made
        self.microbatches, self.produced = step.microbatches, step.produced
        self.last_stage = step.program.schedule.num_stages - 1
        self.forward_only = step.program.schedule.is_forward_only

    def place(self, kind: Kind, stage: int) -> None:
        """UNSHARD starts to gather, the first computation waits for it; RESHARD lets go; REDUCE_GRAD starts to add up."""
        if kind is Kind.UNSHARD:
            self.parameters.gather(stage)
        elif kind is Kind.RESHARD:
            self.bound.pop(stage, None)
            self.parameters.release(stage)
        else:
            for sums in self.stages[stage].by_layer(self.sums[stage].take()):
                self.reduction.post(sums)

    def run(
        self, kind: Kind, stage: int, microbatch: int, reads: Sequence[int], writes: Sequence[int], registers: list[Any]
    ) -> None:
        functions = self.functions[stage]
        if stage not in self.bound:
            self.bound[stage] = functions.bind(self.parameters.leaves(self.stages[stage]), self.parameters.ready(stage))
            if kind is not Kind.F:  # a forward waits for each layer's parameters when it comes to the layer
                self.parameters.arrive(stage)
        residuals: Any = None
        given: list[Tensor] = []
        for register in reads:
            value, registers[register] = registers[register], None  # so that its last user can free it
            if type(value) is not list:
                residuals = value
            elif given:
                given += value
            else:
                given = value
        value = None
        if kind is Kind.F:
            if self.forward_only:
                produced = functions.evaluate(self.bound[stage], given, self.microbatches[microbatch])
            else:
                produced, residuals = functions.forward(self.bound[stage], given, self.microbatches[microbatch])
                registers[writes[-1]] = residuals
                writes = writes[:-1]
            if stage == self.last_stage:
                self.produced[microbatch] = produced
                return
            results = produced.outputs
        elif kind is Kind.B:
            results = functions.backward(residuals, given, self.sums[stage])
        elif kind is Kind.I:
            results, weight_residuals = functions.backward_input(residuals, given, self.sums[stage])
            registers[writes[-1]] = weight_residuals
            writes = writes[:-1]
        else:
            functions.backward_weight(residuals, self.sums[stage])
            return
        for register in writes:  # whoever reads it takes the list over
            registers[register] = results if len(writes) == 1 else list(results)


def run_together(ranks: Sequence[Iterator[None]], hub: MemoryHub) -> None:
    """Take turns among coroutines until all have finished.

    Raises:
        PipelineRunError: when all that are left wait for each other.
    """
    waiting = list(ranks)
    while waiting:
        delivered, count = hub.delivered, len(waiting)
        waiting = [rank for rank in waiting if next(rank, _FINISHED) is not _FINISHED]
        if waiting and len(waiting) == count and hub.delivered == delivered:
            raise PipelineRunError(f"{count} ranks wait for each other: the program is not the one the schedule describes")


_FINISHED = object()


def _where(step: RankStep, op: Op | None, message: str) -> str:
    schedule, rank = step.program.schedule, step.program.rank
    if op is None:
        return f"rank {rank}, step {step.number}: {message}"
    action = schedule[rank][op.position]
    return (
        f"rank {rank}, step {step.number}, action {action} (stage {op.stage}, microbatch {op.microbatch}): {message}\n"
        + grid(schedule, (rank, op.position))
    )
