"""What an engine makes of a stage: forward, backward, backward_input and backward_weight as functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Produced(NamedTuple):
    """What a stage's forward makes for one microbatch."""

    outputs: list[Tensor]  # detached tensors for the next stage; of the last stage without a loss: the model's output
    sum: Tensor | None = None  # of the last stage with a loss: detached 0-dim sum of the loss ...
    weight: Tensor | None = None  # ... its weight, 0-dim fp32 ...
    aux: Any = None  # ... and its detached auxiliary outputs


class StageFunctions(Protocol):
    """The functions of one stage for one batch signature. Residuals are opaque to the runtime.

    Shapes and dtypes of inputs, outputs and cotangents are those of the stage's boundaries, values that need no gradient
    left out of the cotangents. Weight gradients come in the order of the stage's trainable holders; None is a zero.
    """

    def bind(self, leaves: list[Tensor]) -> Any:
        """Prepare the stage's parameters, once per step."""
        ...

    def evaluate(self, bound: Any, inputs: list[Tensor], microbatch: Mapping[str, Any]) -> Produced:
        """Forward without keeping anything."""
        ...

    def forward(self, bound: Any, inputs: list[Tensor], microbatch: Mapping[str, Any]) -> tuple[Produced, Any]:
        """Forward; returns what it made and the residuals."""
        ...

    def backward(self, residuals: Any, cotangents: list[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Full backward; returns the cotangents of the inputs and the weight gradients."""
        ...

    def backward_input(self, residuals: Any, cotangents: list[Tensor]) -> tuple[list[Tensor], Any]:
        """Backward of the inputs only; returns their cotangents and the residuals for `backward_weight`."""
        ...

    def backward_weight(self, weight_residuals: Any) -> list[Tensor | None]:
        """Backward of the weights; returns their gradients."""
        ...
