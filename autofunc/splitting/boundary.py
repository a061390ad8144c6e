"""What crosses the boundaries between stages, inferred on fake tensors: nothing is allocated, nothing is negotiated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.errors import ModelError
from autofunc.losses import Loss, evaluate
from autofunc.model import Model
from autofunc.schedule import Edge
from autofunc.splitting.fake import fake_mode, naming_errors
from autofunc.splitting.stage import Stage


@dataclass(frozen=True)
class Value:
    """One tensor of what a stage hands on for one microbatch."""

    producer: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of one microbatch's tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Boundary:
    """What a stage returns: a pytree whose tensors are values and whose other leaves are constants."""

    spec: tree.TreeSpec
    leaves: tuple[Any, ...]  # a Value, or the constant itself

    @property
    def values(self) -> tuple[Value, ...]:
        """The tensors, in leaf order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Value))

    @property
    def num_bytes(self) -> int:
        """Bytes of one microbatch."""
        return sum(value.num_bytes for value in self.values)

    def tensors(self, x: Any) -> list[Tensor]:
        """Flatten what the stage returned into its tensors."""
        return [leaf for leaf in tree.leaves_and_spec(x)[0] if isinstance(leaf, Tensor)]

    def assemble(self, tensors: Sequence[Tensor]) -> Any:
        """Inverse of `tensors`: put the constants back."""
        remaining = iter(tensors)
        return tree.from_leaves([next(remaining) if isinstance(leaf, Value) else leaf for leaf in self.leaves], self.spec)


@dataclass(frozen=True)
class Boundaries:
    """What every stage returns for one batch signature, and what the loss makes of the last."""

    stages: tuple[Boundary, ...]  # one per stage; the last is the model's output
    aux: Boundary | None  # of one microbatch; None when there is no loss, or it has no aux

    def edges(self) -> tuple[Edge, ...]:
        """The connections between stages; `needs_grad` where any of the values does."""
        return tuple(
            Edge(index, index + 1, any(value.needs_grad for value in boundary.values))
            for index, boundary in enumerate(self.stages[:-1])
        )


def infer_boundaries(
    stages: Sequence[Stage],
    params: Mapping[str, Tensor],
    microbatch: Mapping[str, Any],
    loss: Loss | None = None,
    *,
    device: torch.device | None = None,
    with_loss: bool = True,
) -> Boundaries:
    """Run all stages on fake tensors.

    Args:
        stages: all stages of the model.
        params: this rank's flat parameters; those of other ranks are assumed to have the same floating-point dtype.
        microbatch: one microbatch.
        loss: run on the last stage's output; None means the output's own loss.
        device: where parameters live; the CPU by default.
        with_loss: False leaves the loss out.

    Raises:
        ModelError: when a stage fails, naming it and its layers; errors of this library pass as they are.
    """
    with fake_mode() as mode, torch.enable_grad():
        fakes = _fake_parameters(stages[0], params, device or torch.device("cpu"))
        batch = tree.map_leaves(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, dict(microbatch))
        x: Any = None
        found: list[Boundary] = []
        for stage in stages:
            with naming_errors(stage.title):
                x = stage.run(stage.bind(stage.leaves(fakes)), x, batch)
            found.append(_describe(stage.index, x))
            x = tree.map_leaves(_cut_graph, x) if stage is not stages[-1] else x
        if not with_loss:
            return Boundaries(tuple(found), None)
        with naming_errors("the loss"):
            terms = evaluate(loss, x, batch)
        aux = _describe(len(stages), terms.aux) if terms.aux is not None else None
    return Boundaries(tuple(found), aux)


def parameter_dtypes(model: Model, params: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Dtype of every canonical path; parameters of other ranks are taken to have this rank's floating dtype.

    Args:
        model: the whole model.
        params: this rank's flat parameters.
    """
    floating = next((leaf.dtype for leaf in params.values() if leaf.is_floating_point()), torch.float32)
    dtypes = {}
    for path, spec in model.spec.items():
        canonical = model.canonical(path)
        default = floating if spec.is_floating_point() else spec.dtype
        dtypes[canonical] = params[canonical].dtype if canonical in params else default
    return dtypes


def _fake_parameters(stage: Stage, params: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """A fake tensor for every canonical parameter of the whole model; call inside a fake mode."""
    model = stage.model
    dtypes = parameter_dtypes(model, params)
    fakes = {}
    for path, spec in model.spec.items():
        canonical = model.canonical(path)
        known = params.get(canonical)
        if known is not None and known.shape != spec.shape:
            raise ModelError(f"parameter {canonical!r} has shape {tuple(known.shape)}; expected {tuple(spec.shape)}")
        fakes[canonical] = torch.empty(
            spec.shape, dtype=dtypes[canonical], device=device, requires_grad=model.is_trainable(path)
        )
    return fakes


def _describe(producer: int, x: Any) -> Boundary:
    leaves, spec = tree.leaves_and_spec(x)
    names = tree.leaf_names(x, "x")
    described = (
        Value(producer, name, tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
        for name, leaf in zip(names, leaves, strict=True)
    )
    return Boundary(spec, tuple(described))


def _cut_graph(leaf: Any) -> Any:
    return leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
