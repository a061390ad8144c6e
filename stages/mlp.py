"""A residual MLP: the smallest model with everything a pipeline has to handle.

Shapes: B rows, D features, H hidden features, C outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

import autofunc as af
from stages.ranges import MOST_LAYERS, check_probabilities, check_sizes


@dataclass(frozen=True)
class MLPConfig:
    """Sizes of the model."""

    in_features: int = 16
    hidden_features: int = 32
    out_features: int = 8
    num_blocks: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_sizes("mlp", self, ("in_features", "hidden_features", "out_features"))
        check_sizes("mlp", self, ("num_blocks",), MOST_LAYERS)
        check_probabilities("mlp", self, ("dropout",))


def linear_init(key: af.random.InitKey, name: str, rows: int, columns: int) -> dict[str, Tensor]:
    """Return a linear map from `columns` to `rows` features, uniform within 1/sqrt(columns) like `torch.nn.Linear`."""
    bound = 1.0 / math.sqrt(columns)
    key = key.at(name)
    return {
        "weight": key.uniform("weight", (rows, columns), -bound, bound),
        "bias": key.uniform("bias", (rows,), -bound, bound),
    }


def linear(params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Compute `x @ weight.T + bias`."""
    return functional.linear(x, params["weight"], params["bias"])


def build_mlp_model(
    in_features: int = 16,
    hidden_features: int = 32,
    out_features: int = 8,
    num_blocks: int = 4,
    dropout: float = 0.0,
) -> af.Model:
    """Build an MLP with layers `embed`, `blocks.0` ..., `head`. The batch has "x" (B, D); the output is (B, C).

    Args:
        in_features: D.
        hidden_features: H, the width of the residual stream and of each block.
        out_features: C.
        num_blocks: number of residual blocks.
        dropout: probability of dropping an element of a block's branch.

    Raises:
        ModelError: for sizes and probabilities out of range.
    """
    config = MLPConfig(in_features, hidden_features, out_features, num_blocks, dropout)
    layers = {
        "embed": af.Layer(
            init=lambda key: linear_init(key, "proj", config.hidden_features, config.in_features),
            apply=lambda params, x, batch: linear(params, batch["x"]),
        )
    }
    for index in range(config.num_blocks):
        layers[f"blocks.{index}"] = _block(config, f"blocks.{index}")
    layers["head"] = af.Layer(
        init=lambda key: linear_init(key, "proj", config.out_features, config.hidden_features),
        apply=lambda params, x, batch: linear(params, x),
    )
    return af.Model(layers, config=config)


def _block(config: MLPConfig, name: str) -> af.Layer:
    width = config.hidden_features

    def init(key: af.random.InitKey) -> dict[str, Any]:
        return {
            "norm": {"weight": key.ones("norm.weight", (width,)), "bias": key.zeros("norm.bias", (width,))},
            "up": linear_init(key, "up", width, width),
            "down": linear_init(key, "down", width, width),
        }

    def apply(params: Mapping[str, Any], x_BH: Tensor, batch: Mapping[str, Any]) -> Tensor:
        y_BH = functional.layer_norm(x_BH, (width,), params["norm"]["weight"], params["norm"]["bias"])
        y_BH = linear(params["down"], functional.gelu(linear(params["up"], y_BH)))
        return x_BH + af.random.dropout(y_BH, config.dropout, batch, name)

    return af.Layer(init=init, apply=apply)
