"""What each kind of action reads, writes and frees: the one table that validator, simulator and executor use.

`laws/network.py` applies it to all microbatches of an edge at once.

A token is a value at one stage for one microbatch:

- `Activation(source, target, microbatch)`: what flows forward along an edge, from its producer to its consumer,
- `Cotangent(source, target, microbatch)`: what flows back along it, from its consumer to its producer,
- `BackwardResiduals(stage, microbatch)`: what F keeps for B or I,
- `WeightResiduals(stage, microbatch)`: what I keeps for W.

| kind   | reads                                         | writes                                     | frees        |
|--------|-----------------------------------------------|--------------------------------------------|--------------|
| F      | activations of its inputs                     | activations of outputs, backward residuals | what it read |
| B      | backward residuals, cotangents of its outputs | cotangents of its inputs                   | what it read |
| I      | backward residuals, cotangents of its outputs | cotangents of inputs, weight residuals     | what it read |
| W      | weight residuals                              |                                            | what it read |
| SEND_x | the value of its edge                         | (arrives by the peer's RECV_x)             | what it read |
| RECV_x |                                               | the value of its edge                      |              |

UNSHARD, RESHARD and REDUCE_GRAD act on a stage's parameters and gradients, not on values of a microbatch: see
`laws/residency.py`.

A forward-only schedule keeps no residuals.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from autofunc.errors import ScheduleError
from autofunc.schedule.ir import Action, Kind, Schedule


class Edge(NamedTuple):
    """A connection from a stage to a later one. `needs_grad` is False for integers and constants: nothing flows back."""

    producer: int
    consumer: int
    needs_grad: bool = True


def chain(num_stages: int) -> tuple[Edge, ...]:
    """The edges of a chain model: each stage feeds the next."""
    return tuple(Edge(stage, stage + 1) for stage in range(num_stages - 1))


def check_edges(edges: Sequence[Edge], num_stages: int) -> None:
    """Refuse edges that do not lead from an existing stage to a later one, or are given twice.

    Raises:
        ScheduleError: naming the edge.
    """
    seen = set()
    for edge in edges:
        ends = (edge.producer, edge.consumer)
        if not 0 <= edge.producer < edge.consumer < num_stages:
            raise ScheduleError(f"edge {ends}: expected a stage and a later one, of 0 to {num_stages - 1}")
        if ends in seen:
            raise ScheduleError(f"edge {ends} is given twice")
        seen.add(ends)


class Activation(NamedTuple):
    """What flows forward along an edge for one microbatch: `source` hands it on, `target` reads it."""

    source: int  # stage
    target: int  # stage
    microbatch: int

    def __str__(self) -> str:
        return f"activation of microbatch {self.microbatch} from stage {self.source} to stage {self.target}"


class Cotangent(NamedTuple):
    """What flows back along an edge for one microbatch: `source` makes it in its backward, `target` reads it."""

    source: int  # stage
    target: int  # stage
    microbatch: int

    def __str__(self) -> str:
        return f"cotangent of microbatch {self.microbatch} from stage {self.source} to stage {self.target}"


class BackwardResiduals(NamedTuple):
    """What F keeps for B or I of the same stage and microbatch."""

    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"residuals that {self.stage}F{self.microbatch} keeps"


class WeightResiduals(NamedTuple):
    """What I keeps for W of the same stage and microbatch."""

    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"residuals that {self.stage}I{self.microbatch} keeps"


EdgeToken = Activation | Cotangent
"""A value that goes from one stage to another, and so may have to be sent."""

Token = EdgeToken | BackwardResiduals | WeightResiduals


class Effect(NamedTuple):
    """Tokens an action reads and writes. What it reads it also frees."""

    reads: tuple[Token, ...]
    writes: tuple[Token, ...]


class Dataflow:
    """The effects of actions for one set of edges.

    Args:
        edges: connections between stages, in the order in which a stage's values are summed.
        forward_only: keep no residuals.
    """

    def __init__(self, edges: Sequence[Edge], forward_only: bool = False) -> None:
        self.edges = tuple(edges)
        self.forward_only = forward_only

    @cached_property
    def _producers(self) -> dict[int, list[Edge]]:
        return _grouped(self.edges, by="consumer")

    @cached_property
    def _consumers(self) -> dict[int, list[Edge]]:
        return _grouped(self.edges, by="producer")

    def inputs(self, stage: int) -> list[Edge]:
        """Edges that end at a stage."""
        return self._producers.get(stage, [])

    def outputs(self, stage: int) -> list[Edge]:
        """Edges that begin at a stage."""
        return self._consumers.get(stage, [])

    def effect(self, action: Action) -> Effect:
        """Return what the action reads (and so frees) and writes."""
        stage, kind, microbatch, _ = action
        if kind is Kind.F:
            reads = tuple(Activation(e.producer, stage, microbatch) for e in self.inputs(stage))
            writes: tuple[Token, ...] = tuple(Activation(stage, e.consumer, microbatch) for e in self.outputs(stage))
            return Effect(reads, writes if self.forward_only else (*writes, BackwardResiduals(stage, microbatch)))
        if kind in (Kind.B, Kind.I):
            cotangents = (Cotangent(e.consumer, stage, microbatch) for e in self.outputs(stage) if e.needs_grad)
            sent_back = (Cotangent(stage, e.producer, microbatch) for e in self.inputs(stage) if e.needs_grad)
            kept = (WeightResiduals(stage, microbatch),) if kind is Kind.I else ()
            return Effect((BackwardResiduals(stage, microbatch), *cotangents), (*sent_back, *kept))
        if kind is Kind.W:
            return Effect((WeightResiduals(stage, microbatch),), ())
        if kind.is_sharding:
            return Effect((), ())
        carried = carried_by(action)
        return Effect((carried,), ()) if kind.is_send else Effect((), (carried,))


def carried_by(transfer: Action) -> EdgeToken:
    """Return the value that a SEND or RECV carries."""
    stage, kind, microbatch, peer = transfer
    source, target = (stage, peer) if kind.is_send else (peer, stage)
    kind_of_token = Activation if kind in (Kind.SEND_F, Kind.RECV_F) else Cotangent
    return kind_of_token(source, target, microbatch)


def flow_of(schedule: Schedule, edges: Sequence[Edge] | None) -> Dataflow:
    """Return the effects of a schedule's actions along edges; along a chain by default."""
    if edges is None:
        return Dataflow(chain(schedule.num_stages), schedule.is_forward_only)
    check_edges(edges, schedule.num_stages)
    return Dataflow(edges, schedule.is_forward_only)


def _grouped(edges: Sequence[Edge], by: str) -> dict[int, list[Edge]]:
    groups: dict[int, list[Edge]] = {}
    for edge in edges:
        groups.setdefault(getattr(edge, by), []).append(edge)
    return groups
