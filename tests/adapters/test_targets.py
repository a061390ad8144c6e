"""Which weights get adapters, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.errors import ModelError
from autofunc.tree import flatten
from tests.adapters.cases import bases, with_values
from tests.cases import assert_same_tree

BLOCK = "model.layers.0."


def named(name: str, targets: Any, **options: Any) -> list[str]:
    """The weights of the first block, and those outside of blocks, that get adapters."""
    base, _, _ = bases()[name]
    return [path for path in af.lora(base, targets, **options).plan if ".1." not in path]


def test_targets_are_names_or_patterns_of_which_the_end_is_enough() -> None:
    attention = [f"{BLOCK}self_attn.{part}_proj.weight" for part in "koqv"]
    mlp = [f"{BLOCK}mlp.{part}_proj.weight" for part in ("down", "gate", "up")]
    _, _, batch = bases()["layers"]
    cases: list[tuple[list[str], list[str]]] = [
        (named("llama", ["q_proj"]), [attention[2]]),
        (named("llama", "q_proj"), [attention[2]]),
        (named("llama", [f"{BLOCK}self_attn.[qv]_proj"]), [attention[2], attention[3]]),
        (named("llama", ["*self_attn*", "lm_head"]), ["lm_head.weight", *attention]),
        (named("llama", "all-linear"), [*mlp, *attention]),
        (named("llama", "all-linear", exclude=["mlp.*", "o_proj"]), [attention[0], *attention[2:]]),
        (named("gpt2", "all-linear"), [f"transformer.h.0.{part}.weight" for part in
                                       ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]),
        (named("layers", ["attn.q", "mlp.*"]), [f"h.0.{part}.weight" for part in ("attn.q", "mlp.fc", "mlp.proj")]),
        (named("layers", "all-linear", example_batch=batch), [f"h.0.{part}.weight" for part in
                                       ("attn.k", "attn.proj", "attn.q", "attn.v", "mlp.fc", "mlp.proj")]),
    ]  # fmt: skip
    for found, expected in cases:
        assert found == expected


def test_what_fits_no_adapter_is_refused_with_what_would() -> None:
    llama, layers = bases()["llama"][0], bases()["layers"][0]
    adapted = af.lora(llama, ["q_proj"])
    wrong: list[tuple[Callable[[], Any], str]] = [
        (lambda: af.lora(llama, ["q_prj"]), "'q_prj' matches no weight; did you mean q_proj"),
        (lambda: af.lora(llama, ["input_layernorm"]), r"matches 'model.layers.0.input_layernorm.weight' of shape \(16,\)"),
        (lambda: af.lora(llama, ["embed_tokens"]), "'model.embed_tokens' is a lookup table.*modules_to_save"),
        (lambda: af.lora(layers, "all-linear"), "give example_batch=..., or name the targets"),
        (lambda: af.lora(llama, ["q_proj"], exclude=["q_proj"]), "leaves no weight to adapt"),
        (lambda: af.lora(llama, ["q_proj"], rank=0), "rank=0; expected a whole number of at least 1"),
        (lambda: af.lora(llama, ["q_proj"], alpha=0), "alpha=0; expected a number above 0"),
        (lambda: af.lora(llama, ["q_proj"], dropout=1), r"dropout=1; expected a probability in \[0, 1\)"),
        (lambda: af.lora(adapted, ["v_proj"]), "already has adapters; merge them first"),
        (lambda: af.lora(llama, ["lm_head"], modules_to_save=["lm_head"]), "is in targets and in modules_to_save"),
        (lambda: af.lora(llama, ["q_proj"], modules_to_save=["lmhead"]), "'lmhead' matches no part; did you mean lm_head"),
        (lambda: af.merge_lora(llama, llama.init()), "takes a model returned by af.lora"),
        (lambda: af.save_adapter(adapted, {}, "nowhere"), "params have no .*lora_A.weight"),
    ]
    for call, words in wrong:
        with pytest.raises(ModelError, match=words):
            call()


def test_a_layer_that_is_run_again_is_refused() -> None:
    def apply(params: Any, x: Any, batch: Any) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: (x @ params["w"]).tanh().sum(), batch["x"], use_reentrant=False)

    layer = af.Layer(init=lambda key: {"w": key.normal("w", (3, 3))}, apply=apply)
    model = af.lora(af.Model({"layer": layer}), ["w"])
    with pytest.raises(ModelError, match=r"calls torch.utils.checkpoint.*remat='layer'"):
        af.reference_value_and_grad(model, lambda out, _: out, 1)(model.init(), {"x": torch.ones(2, 3)})


class Tied(nn.Module):
    """One part runs twice, and another has its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.again = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        self.other.weight = self.again.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(self.again(x)).tanh()
        return {"loss": self.other(x).square().mean()}


def test_a_part_that_runs_twice_has_one_adapter_and_a_tied_weight_two() -> None:
    torch.manual_seed(0)
    base, batch = af.from_module(Tied(), {"x": torch.randn(4, 4)}), {"x": torch.randn(4, 4)}
    model = af.lora(base, ["again", "blocks.1"], rank=2)
    assert {path for path in flatten(model.init(seed=0)) if "lora" in path} == {
        f"{part}.lora_{factor}.weight" for part in ("again", "blocks.1") for factor in "AB"
    }
    params = with_values(model)
    expected_loss, expected = af.reference_value_and_grad(model, None, 2)(params, batch)
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2)
    loss, found = af.value_and_grad(af.pipeline(af.split(model, ["blocks.1"]), s))(params, batch)
    assert torch.equal(loss, expected_loss)
    assert_same_tree(expected, found)
    with pytest.raises(ModelError, match=r"'again.weight' is tied to 'other.weight', which its adapter does not change"):
        af.merge_lora(model, params)


@pytest.mark.parametrize("name", ["llama", "gpt2", "layers"])
def test_merged_weights_do_what_factors_did(name: str) -> None:
    base, _, batch = bases()[name]
    model = af.lora(base, ["*.mlp.*"], rank=2, use_rslora=True)
    params = with_values(model)
    plain, merged = af.merge_lora(model, params)
    assert plain is base and list(flatten(merged)) == list(flatten(base.init()))
    found, expected = plain(merged, batch), model(params, batch)
    if name != "layers":
        found, expected = found["logits"], expected["logits"]
        assert torch.equal(model.to_module(params).eval()(**batch).logits, found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(
        found, base(base.init(), batch)["logits"] if name != "layers" else base(base.init(seed=7), batch)
    )
