"""Build, check and time contenders; every process of a benchmark calls this."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from autofunc.benchmark.contender import PLAIN, Contender, LeftOut
from autofunc.benchmark.gradients import gradient_error
from autofunc.benchmark.peak import allocated_bytes, peak_bytes
from autofunc.benchmark.runner import Alive, Runner
from autofunc.benchmark.teams import World
from autofunc.benchmark.turns import slowest, take_turns
from autofunc.errors import FAILURES, AutofuncError, in_brief
from autofunc.schedule import Timeline
from autofunc.shown import beginning

Make = Callable[[str, Contender], Runner]
"""Builds a named contender on this process. All processes call it, in the same order."""

Expected = Callable[[int], Mapping[str, Tensor]]
"""Returns the plain loop's gradients by canonical path, for a number of microbatches."""


@dataclass
class Untimed:
    """What is measured before a contender is timed, the same on every process."""

    build_s: float
    gradient_error: float | None
    peak_bytes: tuple[int, ...]
    alive: Alive | None
    timeline: Timeline | None


@dataclass(frozen=True)
class Found:
    """Measurements of all contenders, the same on every process."""

    untimed: Mapping[str, Untimed]
    seconds: Mapping[str, list[float]]  # of each turn
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True)
class Effort:
    """How long and how thoroughly to measure.

    Args:
        repetitions: the most rounds in which each contender has its turn.
        steps: steps per turn.
        seconds: time after which no round begins, except the first three.
        checks: compare gradients with the plain loop's.
        tolerance: the largest gradient error that counts as equal.
    """

    repetitions: int = 9
    steps: int = 1
    seconds: float = float("inf")
    checks: bool = True
    tolerance: float = 1e-5


def measure(
    contenders: Mapping[str, Contender],
    make: Make,
    expected: Expected,
    world: World,
    effort: Effort,
    advance: Callable[[str], object],
) -> Found:
    """Build all contenders, then time them in turns.

    Args:
        contenders: by name.
        make: builds a contender.
        expected: returns the plain loop's gradients for a number of microbatches.
        world: all processes.
        effort: how long and how thoroughly to measure.
        advance: called with a text as each part begins; there are as many parts as contenders and repetitions.
    """
    runners: dict[str, Runner] = {}
    untimed: dict[str, Untimed] = {}
    left: list[LeftOut] = []
    for name, contender in contenders.items():
        advance(f"building {name}")
        built = _built(name, contender, make, world)
        if isinstance(built, LeftOut):
            left.append(built)
            continue
        runner, build_s, before = built
        error = _error_of(runner, contender, expected, world, effort) if effort.checks else None
        if error is not None and error > effort.tolerance:
            why = f"its gradients differ from the plain loop's by {error:.1e}; at most {effort.tolerance:.0e} is allowed"
            left.append(LeftOut(name, why, wrong=True))
            runner.close()
            continue
        runners[name] = runner
        untimed[name] = _measure_untimed(runner, contender, build_s, error, before, world)
    began = time.perf_counter()

    def goes_on(done: int) -> bool:
        advance(f"round {done + 1}")
        return done < 3 or bool(world.of_first(time.perf_counter() - began < effort.seconds))

    advance("round 1")
    with _frozen():
        timed = take_turns(
            [runner.step for runner in runners.values()], effort.repetitions, effort.steps,
            before=world.meet, after=world.settle, goes_on=goes_on,
        )  # fmt: skip
    ranks = world.of_all(timed)
    seconds = {name: slowest([rank[number] for rank in ranks]) for number, name in enumerate(runners)}
    for runner in runners.values():
        runner.drop()
        runner.close()
    return Found(untimed, seconds, tuple(left))


@contextmanager
def _frozen() -> Iterator[None]:
    """Keep the garbage collector from walking the contenders themselves: it sees only what steps create."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _built(name: str, contender: Contender, make: Make, world: World) -> tuple[Runner, float, int] | LeftOut:
    """Return a contender after its first step, the seconds that took, and the bytes allocated before; or why it failed."""
    before = allocated_bytes(world.device)
    began, why, runner = time.perf_counter(), "", None
    try:
        runner = make(name, contender)
    except FAILURES as error:
        why = beginning(str(error)) if isinstance(error, AutofuncError) else in_brief(error)
    why = next((each for each in world.of_all(why) if each), "")
    if why or runner is None:
        if runner is not None:
            runner.close()
        return LeftOut(name, why.partition("\n")[0])
    try:
        runner.step()
        world.settle()
    except FAILURES as error:
        if world.size > 1:
            raise  # the others may be waiting in this step
        return LeftOut(name, beginning(str(error)).partition("\n")[0] or in_brief(error))
    return runner, max(world.of_all(time.perf_counter() - began)), before


def _error_of(runner: Runner, contender: Contender, expected: Expected, world: World, effort: Effort) -> float:
    """Return the gradient error of a second step, on the process where it is largest."""
    runner.step()
    wanted: Mapping[str, Tensor] = {}
    if runner.paths():
        wanted = {path: grad for path, grad in expected(contender.microbatches).items() if path in runner.paths()}
    return max(map(float, world.of_all(gradient_error(runner.grads(), wanted))))


def _measure_untimed(
    runner: Runner, contender: Contender, build_s: float, error: float | None, before: int, world: World
) -> Untimed:  # fmt: skip
    """Measure a contender's bytes and timeline; its steps are warm afterwards."""
    runner.drop()
    peak = peak_bytes(runner.step, world.device, before)
    if world.device.type == "cpu":
        peak += runner.buffer_bytes()
    world.meet()
    alive, timeline = world.of_first(runner.alive()), world.of_first(runner.timeline())
    runner.drop()
    peaks = world.of_all(peak)[: contender.pp if contender.side != PLAIN else 1]
    return Untimed(build_s, error, tuple(peaks), alive, timeline)
