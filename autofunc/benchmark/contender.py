"""A contender as plain data: a schedule of one side, with its sizes and choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AUTOFUNC, TORCH, PLAIN = "autofunc", "torch", "plain"
"""Sides: autofunc's pipelines; those of `torch.distributed.pipelining`; the plain microbatch loop in one process."""


@dataclass(frozen=True)
class Contender:
    """One entry of a benchmark."""

    side: str
    schedule: str  # torch's own name if the side is torch
    pp: int
    microbatches: int
    stages: int  # of the whole model
    engine: str = "graph"
    compile: bool | str = False
    remat: str | None = None

    @property
    def how(self) -> str:
        """How its stages run, in a word or two."""
        plain = self.engine if self.side == AUTOFUNC else "eager"
        words = {False: plain, True: "compiled", "graphs": "CUDA graphs", "inductor+graphs": "compiled, CUDA graphs"}
        return words[self.compile]


@dataclass(frozen=True)
class LeftOut:
    """A contender that was asked for but is not measured."""

    name: str
    why: str  # one line
    wrong: bool = False  # True if it ran, but its gradients differ from the plain loop's


def named(contenders: Sequence[Contender]) -> dict[str, Contender]:
    """Name contenders, keeping their order. Sizes and remat are part of a name only if they tell contenders apart.

    >>> list(named([Contender("autofunc", "1f1b", 2, 8, 2), Contender("torch", "1F1B", 2, 8, 2)]))
    ['autofunc 1f1b graph', 'torch 1F1B eager']
    """
    many_pp = len({each.pp for each in contenders if each.side != PLAIN}) > 1
    many_microbatches = len({each.microbatches for each in contenders}) > 1
    stages: dict[tuple[str, str, int], set[int]] = {}
    for each in contenders:
        stages.setdefault((each.side, each.schedule, each.pp), set()).add(each.stages)
    found = {}
    for each in contenders:
        words = [each.side, each.schedule, each.how] if each.side != PLAIN else [each.side, each.schedule]
        words += [f"s{each.stages}"] if len(stages[each.side, each.schedule, each.pp]) > 1 else []
        words += [f"pp{each.pp}"] if many_pp and each.side != PLAIN else []
        words += [f"m{each.microbatches}"] if many_microbatches else []
        words += [f"remat={each.remat}"] if each.remat is not None else []
        found[" ".join(words)] = each
    return found
