"""An autofunc pipeline as a contender."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from autofunc import tree
from autofunc.benchmark.contender import Contender
from autofunc.benchmark.runner import Alive
from autofunc.benchmark.subject import Subject
from autofunc.benchmark.teams import Team
from autofunc.errors import AutofuncError
from autofunc.schedule import Timeline, build, costs_of, lower, peak_bytes, simulate
from autofunc.transform import pipeline, value_and_grad

_PROFILED = 3  # steps; the one of median length is shown


class AutofuncRunner:
    """An autofunc pipeline that implements `Runner`.

    Args:
        subject: the benchmark's model, batch and loss.
        contender: the schedule and the choices.
        team: the pipeline's processes.

    Raises:
        AutofuncError: if the pipeline cannot be built.
    """

    def __init__(self, subject: Subject, contender: Contender, team: Team) -> None:
        self._subject, self._contender = subject, contender
        schedule = build(contender.schedule, num_ranks=contender.pp, num_microbatches=contender.microbatches)
        self._pipe = pipeline(
            subject.stages(schedule.num_stages), schedule, loss=subject.loss, mesh=team.mesh, engine=contender.engine,
            compile=contender.compile, remat=contender.remat, batch_dims=subject.batch_dims, sharding=subject.sharding,
        )  # fmt: skip
        model = subject.model
        mine = [stage for stage in self._pipe.stages if schedule.placement[stage.index] in self._pipe.local_ranks]
        self._params = tree.to_tensordict({path: subject.params[path] for stage in mine for path in stage.paths})
        self._paths = {model.canonical(path) for stage in mine for path in stage.trainable_holders}
        keeps = bool(model.state_spec)
        self._run = value_and_grad(self._pipe, has_state=keeps)
        self._given = {"state": self._pipe.init_state(subject.device)} if keeps else {}
        self._last: list[Any] = []  # the last result, kept until the next step, as in a training loop

    def step(self) -> None:
        """See `Runner`."""
        self._last.clear()
        self._last.append(self._run(self._params, self._subject.batch, self._subject.key, **self._given))

    def drop(self) -> None:
        """See `Runner`."""
        self._last.clear()

    def grads(self) -> dict[str, Tensor]:
        """See `Runner`."""
        return tree.flatten(self._last[0][1])

    def paths(self) -> set[str]:
        """See `Runner`."""
        return self._paths

    def buffer_bytes(self) -> int:
        """See `Runner`."""
        return self._pipe.reserved_bytes()

    def timeline(self) -> Timeline | None:
        """See `Runner`."""
        measured = self._pipe.profile(self._params, self._subject.batch, self._subject.key, steps=_PROFILED)
        if self._pipe.mesh is not None:
            return replace(measured, label=f"autofunc {self._contender.how}, measured")
        costs = replace(costs_of(measured), comm=0.0)
        label = f"autofunc {self._contender.how}, simulated with measured costs"
        return replace(simulate(self._pipe.schedule, costs), label=label)

    def alive(self) -> Alive | None:
        """See `Runner`. None if autograd keeps residuals, or CUDA graphs record steps: neither can be measured."""
        if self._contender.engine == "eager" or self._pipe.options.records:
            return None
        given = (self._params, self._subject.batch, self._subject.key)
        measured = tuple(max(bytes_of_rank, default=0) for bytes_of_rank in self._pipe.measure_bytes(*given))
        try:
            kept = self._pipe.memory(*given)
        except AutofuncError:  # a size depends on data
            return Alive(measured, None)
        lowered = lower(self._pipe.schedule, sends_block=self._pipe.transfers.sends_block)
        return Alive(measured, tuple(int(each) for each in peak_bytes(lowered, kept)))

    def close(self) -> None:
        """See `Runner`."""
        self._pipe.close()
