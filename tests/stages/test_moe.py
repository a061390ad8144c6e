"""Routing and its balance loss; tests/stages/test_huggingface.py compares logits and weights with transformers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import autofunc as af
from autofunc.errors import ModelError
from autofunc.tree import flatten
from stages.moe import MoEConfig, balance_loss, build_moe_model, experts, moe_causal_lm, route
from tests.stages.families import FAMILIES, SIZES, Family

FAMILY = FAMILIES["mixtral"]
ONE_LAYER = Family(FAMILY.kind, FAMILY.module, FAMILY.build, {**FAMILY.settings, "num_hidden_layers": 1}, FAMILY.loss)


def by_counting(logits: Tensor, top_k: int) -> float:
    """The balance loss of one layer, a token and an expert at a time."""
    tokens, count = logits.shape
    chosen, probability = [0.0] * count, [0.0] * count
    for row in logits.softmax(-1).tolist():
        for expert in sorted(range(count), key=lambda e: -row[e])[:top_k]:
            chosen[expert] += 1 / tokens
        for expert in range(count):
            probability[expert] += row[expert] / tokens
    return count * sum(c * p for c, p in zip(chosen, probability, strict=True))


def test_the_balance_loss_is_the_mean_of_transformers_over_layers() -> None:
    theirs = FAMILY.theirs()
    model, params = FAMILY.ours(theirs)
    batch = FAMILY.batch(3)
    with torch.no_grad():
        gates = theirs(batch["input_ids"], output_router_logits=True, use_cache=False).router_logits
        found = model(params, batch)["balance_loss"]
    assert len(gates) == 3 and found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found, torch.stack([load_balancing_loss_func((gate,), 5, 2) for gate in gates]).mean())
    assert found.item() == pytest.approx(sum(by_counting(gate, 2) for gate in gates) / 3, rel=1e-5)
    assert not torch.allclose(found, load_balancing_loss_func(gates, 5, 2), rtol=1e-3), "theirs lets layers make up"


def test_with_one_layer_loss_and_gradients_equal_transformers() -> None:
    theirs = ONE_LAYER.theirs()
    model, params = ONE_LAYER.ours(theirs)
    batch = ONE_LAYER.batch(3)
    outputs = theirs(batch["input_ids"], output_router_logits=True, use_cache=False)
    total, weight = af.losses.causal_lm(outputs.logits, batch)
    expected = total / weight + 0.3 * outputs.aux_loss
    expected.backward()
    loss = partial(moe_causal_lm, router_aux_loss_coef=0.3)
    found, grads = af.reference_value_and_grad(model, loss, 1)(params, batch)
    torch.testing.assert_close(found, expected.detach())
    gate = "layers.0.mlp.gate.weight"
    torch.testing.assert_close(flatten(grads)[gate], theirs.model.layers[0].mlp.gate.weight.grad, rtol=1e-4, atol=1e-6)


def test_the_balance_loss_at_balance_is_the_number_of_experts_a_token() -> None:
    best = torch.tensor([[0, 1], [2, 1], [2, 3], [0, 3]])
    assert balance_loss(torch.full((4, 4), 0.25), best).item() == 2.0


def test_routing_chooses_and_normalises() -> None:
    config = MoEConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2)
    torch.manual_seed(0)
    params, x = {"weight": torch.randn(5, 16)}, torch.randn(6, 16)
    best, weights, _ = route(params, x, config)
    probability = (x @ params["weight"].t()).softmax(-1)
    expected = probability.sort(-1, descending=True)
    assert torch.equal(best, expected.indices[:, :2])
    torch.testing.assert_close(weights, expected.values[:, :2] / expected.values[:, :2].sum(-1, keepdim=True))


def test_only_the_chosen_experts_count() -> None:
    torch.manual_seed(0)
    params = {
        "gate_proj": torch.randn(3, 6, 4),
        "up_proj": torch.randn(3, 6, 4),
        "down_proj": torch.randn(3, 4, 6),
    }
    x, best, weights = torch.randn(2, 4), torch.tensor([[1, 2], [2, 0]]), torch.tensor([[1.0, 0.0], [0.75, 0.25]])

    def alone(expert: int, row: Tensor) -> Tensor:
        gate, up, down = (params[name][expert] for name in ("gate_proj", "up_proj", "down_proj"))
        return down @ (torch.nn.functional.silu(gate @ row) * (up @ row))

    expected = torch.stack([alone(1, x[0]), 0.25 * alone(0, x[1]) + 0.75 * alone(2, x[1])])
    torch.testing.assert_close(experts(params, x, best, weights, 3), expected)


def test_the_loss_adds_the_balance_and_reports_it() -> None:
    model = build_moe_model(**SIZES)
    params, batch = model.init(seed=1), FAMILY.batch(4)
    outputs = model(params, batch)
    total, weight, aux = moe_causal_lm(outputs, batch, router_aux_loss_coef=0.5)
    plain, labels = af.losses.causal_lm(outputs["logits"], batch)
    assert torch.equal(weight, labels) and aux["balance_loss"] is outputs["balance_loss"]
    torch.testing.assert_close(total / weight, plain / labels + 0.5 * outputs["balance_loss"])
    (_, collected), _ = af.reference_value_and_grad(model, moe_causal_lm, 2, has_aux=True)(params, batch)
    halves = [model(params, {"input_ids": half})["balance_loss"] for half in batch["input_ids"].chunk(2)]
    torch.testing.assert_close(collected["balance_loss"], torch.stack(halves).mean())


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ModelError, match="moe: num_experts_per_tok=0, expected from 1 to num_local_experts=8"):
        build_moe_model(**SIZES, num_experts_per_tok=0)
    with pytest.raises(ModelError, match="moe: num_hidden_layers=0, expected at least 1"):
        build_moe_model(**{**SIZES, "num_hidden_layers": 0})
