"""What crosses the boundaries between stages, inferred on fake tensors: nothing is allocated, nothing is negotiated."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.fake import fake_mode, naming_errors
from autofunc.losses import Loss, evaluate
from autofunc.model import Model
from autofunc.schedule import Edge
from autofunc.splitting.setting import ALONE, WHOLE, Partitioning, Setting
from autofunc.splitting.stage import Stage


@dataclass(frozen=True)
class Value:
    """One tensor of what a stage hands on for one microbatch: this process's part of it."""

    producer: int
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool
    placement: Hashable = None  # how it lies over the processes that compute the stage together; None: whole on each

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

    def tensors(self, x: Any, partitioning: Partitioning = WHOLE) -> list[Tensor]:
        """Flatten what the stage returned into its tensors, as they are handed on."""
        leaves = [leaf for leaf in tree.leaves_and_spec(x)[0] if isinstance(leaf, Tensor)]
        return [
            partitioning.whole(leaf) if value.placement is None else partitioning.handed_on(leaf, value.placement)[0]
            for leaf, value in zip(leaves, self.values, strict=True)
        ]

    def assemble(self, tensors: Sequence[Tensor], partitioning: Partitioning = WHOLE) -> Any:
        """Inverse of `tensors`: put the constants back."""
        remaining = iter(tensors)
        leaves = [
            partitioning.received(next(remaining), leaf.placement) if isinstance(leaf, Value) else leaf
            for leaf in self.leaves
        ]
        return tree.from_leaves(leaves, self.spec)


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
    setting: Setting = ALONE,
) -> Boundaries:
    """Run all stages on fake tensors.

    Args:
        stages: all stages of the model.
        params: flat parameters, of which only dtypes matter; for those that are not there see `parameter_dtypes`.
        microbatch: one microbatch.
        loss: run on the last stage's output; None means the output's own loss.
        device: where parameters live; the CPU by default.
        with_loss: False leaves the loss out.
        setting: what surrounds the stages.

    Raises:
        ModelError: when a stage fails, naming it and its layers; errors of this library pass as they are.
    """
    partitioning, precision = setting.partitioning, setting.precision
    _ = stages[0].model.spec  # worked out once, and not on fake tensors, which would stay
    model = stages[0].model
    recast = model.recast(
        {path: precision.parameter_dtype(dtype) for path, dtype in parameter_dtypes(model, params).items()}
    )
    model.prepare(precision.batch(microbatch), recast)
    with fake_mode() as mode, torch.enable_grad(), partitioning.running():
        fakes = fake_parameters(stages[0], params, device or torch.device("cpu"), setting)
        batch = tree.map_leaves(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, dict(microbatch))
        entries = precision.batch(batch)
        x: Any = None
        found: list[Boundary] = []
        for stage in stages:
            with naming_errors(stage.title):
                x = stage.run(stage.bind([fakes[path] for path in stage.holders]), x, entries, recast)
                if stage is stages[-1]:
                    x = precision.output(x)
                    whole = tree.map_leaves(lambda leaf: partitioning.whole(leaf) if isinstance(leaf, Tensor) else leaf, x)
                    boundary, _ = _handed_on(stage.index, whole, partitioning)
                else:
                    boundary, x = _handed_on(stage.index, x, partitioning)
            found.append(boundary)
        if not with_loss:
            return Boundaries(tuple(found), None)
        with naming_errors("the loss"):
            terms = evaluate(loss, x, batch)
        aux = _handed_on(len(stages), terms.aux, WHOLE)[0] if terms.aux is not None else None
    return Boundaries(tuple(found), aux)


def parameter_dtypes(model: Model, params: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    """Dtype of every canonical path.

    Parameters that are not given are taken to have the model's own dtypes where those given have theirs, else theirs.

    Args:
        model: the whole model.
        params: flat parameters.
    """
    known = {path: leaf for path, leaf in params.items() if leaf.is_floating_point() and path in model.spec}
    recast = next((leaf.dtype for path, leaf in known.items() if leaf.dtype != model.spec[path].dtype), None)
    dtypes = {}
    for path, spec in model.spec.items():
        canonical = model.canonical(path)
        default = recast if recast is not None and spec.is_floating_point() else spec.dtype
        dtypes[canonical] = params[canonical].dtype if canonical in params else default
    return dtypes


def fake_parameters(
    stage: Stage, params: Mapping[str, Tensor], device: torch.device, setting: Setting
) -> dict[str, Tensor]:  # fmt: skip
    """A fake tensor for every parameter of the whole model, as a layer sees it; call inside a fake mode."""
    model = stage.model
    dtypes = parameter_dtypes(model, params)
    fakes = {}
    for path, spec in model.spec.items():
        canonical = model.canonical(path)
        dtype = setting.precision.parameter_dtype(dtypes[canonical])
        local = torch.empty(setting.partitioning.shape(path, spec.shape), dtype=dtype, device=device)
        fakes[path] = setting.partitioning.parameter(path, local).requires_grad_(model.is_trainable(path))
    return fakes


def _handed_on(producer: int, x: Any, partitioning: Partitioning) -> tuple[Boundary, Any]:
    """What a stage returned, described; and as the next stage gets it, with a graph of its own."""
    leaves, spec = tree.leaves_and_spec(x)
    described: list[Any] = []
    tensors: list[Tensor] = []
    for name, leaf in zip(tree.leaf_names(x, "x"), leaves, strict=True):
        if not isinstance(leaf, Tensor):
            described.append(leaf)
            continue
        local, placement = partitioning.handed_on(leaf)
        described.append(Value(producer, name, tuple(local.shape), local.dtype, local.requires_grad, placement))
        tensors.append(local.detach().requires_grad_(local.requires_grad))
    boundary = Boundary(spec, tuple(described))
    return boundary, boundary.assemble(tensors, partitioning)
