"""The functions an engine makes of a stage: forward, backward, backward_input and backward_weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from autofunc import tree
from autofunc.schedule import StageBytes
from autofunc.splitting import Ready


class Microbatch(NamedTuple):
    """One microbatch, with its tensors also as a list in leaf order, made once for all stages."""

    entries: Mapping[str, Any]
    tensors: list[Tensor]

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> Microbatch:
        """Make one from a batch mapping."""
        return cls(entries, [leaf for leaf in tree.leaves_and_spec(dict(entries))[0] if isinstance(leaf, Tensor)])


class Produced(NamedTuple):
    """The results of a stage's forward for one microbatch."""

    outputs: list[Tensor]  # detached tensors for the next stage; the model's outputs from a last stage without a loss
    sum: Tensor | None = None  # from a last stage with a loss: detached 0-dim sum of the loss ...
    weight: Tensor | None = None  # ... its weight, 0-dim fp32 ...
    aux: Any = None  # ... and its detached auxiliary outputs
    state: Sequence[Tensor] = ()  # the stage's new state; empty if it keeps none


class Accumulators(Protocol):
    """The sums of one stage's weight gradients, one per trainable holder."""

    @property
    def sums(self) -> list[Tensor]:
        """All sums, to add to in place."""
        ...

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add one microbatch's gradients of all holders; None means zero."""
        ...


class StageFunctions(Protocol):
    """The functions of one stage for one batch signature. Residuals are opaque to the runtime.

    Shapes and dtypes of inputs, outputs and cotangents are those of the stage's boundaries; values that need no gradient
    have no cotangent. A function may empty the lists of tensors it is given, to free them early.

    Inputs and cotangents may lie in memory that is reused once nothing needs them, as `bytes` tells; so nothing
    else that a function returns may share memory with them.
    """

    @property
    def bytes(self) -> StageBytes:
        """Bytes kept between the functions."""
        ...

    @property
    def exact_bytes(self) -> bool:
        """True if `bytes` has sizes, not only which received values are kept."""
        ...

    @property
    def constants(self) -> Sequence[Tensor]:
        """The stage's own tensors, which residuals may hold."""
        ...

    @property
    def terms(self) -> Sequence[bool]:
        """Per trainable holder: True if its sum is one term of a total over the stage's processes."""
        ...

    def bind(self, leaves: list[Tensor], ready: Ready | None = None) -> Any:
        """Prepare the stage's parameters, local tensors, one per holder.

        If they arrive layer by layer, the forward calls `ready` with a layer's position before it uses its parameters.
        """
        ...

    def evaluate(self, bound: Any, state: Sequence[Tensor], inputs: list[Tensor], microbatch: Microbatch) -> Produced:
        """Run forward without keeping anything. A stage that keeps state may overwrite the old one: it is donated."""
        ...

    def forward(
        self, bound: Any, state: Sequence[Tensor], inputs: list[Tensor], microbatch: Microbatch
    ) -> tuple[Produced, Any]:
        """Run forward; return its results, new state included, and the residuals. `state` is not changed."""
        ...

    def backward(self, residuals: Any, cotangents: list[Tensor], sums: Accumulators) -> list[Tensor]:
        """Run the full backward: add the weight gradients to `sums`, return the cotangents of the inputs."""
        ...

    def backward_input(self, residuals: Any, cotangents: list[Tensor], sums: Accumulators) -> tuple[list[Tensor], Any]:
        """Run the backward of the inputs; return their cotangents and the residuals for `backward_weight`.

        Weight gradients that come with it anyway, such as a norm's, may be added to `sums` here.
        """
        ...

    def backward_weight(self, weight_residuals: Any, sums: Accumulators) -> None:
        """Run the backward of the weights: add their gradients to `sums`."""
        ...
