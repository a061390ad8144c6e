"""Layers that are functions, cut over tp ranks as graphs: ranks, which are threads, make what the whole makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc import tree
from autofunc.context_parallel.by_layer import by_layer
from autofunc.losses import evaluate
from autofunc.shard import Sharding
from autofunc.shard.cut_over_tp import by_layer as plan_by_layer
from autofunc.shard.cut_over_tp import cut_over_tp
from autofunc.spreading import along, piece_of, put_together
from stages.gpt2 import build_gpt2_model
from stages.llama import build_llama_model
from tests.context_parallel.test_layers import TOKENS, batch_of
from tests.shard.test_one_graph_for_each_rank import ThreadAxis, on_threads


def model_of(name: str) -> af.Model:
    if name == "gpt2":  # with all dropouts, and a tied head
        return build_gpt2_model(
            vocab_size=12, n_positions=TOKENS, n_embd=8, n_layer=2, n_head=2, embd_pdrop=0.1, attn_pdrop=0.1,
            resid_pdrop=0.1,
        )  # fmt: skip
    return build_llama_model(
        vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_qk_norm=True,
    )  # fmt: skip


def gradients(model: af.Model, specialised: Any, params: dict[str, Tensor], batch: Any) -> tuple[Tensor, list[Tensor]]:
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in params.items()}
    trees = model.layer_trees({path: leaves[model.canonical(path)] for path in model.spec})
    x, _ = specialised.run(list(model.layers), trees, None, batch)
    loss = evaluate(af.losses.causal_lm, x, batch).sum
    return loss.detach(), list(torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.parametrize(("name", "sequence"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_ranks_make_what_the_whole_makes(name: str, sequence: bool) -> None:
    model, batch = model_of(name), batch_of(4, key=name == "gpt2")
    params = tree.flatten(model.init(0))
    whole, dtypes = model.specialise(batch), {path: leaf.dtype for path, leaf in params.items()}
    loss, grads = gradients(model, whole, params, batch)
    plan = plan_by_layer(cut_over_tp(model, 2, Sharding()), model, 2, sequence)
    local = by_layer(whole, model, dtypes, batch, plan)

    def work(axis: ThreadAxis) -> Any:
        own = {
            path: piece_of(leaf, plan.cuts[path], 2, axis.rank).clone() if path in plan.cuts else leaf
            for path, leaf in params.items()
        }
        with along({"tp": axis}):
            return gradients(model, local, own, batch)

    found, axis = on_threads(2, work)
    for total, _ in found:
        torch.testing.assert_close(total, loss)
    for place, (path, grad) in enumerate(zip(params, grads, strict=True)):
        parts = [each[place] for _, each in found]
        made = put_together(parts, plan.cuts[path]) if path in plan.cuts else torch.stack(parts).sum(0)
        torch.testing.assert_close(made, grad, rtol=1e-4, atol=1e-5, msg=lambda text, path=path: f"{path}: {text}")
    if not sequence:  # two a block each way, and of the embedding, the head and its logits
        assert axis.counts["all_reduce"] <= 2 * 2 * 2 + 4
