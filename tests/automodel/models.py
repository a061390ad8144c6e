"""A model of one's own, whose config is a dataclass, and a folder with small weights of a known one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import autofunc as af
from autofunc import tree


@dataclass
class TinyConfig:
    vocab_size: int = 20
    hidden_size: int = 8
    num_layers: int = 2


class TinyForCausalLM(nn.Module):
    """Tied, with a persistent buffer that is not what the initialiser makes."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(config.num_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(config.hidden_size))
        self.register_buffer("order", torch.arange(config.hidden_size), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids) * self.get_buffer("scale") + self.get_buffer("order")
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        logits: Tensor = self.lm_head(hidden)
        return logits


def ids(rows: int = 4, tokens: int = 6) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 20, (rows, tokens), generator=torch.Generator().manual_seed(1))}


def real(module: nn.Module) -> dict[str, Tensor]:
    """Its parameters by canonical path."""
    return {name: leaf.detach() for name, leaf in module.named_parameters()}


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """The same paths, dtypes and bits."""
    flat = tree.flatten(found)
    assert flat.keys() == expected.keys()
    for name, leaf in expected.items():
        assert flat[name].dtype == leaf.dtype and torch.equal(flat[name], leaf), name


def gradients(model: af.Model, batch: Mapping[str, Any], params: Any) -> dict[str, Tensor]:
    """On two stages in one process."""
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    return tree.flatten(af.value_and_grad(af.pipeline(af.split(model, 2), s))(params, batch)[1])
