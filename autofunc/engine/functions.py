"""What an engine makes of a stage: forward, backward, backward_input and backward_weight as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from autofunc import tree
from autofunc.schedule import StageBytes
from autofunc.splitting import Ready


class Microbatch(NamedTuple):
    """One microbatch, with its tensors also as a list in leaf order, which is worked out once for all stages."""

    entries: Mapping[str, Any]
    tensors: list[Tensor]

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> Microbatch:
        """From a mapping."""
        return cls(entries, [leaf for leaf in tree.leaves_and_spec(dict(entries))[0] if isinstance(leaf, Tensor)])


class Produced(NamedTuple):
    """What a stage's forward makes for one microbatch."""

    outputs: list[Tensor]  # detached tensors for the next stage; of the last stage without a loss: the model's output
    sum: Tensor | None = None  # of the last stage with a loss: detached 0-dim sum of the loss ...
    weight: Tensor | None = None  # ... its weight, 0-dim fp32 ...
    aux: Any = None  # ... and its detached auxiliary outputs
    state: Sequence[Tensor] = ()  # the stage's new state, where it is wanted


class Accumulators(Protocol):
    """The sums of one stage's weight gradients, one per trainable holder."""

    @property
    def sums(self) -> list[Tensor]:
        """All of them, to be added to in place."""
        ...

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add one microbatch's gradients of all holders; None is a zero."""
        ...


class StageFunctions(Protocol):
    """The functions of one stage for one batch signature. Residuals are opaque to the runtime.

    Shapes and dtypes of inputs, outputs and cotangents are those of the stage's boundaries, values that need no gradient
    left out of the cotangents. Lists of tensors may be emptied by the function they are given to, to free them early.

    Inputs and cotangents may lie in memory that is reused once nothing needs them any more, as `bytes` says; so nothing
    else that a function returns may share memory with them.
    """

    @property
    def bytes(self) -> StageBytes:
        """What is kept between the functions."""
        ...

    @property
    def exact_bytes(self) -> bool:
        """Whether `bytes` tells sizes too, and not only which received values are kept."""
        ...

    @property
    def constants(self) -> Sequence[Tensor]:
        """Tensors of its own, which residuals may hold."""
        ...

    @property
    def terms(self) -> Sequence[bool]:
        """For each trainable holder, whether its sum is one of several that the processes of this stage have."""
        ...

    def bind(self, leaves: list[Tensor], ready: Ready | None = None) -> Any:
        """Prepare the stage's parameters: local tensors, one per holder.

        Where they arrive by layer, the forward calls `ready` with a layer's position before it uses that layer's.
        """
        ...

    def evaluate(self, bound: Any, state: Sequence[Tensor], inputs: list[Tensor], microbatch: Microbatch) -> Produced:
        """Forward without keeping anything. Where new state is wanted, the old one is given away, and may be written to."""
        ...

    def forward(
        self, bound: Any, state: Sequence[Tensor], inputs: list[Tensor], microbatch: Microbatch
    ) -> tuple[Produced, Any]:
        """Forward; returns what it made, the stage's new state included, and the residuals. `state` stays as it is."""
        ...

    def backward(self, residuals: Any, cotangents: list[Tensor], sums: Accumulators) -> list[Tensor]:
        """Full backward: adds the weight gradients to `sums`; returns the cotangents of the inputs."""
        ...

    def backward_input(self, residuals: Any, cotangents: list[Tensor], sums: Accumulators) -> tuple[list[Tensor], Any]:
        """Backward of the inputs; returns their cotangents and the residuals for `backward_weight`.

        Weight gradients that come with it anyway, such as a norm's, may be added to `sums` here.
        """
        ...

    def backward_weight(self, weight_residuals: Any, sums: Accumulators) -> None:
        """Backward of the weights: adds their gradients to `sums`."""
        ...
