"""What an engine makes of a stage: forward, backward, backward_input and backward_weight as functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from autofunc import tree
from autofunc.losses import Loss, LossTerms, evaluate
from autofunc.schedule import StageBytes
from autofunc.splitting import ALONE, Boundary, Setting, Stage


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


Ready = Callable[[int], None]
"""Waits until the parameters of a layer, by its position in the stage, have arrived."""


class Accumulators(Protocol):
    """The sums of one stage's weight gradients, one per trainable holder."""

    @property
    def sums(self) -> list[Tensor]:
        """All of them, to be added to in place."""
        ...

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Add one microbatch's gradients of all holders; None is a zero."""
        ...


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what the gradients of a parameter are summed: fp32 for anything less precise."""
    return torch.float32 if dtype.itemsize < 4 else dtype


@dataclass(frozen=True)
class StageContext:
    """All that an engine may know of a stage when it makes its functions."""

    stage: Stage
    received: Boundary | None  # boundary of the stage before; None for the first stage
    returned: Boundary  # its own boundary
    loss: Loss | None  # None: the output's own
    with_loss: bool  # whether to end in the loss: the last stage, unless outputs are wanted
    with_grads: bool  # whether the backward is wanted
    dtypes: Mapping[str, torch.dtype]  # of every canonical parameter, as it is computed with
    microbatch: Mapping[str, Any]  # an example
    device: torch.device
    setting: Setting = ALONE

    @property
    def input_wants(self) -> list[bool]:
        """For each value received, whether it needs a gradient."""
        return [value.needs_grad for value in self.received.values] if self.received is not None else []

    @cached_property
    def recast(self) -> torch.dtype | None:
        """See `Model.recast`."""
        return self.stage.model.recast(self.dtypes)

    @property
    def parameters(self) -> list[tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each holder's parameter, as this process computes with it."""
        model, shape = self.stage.model, self.setting.partitioning.shape
        return [
            (shape(path, model.spec[path].shape), self.dtypes[model.canonical(path)]) for path in self.stage.holders
        ]  # fmt: skip

    @property
    def accumulator_layouts(self) -> list[tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of the sum of each trainable holder's gradients."""
        return [
            (shape, accumulator_dtype(dtype))
            for (shape, dtype), wanted in zip(self.parameters, self.stage.trainable, strict=True)
            if wanted and self.with_grads
        ]

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of the sums of all trainable holders."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.accumulator_layouts)

    def run(
        self, bound: Mapping[str, Any], inputs: Sequence[Tensor], microbatch: Mapping[str, Any],
        ready: Ready | None = None, around: Callable[[int], AbstractContextManager[None]] = lambda layer: nullcontext(),
    ) -> Any:  # fmt: skip
        """The stage on local tensors; returns what its function made. It runs in `partitioning.running()`.

        Args:
            bound: its parameters, see `Stage.bind`.
            inputs: values of the boundary before.
            microbatch: the microbatch.
            ready: called before each layer, see `StageFunctions.bind`.
            around: what each layer runs in, by its position in the stage.
        """
        x = self.received.assemble(inputs, self.setting.partitioning) if self.received is not None else None
        with around(0):
            entries = self.stage.model.shared(self.stage.layers, self.setting.precision.batch(microbatch), self.recast)
        for number, name in enumerate(self.stage.layers):
            if ready is not None:
                ready(number)
            with around(number):
                x = self.stage.model.run([name], bound, x, entries)
        return self.setting.precision.output(x) if self.stage.is_last else x

    def loss_terms(self, x: Any, microbatch: Mapping[str, Any]) -> LossTerms:
        """The loss of what the last stage made, all of it."""
        whole = self.setting.partitioning.whole
        terms = evaluate(self.loss, x, microbatch)
        aux = tree.map_leaves(lambda leaf: whole(leaf) if isinstance(leaf, Tensor) else leaf, terms.aux)
        return LossTerms(whole(terms.sum), whole(terms.weight), aux)


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

    def evaluate(self, bound: Any, inputs: list[Tensor], microbatch: Microbatch) -> Produced:
        """Forward without keeping anything."""
        ...

    def forward(self, bound: Any, inputs: list[Tensor], microbatch: Microbatch) -> tuple[Produced, Any]:
        """Forward; returns what it made and the residuals."""
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
