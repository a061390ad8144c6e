"""torch.optim behind (init, update)."""

from __future__ import annotations

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
    with pytest.raises(ModelError, match=r"AdamW, learning_rate=1.* cannot be made"):
        af.optimizer(torch.optim.AdamW, learning_rate=1).init(params)
    with pytest.raises(ModelError, match=r"a gradient for 'b.0.bias', which is no parameter"):
        af.optimizer(torch.optim.SGD, lr=1.0).update(grads[0], {}, {"a": {"weight": torch.zeros(3)}})
