"""Run a program: one rank's step, as a coroutine that yields while it waits.

With the distributed transport it never yields, because waiting blocks. With the in-memory transport every rank of the
pipeline is such a coroutine, and `run_together` takes turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autofunc.engine import Produced, StageFunctions
from autofunc.errors import AutofuncError, PipelineRunError
from autofunc.runtime.accumulate import Accumulator
from autofunc.runtime.program import Op, Program
from autofunc.runtime.transport import MemoryHub, Transport
from autofunc.schedule import Kind, grid


class Clock:
    """When each op of a rank started and ended, in seconds of one clock: waiting for its operands comes before."""

    def __init__(self, num_ops: int, device: torch.device) -> None:
        self.start, self.end = [0.0] * num_ops, [0.0] * num_ops
        self._synchronize = torch.accelerator.synchronize if device.type != "cpu" else None

    def now(self) -> float:
        """The time when all that was started is done."""
        if self._synchronize is not None:
            self._synchronize()
        return time.perf_counter()


@dataclass
class RankStep:
    """One rank's step: what goes in, and what comes out."""

    program: Program
    functions: Mapping[int, StageFunctions]  # by stage
    bound: Mapping[int, Any]  # by stage: what `StageFunctions.bind` made
    microbatches: Sequence[Mapping[str, Any]]
    transport: Transport
    number: int  # of this call, for messages
    trace: bool = False
    clock: Clock | None = None  # of a profiled step
    accumulators: dict[int, Accumulator] = field(default_factory=dict)  # by stage
    produced: dict[int, Produced] = field(default_factory=dict)  # by microbatch: what the last stage made


def run_rank(step: RankStep) -> Iterator[None]:
    """Run a rank's ops in order. Yields each time it has to wait.

    Raises:
        PipelineRunError: when an op fails; carries rank, step, action and the grid with the action marked.
    """
    registers: list[Any] = [None] * step.program.num_registers
    sends: list[Any] = [None] * step.program.num_sends
    transport = step.transport
    for op in step.program.ops:
        try:
            for register in op.waits:
                while not transport.arrived(registers[register]):
                    yield
                registers[register] = transport.take(registers[register])
            for send in op.settles:
                transport.settle(sends[send])
                sends[send] = None
            if step.clock is not None:
                step.clock.start[op.position] = step.clock.now()
            operands = [registers[register] for register in op.reads]
            for register in op.reads:
                registers[register] = None
            if op.kind.is_receive:
                assert op.channel is not None
                results: Sequence[Any] = (transport.receive(op.channel),)
            elif op.kind.is_send:
                assert op.channel is not None
                sends[op.send] = transport.send(op.channel, operands[0])
                results = ()
            else:
                results = _compute(step, op, operands)
            for register, result in zip(op.writes, results, strict=True):
                registers[register] = result
            if step.clock is not None:
                step.clock.end[op.position] = step.clock.now()
            if step.trace:
                _print_trace(step, op, results)
            del operands, results
        except AutofuncError as error:
            raise type(error)(_where(step, op, str(error))) from error
        except Exception as error:
            raise PipelineRunError(_where(step, op, f"{type(error).__name__}: {error}")) from error
    for ticket in sends:
        if ticket is not None:
            transport.settle(ticket)


def _compute(step: RankStep, op: Op, operands: list[Any]) -> Sequence[Any]:
    """Run F, B, I or W; returns what goes into `op.writes`, in order."""
    functions = step.functions[op.stage]
    if op.kind is Kind.F:
        inputs = [tensor for operand in operands for tensor in operand]
        operands.clear()
        bound, microbatch = step.bound[op.stage], step.microbatches[op.microbatch]
        is_last = op.stage == step.program.schedule.num_stages - 1
        kept: tuple[Any, ...] = ()
        if step.program.schedule.is_forward_only:
            produced = functions.evaluate(bound, inputs, microbatch)
        else:
            produced, residuals = functions.forward(bound, inputs, microbatch)
            kept = (residuals,)
        if is_last:
            step.produced[op.microbatch] = produced
            return kept
        return (*[produced.outputs] * (len(op.writes) - len(kept)), *kept)
    sums = step.accumulators[op.stage]
    residuals = operands[0]
    received = [tensor for cotangent in operands[1:] for tensor in cotangent]
    operands.clear()  # what is not held here can be freed by the function at its last use
    if op.kind is Kind.W:
        functions.backward_weight(residuals, sums)
        return ()
    if op.kind is Kind.I:
        sent_back, weight_residuals = functions.backward_input(residuals, received, sums)
        return (*[sent_back] * (len(op.writes) - 1), weight_residuals)
    return [functions.backward(residuals, received, sums)] * len(op.writes)


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


def _where(step: RankStep, op: Op, message: str) -> str:
    schedule, rank = step.program.schedule, step.program.rank
    action = schedule[rank][op.position]
    return (
        f"rank {rank}, step {step.number}, action {action} (stage {op.stage}, microbatch {op.microbatch}): {message}\n"
        + grid(schedule, (rank, op.position))
    )


def _print_trace(step: RankStep, op: Op, results: Sequence[Any]) -> None:
    if op.channel is not None:
        shapes: Sequence[Any] = op.channel.shapes
    else:
        lists = (result for result in results if isinstance(result, list))
        shapes = [tuple(leaf.shape) for result in lists for leaf in result if isinstance(leaf, Tensor)]
    action = step.program.schedule[step.program.rank][op.position]
    sys.stderr.write(f"autofunc: rank {step.program.rank} step {step.number} {action} {' '.join(map(str, shapes))}\n")
