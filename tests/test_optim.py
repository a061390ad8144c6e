"""torch.optim behind (init, update)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.errors import ModelError
from autofunc.tree import flatten, to_tensordict

PATHS = ("a.weight", "b.0.bias", "frozen")


def trees(seed: int) -> tuple[Any, list[Any]]:
    generator = torch.Generator().manual_seed(seed)
    params = to_tensordict({path: torch.randn(3, generator=generator) for path in PATHS})
    grads = [to_tensordict({path: torch.randn(3, generator=generator) for path in PATHS[:2]}) for _ in range(4)]
    return params, grads


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        (torch.optim.AdamW, {"lr": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
        (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
        (torch.optim.RMSprop, {"lr": 0.1}),
    ],
)
def test_equals_torch(factory: Any, options: dict[str, Any]) -> None:
    params, grads = trees(0)
    theirs = {path: torch.nn.Parameter(leaf.clone()) for path, leaf in flatten(params).items()}
    stateful = factory([theirs[path] for path in PATHS[:2]], **options)
    optimizer = af.optimizer(factory, **options)
    state = optimizer.init(params)
    frozen = params["frozen"].clone()
    for grad in grads:
        for path, leaf in flatten(grad).items():
            theirs[path].grad = leaf.clone()
        stateful.step()
        params, state = optimizer.update(grad, state, params)
    for path, leaf in flatten(params).items():
        assert torch.equal(leaf, theirs[path].detach()), path
        assert not leaf.requires_grad
    assert torch.equal(params["frozen"], frozen)


def test_state_is_a_tree_by_path_and_the_whole_truth() -> None:
    params, grads = trees(1)
    optimizer = af.optimizer(torch.optim.AdamW, lr=0.1)
    state = optimizer.init(params)
    for grad in grads[:2]:
        params, state = optimizer.update(grad, state, params)
    assert torch.equal(state["step", "a", "weight"], torch.tensor(2.0)) and state["exp_avg", "b", "0", "bias"].shape == (3,)
    resumed = af.optimizer(torch.optim.AdamW, lr=0.1)
    once, _ = optimizer.update(grads[2].clone(), state.clone(), params.clone())
    again, _ = resumed.update(grads[2].clone(), state.clone(), params.clone())
    assert all(torch.equal(leaf, flatten(again)[path]) for path, leaf in flatten(once).items())


def test_state_without_a_gradient_is_carried_through() -> None:
    params, grads = trees(4)
    optimizer = af.optimizer(torch.optim.AdamW, lr=0.1)
    params, state = optimizer.update(grads[0], optimizer.init(params), params)
    only_a = to_tensordict({"a.weight": grads[1]["a", "weight"]})
    params, state = optimizer.update(only_a, state, params)
    assert state["step", "a", "weight"] == 2 and state["step", "b", "0", "bias"] == 1


def test_updates_in_place_keep_the_trees() -> None:
    params, grads = trees(5)
    optimizer = af.optimizer(torch.optim.AdamW, lr=0.1)
    params, state = optimizer.update(grads[0], optimizer.init(params), params)
    again, state_again = optimizer.update(grads[1], state, params)
    assert again is params and state_again is state


def test_learning_rate_of_one_update() -> None:
    params, grads = trees(2)
    before = params.clone()
    optimizer = af.optimizer(torch.optim.SGD, lr=1.0)
    params, _ = optimizer.update(grads[0], optimizer.init(params), params, lr=0.5)
    assert torch.allclose(params["a", "weight"], before["a", "weight"] - 0.5 * grads[0]["a", "weight"])


def test_options_that_do_not_fit() -> None:
    params, grads = trees(3)
    with pytest.raises(ModelError, match=r"AdamW, learning_rate=1.* cannot be built"):
        af.optimizer(torch.optim.AdamW, learning_rate=1).init(params)
    with pytest.raises(ModelError, match=r"a gradient for 'b.0.bias', which is not a parameter"):
        af.optimizer(torch.optim.SGD, lr=1.0).update(grads[0], {}, {"a": {"weight": torch.zeros(3)}})


class Outside(torch.optim.Optimizer):
    """Base of optimizers that keep something outside of `state`."""

    def __init__(self, params: Any, lr: float = 0.1, **group: Any) -> None:
        super().__init__(params, {"lr": lr, **group})

    def leaves(self) -> Any:
        return [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]


class InGroup(Outside):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr, k=0, scale=1.0, betas=(0.9, 0.5), mode="warm")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            group["scale"] *= 0.7
            group["betas"] = (group["betas"][0] / 3, group["betas"][1])
            group["mode"] = "run" if group["k"] > 2 else group["mode"]
        for group, p in self.leaves():
            p.sub_(p.grad, alpha=group["lr"] * group["scale"] * group["betas"][0] * (2 if group["mode"] == "run" else 1))


class OnItself(Outside):
    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.count, self.norm, self.seen = 0, torch.zeros(()), dict[str, list[float]](norms=[])
        self.first: Any = None
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}
        self.generator = torch.Generator().manual_seed(3)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        for group, p in self.leaves():
            self.norm.add_(p.grad.norm())
            self.seen["norms"].append(float(self.norm))
            self.first = self.norm.item() if self.first is None else self.first
            self.slow[p].add_(p.grad, alpha=-group["lr"] / self.count)
            drawn = torch.rand((), generator=self.generator)
            p.lerp_(self.slow[p], 0.5 * drawn.item()).sub_(self.first * 1e-3 * len(self.seen["norms"]))


class Inner(Outside):
    def __init__(self, params: Any, lr: float = 0.1, other: float = 0.1) -> None:
        params = list(params)
        super().__init__(params, lr)
        self.inner = [torch.optim.AdamW(params[:1], lr=lr), *(InGroup([p], lr=other) for p in params[1:])]

    def step(self, closure: Any = None) -> None:
        for inner in self.inner:
            inner.step()


class Lookahead(Outside):
    """Shares the groups and the state of what it is around."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        self.base, self.k = torch.optim.AdamW(params, lr=lr), 0
        super().__init__(self.base.param_groups, lr)
        self.param_groups, self.state = self.base.param_groups, self.base.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.k += 1
        for _, p in self.leaves():
            slow = self.state[p].setdefault("slow", p.clone())
            if self.k % 2 == 0:
                p.copy_(slow.lerp_(p, 0.5))


class NumbersAsSlots(Outside):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, p in self.leaves():
            kept = self.state[p]
            kept["count"] = kept.get("count", 0) + 1
            kept["sum"] = kept.get("sum", 0.1) * 1.1
            kept["past"] = [p.grad.clone(), *kept.get("past", [])][:2]
            assert type(kept["count"]) is int
            p.sub_(sum(kept["past"]), alpha=group["lr"] * kept["sum"] / kept["count"])


KINDS = [InGroup, OnItself, Inner, Lookahead, NumbersAsSlots]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_outside_of_the_state_is_carried(kind: Any) -> None:
    params, grads = trees(6)
    own = {path: torch.nn.Parameter(leaf.clone()) for path, leaf in flatten(params).items()}
    direct, optimizer = kind([own[path] for path in PATHS[:2]]), af.optimizer(kind)
    state = optimizer.init(params)
    for grad in grads:
        for path, leaf in flatten(grad).items():
            own[path].grad = leaf.clone()
        direct.step()
        again = optimizer.update(grad.clone(), state.clone(), params.clone())
        params, state = optimizer.update(grad, state, params)
        for one, other in zip((params, state), again, strict=True):
            assert all(torch.equal(leaf, flatten(other)[path]) for path, leaf in flatten(one).items()), "it is pure"
        for path, leaf in flatten(params).items():
            assert torch.equal(leaf, own[path].detach()), path


@pytest.mark.parametrize("kind", [InGroup, Lookahead, NumbersAsSlots])
def test_learning_rate_of_one_update_alone(kind: Any) -> None:
    params, grads = trees(7)
    own = {path: torch.nn.Parameter(leaf.clone()) for path, leaf in flatten(params).items()}
    direct, optimizer = kind([own[path] for path in PATHS[:2]]), af.optimizer(kind)
    state = optimizer.init(params)
    for grad, lr in zip(grads, (0.1, 0.3, 0.2, 0.1), strict=True):
        for path, leaf in flatten(grad).items():
            own[path].grad = leaf.clone()
        direct.param_groups[0]["lr"] = lr
        direct.step()
        params, state = optimizer.update(grad, state, params, **({} if lr == 0.1 else {"lr": lr}))
    assert all(torch.equal(leaf, own[path].detach()) for path, leaf in flatten(params).items())


def test_a_learning_rate_for_two_that_differ_is_refused() -> None:
    params, grads = trees(8)
    optimizer = af.optimizer(Inner, other=0.5)
    with pytest.raises(ModelError, match=r"update\(lr=0.2\) on Inner, whose inner InGroup has its own lr=0.5"):
        optimizer.update(grads[0], optimizer.init(params), params, lr=0.2)
    before = params.clone()
    params, _ = af.optimizer(Inner).update(grads[0], {}, params, lr=0.0)
    assert all(torch.equal(leaf, flatten(before)[path]) for path, leaf in flatten(params).items())


class Changing(Outside):
    """Changes what is no data."""

    def __init__(self, params: Any, what: str) -> None:
        super().__init__(params)
        self.what, self.iterator, self.function, self.known = what, itertools.count(), len, {1}

    def step(self, closure: Any = None) -> None:
        if self.what == "iterator":
            next(self.iterator)
        elif self.what == "function":
            self.function = max
        elif self.what == "known":
            self.known.add(2)


@pytest.mark.parametrize("what", ["iterator", "function", "known"])
def test_what_cannot_be_carried_is_refused(what: str) -> None:
    params, grads = trees(9)
    with pytest.raises(ModelError, match=f"Changing changes {what} in a step, which cannot be carried from one update"):
        af.optimizer(Changing, what=what).update(grads[0], {}, params)
    af.optimizer(Changing, what="nothing").update(grads[0], {}, params)


def test_an_optimizer_that_needs_the_loss_is_refused() -> None:
    with pytest.raises(ModelError, match=r"LBFGS, .* recomputes the loss in each step"):
        af.optimizer(torch.optim.LBFGS, lr=0.1).init(trees(3)[0])


def test_options_are_not_shared_by_updates() -> None:
    class Schedule:
        def __init__(self) -> None:
            self.steps = 0

    class Scheduled(Outside):
        def __init__(self, params: Any, schedule: Any) -> None:
            super().__init__(params)
            self.schedule = schedule

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            self.schedule.steps += 1
            for _, p in self.leaves():
                p.sub_(p.grad / self.schedule.steps)

    params, grads = trees(10)
    given = Schedule()
    optimizer = af.optimizer(Scheduled, schedule=given)
    expected = params["a", "weight"] - grads[0]["a", "weight"] - grads[1]["a", "weight"] / 2
    params, state = optimizer.update(grads[0], optimizer.init(params), params)
    params, state = optimizer.update(grads[1], state, params)
    assert given.steps == 0 and torch.allclose(params["a", "weight"], expected)


def test_a_resumed_optimizer_takes_the_options_it_is_made_with() -> None:
    params, grads = trees(11)
    params, state = af.optimizer(InGroup, lr=0.1).update(grads[0], {}, params)
    before = params.clone()
    params, _ = af.optimizer(InGroup, lr=0.0).update(grads[1], state, params)
    assert all(torch.equal(leaf, flatten(before)[path]) for path, leaf in flatten(params).items())


def test_help_says_that_update_takes_a_learning_rate() -> None:
    assert "lr=" in (af.optimizer.__doc__ or "").partition("Example")[0]
