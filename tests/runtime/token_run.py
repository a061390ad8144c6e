"""A schedule run on tokens, through the real program, executor and transport.

Whatever a stage is given must be what it should be; the bytes held after each action must be what `live_bytes` says; a slot
may not be read once it was given away; sums are in microbatch order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from autofunc.engine import Microbatch, Produced
from autofunc.runtime.executor import RankStep, run_rank, run_together
from autofunc.runtime.program import Program, build_program, message_layouts
from autofunc.runtime.transport import MemoryHub, MemoryTransport, Transport
from autofunc.schedule import Edge, Kind, Schedule, StageBytes, live_bytes, lower, settled_sends
from autofunc.splitting import Boundaries, Boundary, Value
from tests.runtime.tokens import Ledger, Residuals, Slot, Sums, Token, TokenPort, expect


@dataclass
class Parameters:
    """Which stages have their parameters: all, or those that are gathered."""

    by_action: bool
    gathered: set[int] = field(default_factory=set)

    def gather(self, stage: int) -> None:
        """See `StepParameters.gather`."""
        assert stage not in self.gathered, f"stage {stage} is gathered twice"
        self.gathered.add(stage)

    def release(self, stage: int) -> None:
        """See `StepParameters.release`."""
        self.gathered.remove(stage)

    def leaves(self, stage: Layers) -> Layers:
        """See `StepParameters.leaves`."""
        assert not self.by_action or stage.index in self.gathered, f"stage {stage.index} has no parameters"
        return stage

    def ready(self, stage: int) -> None:
        """See `StepParameters.ready`: nothing to wait for."""

    def arrive(self, stage: int) -> None:
        """See `StepParameters.arrive`."""


@dataclass(frozen=True)
class Layers:
    """In place of a stage: what the executor asks of it."""

    index: int

    def by_layer(self, sums: list[list[int]]) -> list[tuple[int, list[list[int]]]]:
        """One layer, with all sums."""
        return [(self.index, sums)]


class Reduction:
    """In place of the sum over data parallel ranks: takes a stage's sums once."""

    def __init__(self) -> None:
        self.posted: dict[int, list[list[int]]] = {}

    def post(self, sums: tuple[int, list[list[int]]]) -> None:
        """See `Reduction.post`."""
        assert sums[0] not in self.posted, f"the sums of stage {sums[0]} are reduced twice"
        self.posted[sums[0]] = [list(terms) for terms in sums[1]]


class TokenStage:
    """The functions of a stage (`StageFunctions`): checks what it is given, and makes what it should.

    Args:
        index: of the stage.
        boundaries: of all stages.
        keeps: what it holds between its functions.
        ledger: of its rank.
        parameters: of its rank.
    """

    exact_bytes = True
    constants = terms = ()

    def __init__(
        self, index: int, boundaries: Boundaries, keeps: StageBytes, ledger: Ledger, parameters: Parameters
    ) -> None:
        self.index, self.bytes, self._ledger, self._parameters = index, keeps, ledger, parameters
        self._received = boundaries.stages[index - 1].values if index else ()
        self._returned = boundaries.stages[index].values

    def bind(self, leaves: Layers, ready: None) -> Layers:
        """See `StageFunctions.bind`."""
        expect(leaves.index, self.index, "stage whose parameters are bound")
        return leaves

    def evaluate(self, bound: Layers, state: Any, inputs: list[Any], microbatch: Microbatch) -> Produced:
        """See `StageFunctions.evaluate`."""
        produced, _ = self._forward(bound, inputs, microbatch)
        return produced

    def forward(self, bound: Layers, state: Any, inputs: list[Any], microbatch: Microbatch) -> tuple[Produced, Residuals]:
        """See `StageFunctions.forward`."""
        received = list(inputs)
        produced, number = self._forward(bound, inputs, microbatch)
        kept = [received[i] for i in self.bytes.kept_inputs] + [produced.outputs[i] for i in self.bytes.kept_outputs]
        return produced, Residuals(self._ledger, self.bytes.residuals, ("F", self.index), number, kept)

    def _forward(self, bound: Layers, inputs: list[Any], microbatch: Microbatch) -> tuple[Produced, int]:
        expect(bound.index, self.index, "parameters of a forward")
        number = microbatch.entries["number"]
        self._check_parameters(Kind.F, number)
        self._take(inputs, "activation", self.index - 1, len(self._received), number)
        made: list[Any] = [
            Token(self._ledger, value, ("activation", self.index, place, number))
            for place, value in enumerate(self._returned)
        ]
        return Produced(made), number

    def backward(self, residuals: Residuals, cotangents: list[Any], sums: Sums) -> list[Token]:
        """See `StageFunctions.backward`."""
        number = self._begin(Kind.B, residuals, cotangents)
        sums.add([number, number])
        return self._sent_back(number)

    def backward_input(self, residuals: Residuals, cotangents: list[Any], sums: Sums) -> tuple[list[Token], Residuals]:
        """See `StageFunctions.backward_input`."""
        keeps, held, received = self.bytes, residuals.kept, list(cotangents)
        number = self._begin(Kind.I, residuals, cotangents)
        sums.add([number, None])
        back = self._sent_back(number)
        kept = [held[keeps.kept_inputs.index(i)] for i in keeps.weight_inputs]
        kept += [held[len(keeps.kept_inputs) + keeps.kept_outputs.index(i)] for i in keeps.weight_outputs]
        kept += [received[i] for i in keeps.weight_cotangents] + [back[i] for i in keeps.weight_input_grads]
        return back, Residuals(self._ledger, keeps.weight_residuals, ("I", self.index), number, kept)

    def backward_weight(self, weight_residuals: Residuals, sums: Sums) -> None:
        """See `StageFunctions.backward_weight`."""
        number = weight_residuals.open(("I", self.index))
        self._check_parameters(Kind.W, number)
        sums.add([None, number])

    def _begin(self, kind: Kind, residuals: Residuals, cotangents: list[Any]) -> int:
        """Check what B or I is given; returns the microbatch."""
        number = residuals.open(("F", self.index))
        self._check_parameters(kind, number)
        needed = sum(value.needs_grad for value in self._returned)
        self._take(cotangents, "cotangent", self.index, needed, number)
        return number

    def _sent_back(self, microbatch: int) -> list[Token]:
        wanted = [value for value in self._received if value.needs_grad]
        return [
            Token(self._ledger, value, ("cotangent", self.index - 1, place, microbatch))
            for place, value in enumerate(wanted)
        ]

    def _take(self, given: list[Any], what: str, stage: int, count: int, microbatch: int) -> None:
        """Check the values that a function is given, and let go of them."""
        expected = [(what, stage, place, microbatch) for place in range(count)]
        expect([value.name for value in given], expected, f"stage {self.index} is given")
        given.clear()

    def _check_parameters(self, kind: Kind, microbatch: int) -> None:
        """Note that the stage computes, for which it needs its parameters."""
        self._parameters.leaves(Layers(self.index))
        self._ledger.computed.append((kind, self.index, microbatch))


@dataclass(frozen=True)
class World:
    """All that a run of a schedule on tokens is made of."""

    schedule: Schedule  # lowered
    boundaries: Boundaries
    keeps: Mapping[int, StageBytes]  # by stage

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Between stages."""
        return self.boundaries.edges()

    @cached_property
    def settled(self) -> Sequence[Mapping[int, Sequence[int]]]:
        """By rank and position of an action: positions of the sends that it proves complete."""
        return settled_sends(self.schedule, self.edges)

    @cached_property
    def bytes_alive(self) -> Sequence[list[float]]:
        """By rank: after each action. `live_bytes` lowers what has no transfers, which would put I and W together again."""
        memory = [self.keeps[stage] for stage in range(self.schedule.num_stages)]
        alone = not self.schedule.is_lowered and self.schedule != lower(self.schedule, self.edges)
        return [] if alone else [row.tolist() for row in live_bytes(self.schedule, memory, self.edges)]

    def programs(self, settled: Sequence[Mapping[int, Sequence[int]]] | None = None) -> list[Program]:
        """The real programs of all ranks; with other sends settled, if that is asked for."""
        layouts, settled = message_layouts(self.schedule, self.boundaries), settled or self.settled
        return [
            build_program(self.schedule, rank, self.edges, layouts, self.keeps, settled[rank])
            for rank in range(self.schedule.num_ranks)
        ]


def boundaries_of(layouts: Sequence[Sequence[tuple[int, bool]]]) -> Boundaries:
    """Boundaries from (elements, whether it needs a gradient) of each value; the last stage hands nothing on."""
    stages: list[Boundary] = []
    for stage, values in enumerate([*layouts, ()]):
        leaves = tuple(
            Value(f"{place}", (size,), torch.float32, needs_grad, producer=stage)
            for place, (size, needs_grad) in enumerate(values)
        )
        stages.append(Boundary(None, leaves))  # type: ignore[arg-type]  # nothing is put together here
    return Boundaries(tuple(stages), None)


def slots_of(program: Program) -> list[Slot]:
    """Memory for each slot."""
    return [Slot(layout) for layout in program.slots]


def run(
    world: World,
    programs: Sequence[Program],
    *,
    slots: Callable[[Program], list[Slot]] = slots_of,
    stage: type[TokenStage] = TokenStage,
    last_first: bool = False,
    transport: Callable[[MemoryHub, int], Transport] = MemoryTransport,
    together: Callable[[Sequence[Iterator[None]], MemoryHub], None] = run_together,
) -> None:
    """Run programs, one per rank, and check all that can be said of a run.

    Args:
        world: what they were made from.
        programs: by rank.
        slots: makes the slots of a rank.
        stage: the functions of stages.
        last_first: whose turn comes first.
        transport: makes the end of a rank.
        together: runs all ranks.

    Raises:
        AssertionError: about what was left at the end.
        PipelineRunError: about what an op was given.
    """
    lowered = world.schedule
    hub = MemoryHub(lowered.num_ranks)
    steps, ledgers = [], []
    microbatches = [Microbatch({"number": number}, []) for number in range(lowered.num_microbatches)]
    for rank, program in enumerate(programs):
        ledger, parameters = Ledger(lowered, rank), Parameters(lowered.is_sharded)
        mine, end = lowered.stages_of(rank), transport(hub, rank)
        given: dict[str, Any] = {
            "functions": {i: stage(i, world.boundaries, world.keeps[i], ledger, parameters) for i in mine},
            "stages": {index: Layers(index) for index in mine},
            "parameters": parameters,
            "reduction": Reduction(),
            "accumulators": {index: Sums(ledger, world.keeps[index].accumulators) for index in mine},
            "ports": [TokenPort(end.open(channel), ledger) for channel in program.channels],
            "slots": slots(program),
        }
        ledgers.append(ledger)
        steps.append(RankStep(program=program, microbatches=microbatches, number=1, observers=[ledger], **given))
    runs: list[Iterator[None]] = [run_rank(step) for step in steps]
    together(runs[::-1] if last_first else runs, hub)
    num_sends = sum(action.kind.is_send for row in lowered for action in row)
    expect(hub.delivered, num_sends, "messages delivered")
    for rank, (step, ledger) in enumerate(zip(steps, ledgers, strict=True)):
        _check_rank(step, ledger, world.bytes_alive[rank] if world.bytes_alive else None, world.settled[rank])


def _check_rank(
    step: RankStep, ledger: Ledger, bytes_alive: list[float] | None, settled: Mapping[int, Sequence[int]]
) -> None:
    """What must be true of a rank when all is done."""
    row, rank = ledger.schedule[ledger.rank], f"rank {ledger.rank}"
    computed = [(action.kind, action.stage, action.microbatch) for action in row if action.kind.is_compute]
    expect(ledger.computed, computed, f"{rank} computed")
    if bytes_alive is not None:
        expect(ledger.alive_after, bytes_alive, f"{rank} bytes alive after each action")
    expect(Counter(step.program.slots), ledger.most_leased, f"{rank} slots, and how many are in use at once")
    expect(ledger.settled, settled, f"{rank} settled sends, by position")
    open_sends = [record.position for record in ledger.sends if not record.is_settled]
    expect(open_sends, [], f"{rank} sends that were never settled")
    if ledger.schedule.is_forward_only:
        return
    everything = list(range(ledger.schedule.num_microbatches))
    reduced: Any = step.reduction
    for stage, sums in step.accumulators.items():
        expect(sums.take(), [everything, everything], f"sums of stage {stage}")
        if any(action.kind is Kind.REDUCE_GRAD for action in row):
            expect(reduced.posted[stage], [everything, everything], f"reduced sums of stage {stage}")
