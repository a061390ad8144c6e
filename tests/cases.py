"""Small models and batches that the laws are tested on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import autofunc as af
from autofunc.runtime.plan import Mode, Plan
from autofunc.tree import flatten
from stages.gpt2 import build_gpt2_model
from stages.mlp import build_mlp_model


def squared_error(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
    """A scalar mean."""
    return (outputs - microbatch["y"]).square().mean()


def make_case(
    name: str, num_stages: int, rows: int, num_blocks: int | None = None
) -> tuple[af.Model, list[Any], Any, dict[str, Tensor]]:
    """(model, stages, loss, batch) of a model with eight layers, or as many blocks as are wanted."""
    generator = torch.Generator().manual_seed(rows)
    if name == "mlp":
        model = build_mlp_model(in_features=6, hidden_features=8, out_features=3, num_blocks=num_blocks or 6, dropout=0.2)
        batch = {
            "x": torch.randn(rows, 6, generator=generator),
            "y": torch.randn(rows, 3, generator=generator),
        }
        return model, cut_evenly(model, num_stages), squared_error, batch
    model = build_gpt2_model(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=num_blocks or 4, n_head=2, embd_pdrop=0.1, attn_pdrop=0.1,
        resid_pdrop=0.1,
    )  # fmt: skip
    ids = torch.randint(0, 17, (rows, 7), generator=generator)
    labels = ids[:, 1:].clone()
    labels[::3, -2:] = -100  # unequal token counts, so that weights differ
    batch = {"input_ids": ids[:, :-1], "labels": labels}
    return model, cut_evenly(model, num_stages), af.losses.causal_lm, batch


@cache
def mesh_of(pp: int = 1, dp_replicate: int = 1, dp_shard: int = 1, cp: int = 1, tp: int = 1) -> DeviceMesh:
    """A mesh of all processes, made once in each: its process groups cost threads."""
    return af.make_mesh(pp, dp_replicate, dp_shard, cp, tp)


@cache
def pp_mesh(num_ranks: int) -> DeviceMesh:
    """A mesh over the pool's processes; with fewer ranks, copies of the pipeline run side by side.

    Made once in each process: a thread of each gloo group wakes a hundred times a second, for as long as the group lives.
    """
    import torch.distributed as dist

    ranks = torch.arange(dist.get_world_size()).view(-1, num_ranks)
    return DeviceMesh("cpu", ranks, mesh_dim_names=("copy", "pp"))["pp"]


def plan_of(pipe: af.Pipeline, params: Mapping[str, Any], batch: Mapping[str, Any], key: Any = None) -> Plan:
    """What a pipeline has built for the training step of a batch."""
    flat = flatten(params)
    return pipe._plans.of(Mode.GRADS, flat, pipe._device(flat), pipe._split(batch, key))[0]


def cut_evenly(model: af.Model, num_stages: int) -> list[Any]:
    """Stages of about as many layers each."""
    names = list(model.layers)
    return af.split(model, [names[round(index * len(names) / num_stages)] for index in range(1, num_stages)])


def assert_same_tree(expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Same paths, same bits."""
    left, right = flatten(expected), flatten(found)
    assert list(left) == list(right)
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        assert torch.equal(left[path], right[path]), f"{path}: {(left[path] - right[path]).abs().max()}"
