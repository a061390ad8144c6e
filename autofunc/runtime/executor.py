"""Run a program: one rank's step, as a coroutine that yields while it waits.

With the distributed transport it never yields, because waiting blocks. With the in-memory transport every rank of the
pipeline is such a coroutine, and `run_together` alternates between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from autofunc.batch import COUNTS
from autofunc.engine import Microbatch, Overlapped, Produced, StageFunctions
from autofunc.errors import AutofuncError, PipelineRunError, full_message
from autofunc.runtime.accumulate import Accumulator
from autofunc.runtime.ops import (
    READERS,
    Backward,
    BackwardInput,
    BackwardWeight,
    Forward,
    Gather,
    Op,
    Receive,
    Reduce,
    Release,
    Send,
)
from autofunc.runtime.place import add_place, marked, named, place_of
from autofunc.runtime.program import Program
from autofunc.runtime.transport import MemoryHub, Port, Ticket
from autofunc.shard.reduce import Reduction
from autofunc.shard.step_parameters import StepParameters
from autofunc.splitting import Stage


class Observer(Protocol):
    """Observes a rank's ops, for measuring and tracing. Steps without observers pay nothing."""

    def before(self, op: Op, step: RankStep, registers: list[Any]) -> None:
        """Called before an op begins, once all that it reads has arrived. Arguments: see `after`."""
        ...

    def after(self, op: Op, step: RankStep, registers: list[Any], sends: list[Ticket | None]) -> None:
        """Called when an op is done; for a send or receive, when it is posted.

        Args:
            op: the op; `op.position` is its place in the lowered row.
            step: the step it belongs to.
            registers: current contents: None, a list of tensors, residuals, or the ticket of a receive. Do not keep them.
            sends: by number, the sends not known to be complete; None for the others.
        """
        ...


class TurnObserver:
    """Base of an `Observer` that also sees the turns of two interleaved ops."""

    def turn(self, op: Op, waits: bool) -> None:
        """Called when an op continues, or waits for other ranks; after `before` of both ops, and before `after` of both."""
        raise NotImplementedError


@dataclass
class RankStep:
    """One rank's step: its inputs, and the outputs it fills in."""

    program: Program
    functions: Mapping[int, StageFunctions]  # by stage
    stages: Mapping[int, Stage]  # of this rank
    parameters: StepParameters
    reduction: Reduction
    accumulators: Mapping[int, Accumulator]  # by stage
    microbatches: Sequence[Microbatch]
    ports: Sequence[Port]  # by number of the channel
    slots: Sequence[Tensor]
    number: int  # the number of this call, for messages
    states: dict[tuple[int, int], Sequence[Tensor]] = field(default_factory=dict)  # by stage and lane
    apart: bool = False  # each microbatch has its own state, in its own lane; else all pass on lane 0's
    observers: Sequence[Observer] = ()
    lasting: bool = False  # the next step uses the memory of its sums
    pairs: Mapping[tuple[int, int], Overlapped] = field(default_factory=dict)  # see `Plan.pairs`
    produced: dict[int, Produced] = field(default_factory=dict)  # results of the last stage, by microbatch

    def state(self, stage: int, microbatch: int) -> Sequence[Tensor]:
        """Return a stage's state before a microbatch."""
        return self.states.get((stage, microbatch if self.apart else 0), ())

    def keep(self, stage: int, microbatch: int, after: Sequence[Tensor]) -> None:
        """Set a stage's state after a microbatch."""
        self.states[stage, microbatch if self.apart else 0] = after


def run_rank(step: RankStep) -> Iterator[None]:
    """Run a rank's ops in order. Yield each time it has to wait.

    Raises:
        PipelineRunError: if an op fails; carries rank, step, action and the grid with the action marked.
        AutofuncError: if an op raises one, which then gets a note with the same information.
    """
    machine, observers = _Machine(step), step.observers
    registers, sends = machine.registers, machine.sends
    run: dict[type[Op], Callable[[Any], None]] = {
        Forward: machine.forward,
        Backward: machine.backward,
        BackwardInput: machine.backward_input,
        BackwardWeight: machine.backward_weight,
        Send: machine.send,
        Receive: machine.receive,
        Gather: machine.gather,
        Release: machine.release,
        Reduce: machine.reduce,
    }
    ops = iter(step.program.ops)
    try:
        for op in ops:
            together = (op, next(ops)) if step.pairs and isinstance(op, Forward) and op.beside else (op,)
            for machine.at in together:
                if isinstance(machine.at, READERS):
                    yield from machine.arrive(machine.at)
            for each in together:
                for observer in observers:
                    observer.before(each, step, registers)
            if len(together) == 1:
                run[type(op)](op)
            else:
                machine.interleaved(*together)  # type: ignore[arg-type]
            for each in together:
                for observer in observers:
                    observer.after(each, step, registers, sends)
        for left in sends:
            if left is not None:
                left.settle()
    except AutofuncError as error:
        add_place(error, step, machine.at)
        raise
    except Exception as error:
        place = place_of(step, machine.at)
        message = f"{named(place)}: {type(error).__name__}: {full_message(error)}{marked(step, machine.at)}"
        raise PipelineRunError(message, **place) from error


class _Machine:
    """The registers and sends of one rank's step, and what each kind of op does to them."""

    def __init__(self, step: RankStep) -> None:
        program = step.program
        self.registers: list[Any] = [None] * program.num_registers
        self.sends: list[Ticket | None] = [None] * program.num_sends
        self.at: Op | None = None  # the op that runs, or is waited for
        self._ports, self._slots = step.ports, step.slots
        self._functions, self._sums = step.functions, step.accumulators
        self._stages, self._parameters, self._reduction = step.stages, step.parameters, step.reduction
        self._bound: dict[int, Any] = {}  # by stage: results of `StageFunctions.bind`, until released
        self._turn_observers = [observer for observer in step.observers if isinstance(observer, TurnObserver)]
        self._microbatches, self._produced, self._step = step.microbatches, step.produced, step
        self._last_stage = program.schedule.num_stages - 1

    def arrive(self, op: Forward | Backward | BackwardInput) -> Iterator[None]:
        """Wait for all that an op reads."""
        for register in op.waits:
            ticket = self.registers[register]
            while not ticket.arrived():
                yield
            self.registers[register] = ticket.tensors
        for number in op.settles:
            self.sends[number].settle()  # type: ignore[union-attr]
            self.sends[number] = None

    # --- computations

    def forward(self, op: Forward) -> None:
        """Run a forward. Each layer waits for its own parameters."""
        stage = op.stage
        functions, bound, given = self._functions[stage], self._bind(stage), self._take(op.reads)
        state, microbatch = self._step.state(stage, op.microbatch), self._microbatches[op.microbatch]
        if op.keeps is None:
            produced = functions.evaluate(bound, state, given, microbatch)
            if self._step.apart:
                self._step.keep(stage, op.microbatch, produced.state)
            self._pass_on(op, produced)
        else:
            self._made(op, state, *functions.forward(bound, state, given, microbatch))

    def _made(self, op: Forward, before: Sequence[Tensor], produced: Produced, kept: Any) -> None:
        assert op.keeps is not None, "a forward with a backward"
        self.registers[op.keeps] = kept
        after = _kept(before, produced.state, self._microbatches[op.microbatch])
        self._step.keep(op.stage, op.microbatch, after)
        self._pass_on(op, produced)

    def _pass_on(self, op: Forward, produced: Produced) -> None:
        if op.stage == self._last_stage:
            self._produced[op.microbatch] = produced
        else:
            self._put(op.writes, produced.outputs)

    def backward(self, op: Backward) -> None:
        self._wait_for_parameters(op.stage)
        functions, residuals, given = self._functions[op.stage], self._take_one(op.residuals), self._take(op.reads)
        self._put(op.writes, functions.backward(residuals, given, self._sums[op.stage]))

    def interleaved(self, first: Forward, second: Backward) -> None:
        """Run both, interleaved. Neither reads what the other writes."""
        bound, given = self._bind(first.stage), self._take(first.reads)
        state = self._step.state(first.stage, first.microbatch)
        self._wait_for_parameters(second.stage)
        residuals, cotangents = self._take_one(second.residuals), self._take(second.reads)

        def on_turn(turn: int, waits: bool) -> None:
            self.at = op = (first, second)[turn]
            for observer in self._turn_observers:
                observer.turn(op, waits)

        made, grads = self._step.pairs[first.stage, second.stage](
            (bound, state, given, self._microbatches[first.microbatch]),
            (residuals, cotangents, self._sums[second.stage]),
            on_turn,
        )
        self._made(first, state, *made)
        self._put(second.writes, grads)

    def backward_input(self, op: BackwardInput) -> None:
        self._wait_for_parameters(op.stage)
        functions, residuals, given = self._functions[op.stage], self._take_one(op.residuals), self._take(op.reads)
        cotangents, self.registers[op.keeps] = functions.backward_input(residuals, given, self._sums[op.stage])
        self._put(op.writes, cotangents)

    def backward_weight(self, op: BackwardWeight) -> None:
        self._wait_for_parameters(op.stage)
        self._functions[op.stage].backward_weight(self._take_one(op.residuals), self._sums[op.stage])

    def _take_one(self, register: int) -> Any:
        """Take what a register holds and empty it, so that its last user can free it."""
        value, self.registers[register] = self.registers[register], None
        return value

    def _take(self, registers: Sequence[int]) -> list[Tensor]:
        """Take the tensors of some registers, concatenated."""
        if len(registers) == 1:
            return self._take_one(registers[0])  # type: ignore[no-any-return]
        return [tensor for register in registers for tensor in self._take_one(register)]

    def _put(self, registers: Sequence[int], tensors: list[Tensor]) -> None:
        """Fill some registers with the same tensors. Each reader takes over its register's list."""
        for register in registers:
            self.registers[register] = tensors if len(registers) == 1 else list(tensors)

    # --- transfers

    def send(self, op: Send) -> None:
        self.sends[op.number] = self._ports[op.channel].send(self._take_one(op.register))

    def receive(self, op: Receive) -> None:
        self.registers[op.register] = self._ports[op.channel].receive([self._slots[slot] for slot in op.slots])

    # --- a stage's parameters

    def gather(self, op: Gather) -> None:
        self._parameters.gather(op.stage)

    def release(self, op: Release) -> None:
        self._bound.pop(op.stage, None)
        self._parameters.release(op.stage)

    def reduce(self, op: Reduce) -> None:
        layers = self._stages[op.stage].by_layer(self._sums[op.stage].take())
        layers.reverse()
        while layers:  # free a layer's sums before the next is copied
            self._reduction.post(layers.pop())

    def _bind(self, stage: int) -> Any:
        """Bind a stage's parameters, which may still be in transit."""
        if stage not in self._bound:
            leaves = self._parameters.leaves(self._stages[stage])
            self._bound[stage] = self._functions[stage].bind(leaves, self._parameters.ready(stage))
        return self._bound[stage]

    def _wait_for_parameters(self, stage: int) -> None:
        """Wait for all parameters of a backward; they are already there unless released since the forward."""
        if stage not in self._bound:
            self._bind(stage)
            self._parameters.arrive(stage)


def run_together(ranks: Sequence[Iterator[None]], hub: MemoryHub) -> None:
    """Alternate between coroutines until all have finished.

    Raises:
        PipelineRunError: if all remaining ones wait for each other.
    """
    waiting = list(ranks)
    while waiting:
        delivered, count = hub.delivered, len(waiting)
        waiting = [rank for rank in waiting if next(rank, _FINISHED) is not _FINISHED]
        if waiting and len(waiting) == count and hub.delivered == delivered:
            raise PipelineRunError(f"{count} ranks wait for each other: the program does not match the schedule")


_FINISHED = object()


def _kept(before: Sequence[Tensor], after: Sequence[Tensor], microbatch: Microbatch) -> Sequence[Tensor]:
    """Return a stage's state after a microbatch; unchanged if all of its rows are padding."""
    counts = microbatch.entries.get(COUNTS)
    if counts is None or not after:
        return after
    is_real = (counts != 0).any()
    return [torch.where(is_real, new, old) for old, new in zip(before, after, strict=True)]
