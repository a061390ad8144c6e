"""The graph of one of several cp ranks: its exchanges counted, its residuals measured. It is never run."""

from __future__ import annotations

from collections import Counter

import torch

import autofunc as af
from autofunc.context_parallel.axis import imagined_axis
from autofunc.engine.partition import in_order
from autofunc.pipe import Pipeline
from autofunc.shard.parameters import Parameters
from stages.llama import build_llama_model
from tests.cases import plan_of


def pipe_of(blocks: int, tokens: int, size: int, method: str = "ring") -> tuple[Pipeline, dict[str, torch.Tensor]]:
    model = build_llama_model(
        vocab_size=32, hidden_size=128, intermediate_size=352, num_hidden_layers=blocks, num_attention_heads=4
    )  # fmt: skip
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=1)
    pipe = af.pipeline(af.split(model), s, loss=af.losses.causal_lm)
    parameters = Parameters(pipe.stages, model, None, pipe.sharding, imagined_axis(size, method))
    pipe = Pipeline(
        pipe.stages, s, pipe.loss, None, pipe.options, None, pipe.sharding, pipe.transfers, parameters=parameters
    )  # fmt: skip
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    return pipe, {"input_ids": ids, "labels": ids}


def counted(blocks: int) -> tuple[Counter[str], Counter[str]]:
    """Operators that exchange something in the forward and the backward of one microbatch."""
    pipe, batch = pipe_of(blocks, 16, 2)
    stage = plan_of(pipe, pipe.init(0, "meta"), batch).functions[0]
    order = list(stage.joint.graph.nodes)
    forward, backward = (
        Counter(
            name
            for node in in_order(piece, order)
            if (name := str(node.target)).startswith("autofunc.")
            and name.split(".")[1] not in ("own_tokens", "own_tokens_backward", "on_first")
        )
        for piece in (stage.pieces.forward, stage.pieces.backward)
    )
    return forward, backward


def test_a_block_adds_one_attention_each_way() -> None:
    one, two = counted(1), counted(2)
    assert two[0] - one[0] == {"autofunc.context_attention.default": 1}
    assert two[1] - one[1] == {"autofunc.context_attention_backward.default": 1}
    assert len(one[0]) == len(one[1]) == 1, "and no other exchange"


def test_a_rank_keeps_residuals_of_its_tokens_only() -> None:
    whole, half, quarter = (
        pipe.memory(pipe.init(0, "meta"), batch)[0].residuals
        for pipe, batch in (pipe_of(1, 2048, size) for size in (1, 2, 4))
    )
    assert half <= 0.501 * whole and quarter <= 0.251 * whole
