"""The laws of every captured module, however it is cut and scheduled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import autofunc as af
from autofunc import tree
from autofunc.batch import split_batch
from autofunc.losses import Loss, evaluate
from tests.cases import assert_same_tree

TOLERANCE = 1e-6


Caller = Callable[[nn.Module, Mapping[str, Any]], Any]


def plain_loop(
    module: nn.Module, call: Caller, batch: Mapping[str, Any], count: int, loss: Loss | None, key_name: str = "key"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a module by autograd, one microbatch at a time; the module's own `.grad` stays None."""
    named = dict(module.named_parameters())
    sums = {name: torch.zeros_like(leaf) for name, leaf in named.items() if leaf.requires_grad}
    total, weight = torch.zeros(()), torch.zeros(())
    for microbatch in split_batch(batch, count, key_name=key_name):
        terms = evaluate(loss, call(module, microbatch), microbatch)
        grads = torch.autograd.grad(terms.sum, [named[name] for name in sums], allow_unused=True)
        for name, grad in zip(sums, grads, strict=True):
            if grad is not None:
                sums[name] = sums[name] + grad
        total, weight = total + terms.sum.detach(), weight + terms.weight
    return total / weight, {name: grad / weight for name, grad in sums.items()}


def contents(module: nn.Module) -> dict[str, Any]:
    """Everything a module holds: the bits of its tensors, and its other attributes."""
    found: dict[str, Any] = {}
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if key in ("_parameters", "_buffers"):
                found |= {f"{name}.{key}.{inner}": leaf.clone() for inner, leaf in value.items() if leaf is not None}
                found |= {f"{name}.{key}.{inner} is": id(leaf) for inner, leaf in value.items()}
            elif isinstance(value, (dict, list, set)):
                found[f"{name}.{key}"] = (id(value), copy.copy(value))
            else:
                found[f"{name}.{key}"] = id(value)
    return found


def assert_unchanged(before: Mapping[str, Any], module: nn.Module) -> None:
    """Assert that nothing in a module was written, replaced, added or removed."""
    after = contents(module)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, key


def close(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Assert equality up to a relative error per tensor."""
    leaves = tree.flatten(found)
    assert leaves.keys() == expected.keys()
    for path, leaf in expected.items():
        scale = leaf.abs().max().clamp_min(1e-3)
        assert (leaves[path] - leaf).abs().max() <= TOLERANCE * scale, path


def check_layouts(
    module: nn.Module,
    batch: Mapping[str, Any],
    layouts: Sequence[tuple[Any, str]],
    *,
    loss: Loss | None = None,
    call: Caller = lambda module, batch: module(**batch),
    example: Mapping[str, Any] | None = None,
    **options: Any,
) -> af.Model:
    """Split a module in several ways; compare with the plain loop, and bit for bit with the oracle.

    Args:
        module: the module to capture.
        batch: of four rows.
        layouts: (split_points, name of a schedule).
        loss: see `af.pipeline`.
        call: how the plain loop calls the module.
        example: what it is captured with; the batch by default. One as large as a microbatch saves a capture.
        options: of `af.from_module`.
    """
    before = contents(module)
    model = af.from_module(module, batch if example is None else example, **options)
    params = model.init()
    results = []
    for points, name in layouts:
        stages = af.split(model, points)
        expected_loss, expected = af.reference_value_and_grad(stages[0].model, loss, 2)(params, batch)
        s = af.schedule.build(name, num_ranks=len(stages), num_microbatches=2)
        found_loss, found = af.value_and_grad(af.pipeline(stages, s, loss=loss))(params, batch)
        assert torch.equal(found_loss, expected_loss), (points, name)
        assert_same_tree(expected, found)
        results.append((found_loss, found))
    assert_unchanged(before, module)
    plain_loss, plain = plain_loop(module, call, batch, 2, loss, model.key_name)
    for found_loss, found in results:
        close(found, plain)
        assert abs(found_loss - plain_loss) <= TOLERANCE * abs(plain_loss)
    return model
