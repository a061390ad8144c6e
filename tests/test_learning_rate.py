"""The learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torchs

import autofunc as af
from autofunc.errors import ModelError

LR = 0.3

SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LinearLR": (torchs.LinearLR, {"start_factor": 0.1, "total_iters": 5}),
    "CosineAnnealingLR": (torchs.CosineAnnealingLR, {"T_max": 7, "eta_min": 0.01}),
    "LambdaLR": (torchs.LambdaLR, {"lr_lambda": lambda updates: 1 / (1 + updates)}),
    "MultiplicativeLR": (torchs.MultiplicativeLR, {"lr_lambda": lambda updates: 0.9}),
    "StepLR": (torchs.StepLR, {"step_size": 3}),
    "MultiStepLR": (torchs.MultiStepLR, {"milestones": [2, 5]}),
    "ConstantLR": (torchs.ConstantLR, {"factor": 0.5, "total_iters": 4}),
    "ExponentialLR": (torchs.ExponentialLR, {"gamma": 0.8}),
    "PolynomialLR": (torchs.PolynomialLR, {"total_iters": 6, "power": 2.0}),
    "CosineAnnealingWarmRestarts": (torchs.CosineAnnealingWarmRestarts, {"T_0": 3, "T_mult": 2}),
    "CyclicLR": (torchs.CyclicLR, {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 3, "cycle_momentum": False}),
    "OneCycleLR": (torchs.OneCycleLR, {"max_lr": 0.3, "total_steps": 12, "cycle_momentum": False}),
    "SequentialLR": (
        lambda optimizer: torchs.SequentialLR(
            optimizer, [torchs.LinearLR(optimizer, 0.2, total_iters=3), torchs.CosineAnnealingLR(optimizer, 8)], [3]
        ),
        {},
    ),
    "ChainedScheduler": (
        lambda optimizer: torchs.ChainedScheduler(
            [torchs.ConstantLR(optimizer, 0.1, 2), torchs.ExponentialLR(optimizer, 0.9)], optimizer
        ),
        {},
    ),
}


def test_every_scheduler_of_torch_is_a_function_of_the_step() -> None:
    known = {
        name
        for name, kind in vars(torchs).items()
        if isinstance(kind, type) and issubclass(kind, torchs.LRScheduler) and kind is not torchs.LRScheduler
    }
    assert known - SCHEDULERS.keys() - {"_LRScheduler"} == {"ReduceLROnPlateau"}
    for name, (kind, options) in SCHEDULERS.items():
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([weight], lr=LR)
        scheduler, expected = kind(optimizer, **options), []
        for _ in range(12):
            expected.append(optimizer.param_groups[0]["lr"])
            weight.grad = torch.ones(2)
            optimizer.step()
            if len(expected) < 12:
                scheduler.step()
        lr_at = af.lr_schedule(kind, lr=LR, **options)
        assert lr_at(12) == expected[-1], f"{name}, asked for the last step first, as a resumed run does"
        assert [lr_at(step) for step in range(1, 13)] == expected, name


def test_shapes_by_name() -> None:
    def values(style: str, **options: Any) -> list[float]:
        lr_at = af.lr_schedule(style, lr=1.0, **{"lr_warmup_steps": 2, "lr_decay_steps": 10, "min_lr": 0.2} | options)
        return [round(lr_at(step), 6) for step in range(1, 14)]

    warmup, after = [0.1, 0.55, 1.0], [0.2, 0.2, 0.2]
    assert values("constant") == [*warmup, *[1.0] * 10]
    assert values("linear") == [*warmup, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, *after]
    cosine = [round(0.2 + 0.4 * (1 + math.cos(math.pi * share / 8)), 6) for share in range(1, 8)]
    assert values("cosine") == [*warmup, *cosine, *after]
    falling = [round(max(0.2, math.sqrt(2 / updates)), 6) for updates in range(3, 11)]
    assert values("inverse-square-root") == [*warmup, *falling, *after[1:]]
    assert values("WSD", wsd_decay_steps=4, lr_wsd_decay_style="linear") == [*warmup, *[1.0] * 4, 0.8, 0.6, 0.4, *after]
    ends = {
        style: values("WSD", wsd_decay_steps=4, lr_wsd_decay_style=style)[7:11] for style in ("exponential", "minus_sqrt")
    }
    assert ends["exponential"] == [round(0.2 + 0.8 * (2 * 0.5 ** (n / 4) - 1), 6) for n in range(1, 5)]
    assert ends["minus_sqrt"] == [round(0.2 + 0.8 * (1 - math.sqrt(n / 4)), 6) for n in range(1, 5)]
    assert values("linear", lr_warmup_steps=0, max_lr=2.0, lr_decay_steps=9)[:2] == [2.0, 1.8]
    by_default = af.lr_schedule("cosine", lr=1.0, lr_decay_steps=100)
    assert by_default(1) == 0.1 and by_default(11) == 1.0 and by_default(101) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("cosin", {"lr_decay_steps": 9}, "lr_decay_style 'cosin': did you mean cosine"),
        ("cosine", {}, "needs lr_decay_steps"),
        ("cosine", {"lr_decay_steps": 9, "warmup": 1}, "unexpected keyword argument 'warmup'"),
        ("linear", {"lr_decay_steps": 9, "lr_warmup_steps": 9}, "leaves nothing of lr_decay_steps=9, .* at most 8"),
        ("linear", {"lr_decay_steps": 9, "min_lr": 0.4}, "expected 0 <= min_lr <= max_lr"),
        ("linear", {"lr_decay_steps": 9, "init_lr": 0.4}, "expected 0 <= init_lr <= max_lr"),
        ("WSD", {"lr_decay_steps": 9, "wsd_decay_steps": 10}, "at least 1 and at most 9"),
        ("WSD", {"lr_decay_steps": 9, "lr_wsd_decay_style": "sqrt"}, "did you mean minus_sqrt"),
        (torchs.ReduceLROnPlateau, {}, "needs metrics in each step, so it is not a function of the step; use one that is"),
        (torchs.CosineAnnealingLR, {"Tmax": 9}, "cannot be built: TypeError"),
        (torchs.CyclicLR, {"base_lr": 0.1, "max_lr": 0.2}, "also changes momentum, .*cycle_momentum=False"),
        (torchs.ExponentialLR, {"gamma": -1.0}, "returns -0.3 for step 2"),
        (torchs.OneCycleLR, {"max_lr": 1.0, "total_steps": 9, "cycle_momentum": False}, "ends after total_steps=9"),
        (lambda optimizer: optimizer, {}, "expected a scheduler of torch.optim.lr_scheduler; got SGD"),
    ],
)
def test_what_is_no_function_of_the_step_is_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        af.lr_schedule(kind, lr=LR, **options).check(10)


def test_steps_that_there_are_not() -> None:
    lr_at = af.lr_schedule(torchs.OneCycleLR, lr=LR, max_lr=1.0, total_steps=4, cycle_momentum=False)
    with pytest.raises(ModelError, match="there is no step 0; steps are counted from 1"):
        lr_at(0)
    with pytest.raises(ModelError, match="has no learning rate for step 6: ValueError"):
        lr_at(6)
