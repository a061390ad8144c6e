"""`af.bench`: from a model, a batch and a grid of choices to a record of measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autofunc import tree
from autofunc.benchmark.autofunc_runner import AutofuncRunner
from autofunc.benchmark.contender import PLAIN, TORCH, Contender
from autofunc.benchmark.gradients import tolerance
from autofunc.benchmark.grid import Grid
from autofunc.benchmark.measure import Effort, Found, measure
from autofunc.benchmark.plain_runner import PlainRunner
from autofunc.benchmark.record import Measured, Spread
from autofunc.benchmark.results import Results
from autofunc.benchmark.runner import Bystander, Runner
from autofunc.benchmark.subject import Subject, cut_by_costs
from autofunc.benchmark.teams import World, described
from autofunc.benchmark.torch_runner import make_torch_runner
from autofunc.benchmark.torch_stage import MakeModule
from autofunc.engine.device_speed import peak_tflops
from autofunc.errors import AutofuncError
from autofunc.losses import Loss
from autofunc.model import Model
from autofunc.progress_bar import counting
from autofunc.row_dims import BatchDims
from autofunc.schedule import costs_of, simulate
from autofunc.shard import Sharding
from autofunc.splitting import Stage


def bench(
    model: Model,
    batch: Mapping[str, Any],
    *,
    loss: Loss | None = None,
    schedules: Sequence[str] = ("gpipe", "1f1b", "zb_h1"),
    pp: Sequence[int] = (2,),
    microbatches: Sequence[int] = (8,),
    engines: Sequence[str] = ("graph",),
    compile: Sequence[bool | str] = (False,),
    remat: Sequence[str | None] = (None,),
    against: Sequence[str] = (),
    torch_schedules: Sequence[str] = (),
    torch_module: MakeModule | None = None,
    only: Sequence[str] = ("*",),
    split_points: Sequence[str] | Callable[[int], Sequence[Stage]] | None = None,
    params: tree.Nested | None = None,
    key: Any = None,
    batch_dims: BatchDims = None,
    sharding: Sharding | None = None,
    repetitions: int = 9,
    steps: int = 1,
    seconds: float = float("inf"),
    check: bool = True,
    peak: float | None = None,
    progress: bool = True,
) -> Results:
    """Time a training step (loss and gradients, no optimizer) of pipelines, in turns, on this process or on all of a run.

    In one process all pp ranks take turns, so times are those of one device that does all the work. Under `torchrun` each
    process is a pp rank; with fewer ranks than processes the first ones work and the others wait. All processes call this
    alike, each with the whole batch, and get the same record.

    Every contender's gradients are compared with the plain microbatch loop's before anything is timed. Then contenders take
    turns, A B C, A B C, ...; every step starts at a barrier, and the slowest process counts.

    Args:
        model: from `af.from_module`, or an `af.Model`.
        batch: the rows of a step.
        loss: see `af.pipeline`.
        schedules, pp, microbatches, engines, compile, remat: the choices to combine, see `af.pipeline`.
        against: "torch" adds torch's counterparts of the schedules, on the same stages, weights and microbatches; "plain"
            the plain microbatch loop in one process.
        torch_schedules: torch's names, such as "1F1B", to measure instead of the counterparts.
        torch_module: builds the modules of torch's stages, instead of graphs traced from ours.
        only: patterns; a contender's name must match one: "torch *", "autofunc * compiled".
        split_points: names, used if they give as many stages as a schedule needs, otherwise stages are balanced by cost;
            or a function from the number of stages to the stages.
        params: parameters of the whole model; by default `model.init(0)` on the batch's device.
        key: see `af.value_and_grad`; with a key all contenders have the same dropout.
        batch_dims: see `af.pipeline`.
        sharding: precision of autofunc's pipelines.
        repetitions: rounds in which each contender has a turn.
        steps: steps per turn, whose median counts.
        seconds: time after which no round begins, except the first three.
        check: False skips the comparison of gradients, which runs the whole model on each process.
        peak: peak of a device in FLOP/s; by default known for some GPUs in 16 bits.
        progress: show a progress bar.

    Returns:
        `autofunc.benchmark.Results`: `print(results)` shows tables, `results.save(folder)` writes JSON, a picture and
        a page of timelines, `results.left_out` lists what was not measured and why.

    Raises:
        AutofuncError: for an unknown choice, or if no contender can be measured.

    Example:
        model = af.from_module(module, batch)
        results = af.bench(model, batch, schedules=["1f1b", "zb_h1"], against=["torch"])
        print(results)
        results.save("results")
    """
    if repetitions < 1 or steps < 1:
        raise AutofuncError(f"bench: repetitions={repetitions}, steps={steps}; expected positive numbers")
    grid = Grid(
        tuple(schedules), tuple(pp), tuple(microbatches), tuple(engines), tuple(compile), tuple(remat), tuple(against),
        tuple(torch_schedules),
    )  # fmt: skip
    was_alone = not dist.is_initialized()
    given = tree.flatten(params) if params is not None else _initial(model, batch)
    subject = Subject(model, loss, batch, given, key, batch_dims, sharding or Sharding(), lambda number: ())
    subject.cut = (
        split_points
        if callable(split_points)
        else cut_by_costs(model, split_points, subject.microbatches(microbatches[0])[0], loss)
    )
    world = World(subject.device)
    contenders, left = grid.contenders(world.size, only)

    def make(name: str, contender: Contender) -> Runner:
        team = world.team(contender.pp)
        if contender.side == TORCH:
            return make_torch_runner(subject, contender, team, world, torch_module)
        if not team.plays:
            return Bystander()
        if contender.side == PLAIN:
            return PlainRunner(subject, contender.microbatches)
        return AutofuncRunner(subject, contender, team)

    cast = subject.sharding.mp_policy.param_dtype
    computed = {leaf.dtype if cast is None else cast for leaf in given.values() if leaf.is_floating_point()}
    effort = Effort(repetitions, steps, seconds, check, tolerance(computed, subject.device))
    work = counting("bench", "parts", len(contenders) + repetitions) if progress else nullcontext(lambda more: None)
    with work as bar, torch.inference_mode(False):
        found = measure(contenders, make, subject.expected, world, effort, lambda what: bar(1))
    if was_alone and world.size == 1 and dist.is_initialized():
        dist.destroy_process_group()
    return _record(subject, contenders, [*left, *found.left_out], found, world, effort, peak)


def _initial(model: Model, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Initialise the parameters of the whole model, on the batch's device."""
    return tree.flatten(model.init(0 if model.uses_seed else None, device=_device_of(batch)))


def _device_of(batch: Mapping[str, Any]) -> torch.device:
    leaves = [leaf for leaf in tree.leaves_and_spec(dict(batch))[0] if isinstance(leaf, Tensor)]
    return leaves[0].device if leaves else torch.device("cpu")


def _record(
    subject: Subject, contenders: Mapping[str, Contender], left: Sequence[Any], found: Found, world: World, effort: Effort,
    peak: float | None,
) -> Results:  # fmt: skip
    units, unit = subject.units()
    known = peak_tflops(world.device)
    peak = peak if peak is not None else None if known is None else known * 1e12
    numbers = {each.microbatches for each in contenders.values()} if peak is not None else set()
    flops = {number: subject.flops(number) for number in numbers}
    measured = []
    for name, untimed in found.untimed.items():
        contender = contenders[name]
        seconds = Spread.of(found.seconds[name]).median
        operations = flops.get(contender.microbatches)
        devices = 1 if world.size == 1 else contender.pp
        mfu = None if operations is None or peak is None else operations / (seconds * peak * devices)
        bubble, of_schedule = None, None
        if untimed.timeline is not None and untimed.timeline.schedule.num_ranks > 1:
            of_schedule = simulate(untimed.timeline.schedule, costs_of(untimed.timeline)).bubble_fraction
            bubble = untimed.timeline.bubble_fraction if devices > 1 else None
        measured.append(
            Measured(
                name=name,
                contender=contender,
                step_ms=tuple(each * 1e3 for each in found.seconds[name]),
                build_s=untimed.build_s,
                gradient_error=untimed.gradient_error,
                units_per_second=units / seconds,
                mfu=mfu,
                bubble=bubble,
                schedule_bubble=of_schedule,
                peak_bytes=untimed.peak_bytes,
                live_bytes=untimed.alive.measured if untimed.alive is not None else None,
                predicted_bytes=untimed.alive.predicted if untimed.alive is not None else None,
                timeline=untimed.timeline,
            )
        )
    setting = {
        "model": subject.model.title, "parameters": sum(leaf.numel() for leaf in subject.params.values()),
        "rows": subject.rows, unit: units, "processes": world.size, "steps_a_turn": effort.steps,
        "gradients_checked": effort.checks, **described(world.device),
    }  # fmt: skip
    return Results(tuple(measured), tuple(left), setting, unit)
