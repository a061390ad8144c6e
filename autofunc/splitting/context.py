"""A stage in its surroundings: everything needed to run it, to infer its outputs and to capture it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.context_parallel.by_layer import by_layer
from autofunc.context_parallel.specialised import OverTokens, over_tokens
from autofunc.fingerprint import Fingerprint
from autofunc.losses import Loss, LossTerms, evaluate
from autofunc.model import Model, Specialised
from autofunc.splitting.boundary import Boundary, Value, describe
from autofunc.splitting.setting import ALONE, Setting
from autofunc.splitting.stage import Stage
from autofunc.spread import exchanging, summing
from autofunc.spreading import AxisPlan
from autofunc.surroundings import surroundings

Layout = tuple[torch.Size, torch.dtype]
"""Shape and dtype of a tensor."""

Ready = Callable[[int], None]
"""Waits until the parameters of a layer, given by its position in the stage, have arrived."""


@dataclass(frozen=True)
class StageContext:
    """A stage in its surroundings, for one batch signature."""

    stage: Stage
    specialised: Specialised  # the model, for microbatches as layers see them
    received: Boundary | None  # the output of the stage before; None for the first stage
    loss: Loss | None  # None: the loss in the model's own output
    with_loss: bool  # whether to end in the loss: true for the last stage, unless outputs are wanted
    with_grads: bool  # whether a backward will run
    dtypes: Mapping[str, torch.dtype]  # of every canonical parameter, as it is computed with
    microbatch: Mapping[str, Any]  # an example; only shapes, strides, dtypes, devices and plain values matter
    device: torch.device
    setting: Setting = ALONE
    strides: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # of canonical parameters that are not contiguous
    keeps_state: bool = True  # whether the new state is wanted

    @property
    def input_wants(self) -> list[bool]:
        """For each received value, whether it needs a gradient."""
        return [value.needs_grad for value in self.received.values] if self.received is not None else []

    @property
    def parameters(self) -> list[Layout]:
        """Each holder's layout, as this process computes with it."""
        model, shape = self.stage.model, self.setting.partitioning.shape
        return [
            (shape(path, model.spec[path].shape), self.dtypes[model.canonical(path)]) for path in self.stage.holders
        ]  # fmt: skip

    def empty_parameters(self) -> list[Tensor]:
        """Allocate a tensor like each holder's parameter, without values."""
        model, made = self.stage.model, []
        for path, (shape, dtype) in zip(self.stage.holders, self.parameters, strict=True):
            strides = self.strides.get(model.canonical(path))
            leaf = torch.empty(shape, dtype=dtype, device=self.device)
            made.append(leaf if strides is None else leaf.as_strided(shape, strides))
        return made

    def empty_state(self) -> list[Tensor]:
        """Allocate a tensor like each of the stage's states, without values."""
        spec = self.stage.model.state_spec
        return [torch.empty(spec[path].shape, dtype=spec[path].dtype, device=self.device) for path in self.stage.states]

    @property
    def accumulator_layouts(self) -> list[Layout]:
        """The layout of each trainable holder's gradient accumulator."""
        return [
            (shape, accumulator_dtype(dtype))
            for (shape, dtype), wanted in zip(self.parameters, self.stage.trainable, strict=True)
            if wanted and self.with_grads
        ]

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of all gradient accumulators."""
        return sum(shape.numel() * dtype.itemsize for shape, dtype in self.accumulator_layouts)

    def run(
        self, bound: Mapping[str, Any], inputs: Sequence[Tensor], microbatch: Mapping[str, Any], state: Sequence[Tensor],
        ready: Ready | None = None, around: Callable[[int], AbstractContextManager[None]] = lambda layer: nullcontext(),
    ) -> tuple[Any, list[Tensor]]:  # fmt: skip
        """Run the stage on local tensors, inside `partitioning.running()`; return its function's output and the new state.

        Args:
            bound: its parameters, see `Stage.bind`.
            inputs: values of the stage before.
            microbatch: the microbatch.
            state: the stage's state, in the order of `Stage.states`.
            ready: called before each layer with its position in the stage.
            around: returns the context that each layer runs in, by its position in the stage.
        """
        x = self.received.assemble(inputs, self.setting.partitioning) if self.received is not None else None
        states = self.stage.bind_state(state)
        with summing(self.setting.data), exchanging(self.setting.experts):
            with around(0):  # a balance loss counts tokens of all expert ranks, and for that needs their masks too
                entries = self.specialised.share(self.stage.layers, self.setting.precision.batch(microbatch))
            for number, name in enumerate(self.stage.layers):
                if ready is not None:
                    ready(number)
                with around(number):
                    x, states = self.specialised.layer(name, bound[name], x, entries, states)
        return self.setting.precision.output(x) if self.stage.is_last else x, self.stage.state_leaves(states)

    def describe(self, x: Any) -> tuple[Boundary, list[Tensor]]:
        """Describe the output of `run` as a boundary, and return its tensors as sent on; the last stage's are whole."""
        partitioning = self.setting.partitioning
        x = self.with_all_tokens(x)
        if self.stage.is_last:
            x = tree.map_leaves(lambda leaf: partitioning.whole(leaf) if isinstance(leaf, Tensor) else leaf, x)
        return describe(x, partitioning)

    def with_all_tokens(self, x: Any) -> Any:
        """Return the output of `run`; for the last stage, with the tokens of all cp ranks, all of which must call it."""
        return self.specialised.whole(x) if self.stage.is_last and isinstance(self.specialised, OverTokens) else x

    def loss_terms(self, x: Any, microbatch: Mapping[str, Any]) -> LossTerms:
        """Compute the loss of the last stage's output: the whole loss, or over cp ranks the term of this rank's tokens."""
        if isinstance(self.specialised, OverTokens):
            return self.specialised.loss_terms(x, microbatch)
        whole = self.setting.partitioning.whole
        terms = evaluate(self.loss, x, microbatch)
        aux = tree.map_leaves(lambda leaf: whole(leaf) if isinstance(leaf, Tensor) else leaf, terms.aux)
        return LossTerms(whole(terms.sum), whole(terms.weight), aux)

    @cached_property
    def fingerprint(self) -> Hashable:
        """Equal for stages that do the same to values of the same shapes, in any pipeline of this process.

        Layer names are left out, unless the microbatch has a key: randomness depends on them.
        """
        stage, model = self.stage, self.stage.model
        random = self.microbatch.get(self.stage.model.key_name) is not None
        labels = stage.layers if random else [f"layer {number}" for number in range(len(stage.layers))]
        params = tuple(
            tuple(self._parameter_key(path) for path in stage.holders if model.layer_of(path) == name)
            for name in stage.layers
        )
        leaves, spec = tree.leaves_and_spec(dict(self.microbatch))
        microbatch = tuple(
            (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
            if isinstance(leaf, Tensor)
            else Fingerprint().of(leaf)
            for leaf in leaves
        )
        states = [(model.layer_of(path), path, model.state_spec[path]) for path in stage.states]
        state = tuple(
            (stage.layers.index(layer or ""), model.inner_path(path), tuple(leaf.shape), leaf.dtype)
            for layer, path, leaf in states
        )
        what = (self.with_loss, self.with_grads, self.keeps_state, self.device, stage.is_last, state)
        return (
            self.specialised.fingerprints(stage.layers, labels), tuple(labels), params, _boundary_key(self.received),
            repr(spec), microbatch, Fingerprint().of(self.loss) if self.with_loss else None, what,
            self.setting.partitioning.fingerprint, self.setting.precision,
            self.setting.data.fingerprint if self.setting.data is not None else None,
            self.setting.experts.fingerprint if self.setting.experts is not None else None, surroundings(),
        )  # fmt: skip

    def _parameter_key(self, path: str) -> Hashable:
        model, shape = self.stage.model, self.stage.model.spec[path].shape
        return (
            model.inner_path(path), tuple(shape), tuple(self.setting.partitioning.shape(path, shape)),
            self.dtypes[model.canonical(path)], model.is_trainable(path), self.strides.get(model.canonical(path)),
        )  # fmt: skip


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a parameter's gradients accumulate: fp32 for anything less precise."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def specialise(
    model: Model, dtypes: Mapping[str, torch.dtype], microbatch: Mapping[str, Any], setting: Setting = ALONE,
    *, training: bool = True,
) -> tuple[Specialised, dict[str, torch.dtype]]:  # fmt: skip
    """Specialise a model to microbatches, as its layers see them in a setting; return it with the dtypes of computation.

    Args:
        model: the model.
        dtypes: stored dtypes of every canonical parameter; see `parameter_dtypes`.
        microbatch: one microbatch with real tensors; only shapes, dtypes and devices matter.
        setting: the surroundings of the stages.
        training: see `Model.specialise`.
    """
    computed = {path: setting.precision.parameter_dtype(dtype) for path, dtype in dtypes.items()}
    over, seen = setting.partitioning.over, setting.precision.batch(microbatch)
    specialised = model.specialise(seen, computed, training=training, over=over)
    if setting.context is None:
        return specialised, computed
    if isinstance(over, AxisPlan) and over.by_layer:
        with summing(setting.data):
            specialised = by_layer(specialised, model, computed, seen, over)
    leaves = {
        path: torch.empty(
            setting.partitioning.shape(path, leaf.shape), dtype=computed[model.canonical(path)], device="meta"
        )
        for path, leaf in model.spec.items()
    }
    with setting.partitioning.running(), summing(setting.data):
        other_axis = getattr(over, "axis", None)
        return over_tokens(specialised, model, leaves, seen, setting.context, other_axis), computed


def _boundary_key(boundary: Boundary | None) -> Hashable:
    if boundary is None:
        return None
    leaves = (
        (leaf.shape, leaf.dtype, leaf.needs_grad, leaf.placement) if isinstance(leaf, Value) else Fingerprint().of(leaf)
        for leaf in boundary.leaves
    )
    return repr(boundary.spec), tuple(leaves)
