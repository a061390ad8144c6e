"""The learning rate as a function of the step, computed by torch's own schedulers on a dummy optimizer."""

from __future__ import annotations

import inspect
import math
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from autofunc.errors import FAILURES, AutofuncError, ModelError, in_brief
from autofunc.optim.lr_decay import Decay

SchedulerFactory = Callable[..., LRScheduler]

_LOOKED_AHEAD = 10_000  # steps computed before a run starts: torch takes about 10 us for each


class LearningRate:
    """A learning rate by step; returned by `af.lr_schedule`.

    A value depends only on the step, never on earlier calls; the only state is a cache of computed values.
    """

    def __init__(self, make: Callable[[Optimizer], LRScheduler], lr: float, name: str) -> None:
        self._name = name
        self._optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
        self._others = _all_but_lr(self._optimizer)
        try:
            self._scheduler = make(self._optimizer)
        except AutofuncError:
            raise
        except FAILURES as error:
            raise ModelError(f"{name} cannot be built: {in_brief(error)}") from error
        _check_needs_step_alone(self._scheduler, name)
        self._optimizer.step()  # schedulers warn unless the optimizer steps first
        self._values = array("d")
        self._append()

    def __repr__(self) -> str:
        return self._name

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step.

        Args:
            step: counted from 1.

        Raises:
            ModelError: for a step before the first, or after the scheduler's last.
        """
        if step < 1:
            raise ModelError(f"{self._name}: there is no step {step}; steps are counted from 1")
        while len(self._values) < step:
            try:
                self._scheduler.step()
            except FAILURES as error:
                raise ModelError(
                    f"{self._name} has no learning rate for step {len(self._values) + 1}: {in_brief(error)}"
                ) from error
            self._append()
        return self._values[step - 1]

    def check(self, num_steps: int) -> None:
        """Refuse a schedule that ends within `num_steps`, as far as a quick look ahead can tell.

        Raises:
            ModelError: naming the step.
        """
        last = getattr(self._scheduler, "total_steps", None)
        if isinstance(last, int) and last < num_steps:
            raise ModelError(
                f"{self._name} ends after total_steps={last}, and the run has {num_steps} steps; give it as many"
            )
        self(min(num_steps, _LOOKED_AHEAD))

    def _append(self) -> None:
        lr = float(self._optimizer.param_groups[0]["lr"])
        step = len(self._values) + 1
        if not math.isfinite(lr) or lr < 0:
            raise ModelError(f"{self._name} returns {lr} for step {step}; expected a number of at least 0")
        others = _all_but_lr(self._optimizer)
        changed = [key for key, value in self._others.items() if others[key] != value]
        if changed:
            raise ModelError(
                f"{self._name} also changes {changed[0]}, but only the learning rate may depend on the step here"
                + ("; give cycle_momentum=False" if changed[0] == "momentum" else "")
            )
        self._values.append(lr)


def lr_schedule(kind: str | SchedulerFactory, lr: float, **options: Any) -> LearningRate:
    """Return the learning rate as a pure function of the step: `lr_at(step)`, with steps counted from 1.

    A resumed run needs no stored state for it: the step number is enough.

    Args:
        kind: "cosine", "linear", "constant", "inverse-square-root" or "WSD", each after a warm-up; or a torch scheduler
            class, or a function that builds a scheduler for an optimizer.
        lr: the optimizer's learning rate, which the scheduler starts from.
        options: of the scheduler; for a name those of `autofunc.optim.lr_decay.Decay`.

    Raises:
        ModelError: for invalid options, and for a scheduler that is not a function of the step, such as
            `ReduceLROnPlateau`.

    Example:
        lr_at = af.lr_schedule("cosine", lr=3e-4, lr_warmup_steps=100, lr_decay_steps=10_000)
        lr_at = af.lr_schedule(torch.optim.lr_scheduler.CosineAnnealingLR, lr=3e-4, T_max=10_000)
        params, state = optimizer.update(grads, state, params, lr=lr_at(step))
    """
    shown = "".join(f", {name}={value!r}" for name, value in options.items())
    name = f"lr_schedule({kind if isinstance(kind, str) else getattr(kind, '__name__', kind)}, lr={lr!r}{shown})"
    if not isinstance(kind, str):
        _check_needs_step_alone(kind, name)
        return LearningRate(partial(_made, kind, options), lr, name)
    try:
        decay = Decay(kind, lr, **options)
    except TypeError as error:
        raise ModelError(f"{name} cannot be built: {error}") from error
    return LearningRate(lambda optimizer: LambdaLR(optimizer, decay), 1.0, name)  # the factor is the learning rate itself


def _made(kind: SchedulerFactory, options: dict[str, Any], optimizer: Optimizer) -> LRScheduler:
    scheduler = kind(optimizer, **options)
    if not isinstance(scheduler, LRScheduler):
        raise ModelError(f"expected a scheduler of torch.optim.lr_scheduler; got {type(scheduler).__name__}")
    return scheduler


def _check_needs_step_alone(scheduler: Any, name: str) -> None:
    step = getattr(scheduler, "step", None)
    needed = [] if step is None else list(inspect.signature(step).parameters.values())
    needed = [each for each in needed if each.name != "self" and each.default is each.empty]
    if needed:
        raise ModelError(
            f"{name} needs {needed[0].name} in each step, so it is not a function of the step; use one that is, such as "
            "torch.optim.lr_scheduler.CosineAnnealingLR, or compute the rate yourself and pass it as update(lr=...)"
        )


def _all_but_lr(optimizer: Optimizer) -> dict[str, Any]:
    return {key: optimizer.param_groups[0][key] for key in optimizer.defaults if key != "lr"}
