"""The subject of a benchmark: a model, its loss and a batch, cut as each contender needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.batch import Microbatch, split_batch
from autofunc.errors import ModelError
from autofunc.losses import Loss
from autofunc.model import Model
from autofunc.reference import reference_value_and_grad
from autofunc.row_dims import BatchDims, row_dims
from autofunc.shard import Sharding
from autofunc.splitting import Stage, count_operations, layer_costs, split

Cut = Callable[[int], Sequence[Stage]]
"""From a number of stages to the stages."""


@dataclass
class Subject:
    """The subject of one benchmark, on one process.

    Args:
        model: the model to pipeline.
        loss: see `af.pipeline`.
        batch: the rows of a step, on the contenders' device.
        params: of the whole model by canonical path, on the same device.
        key: see `af.value_and_grad`.
        batch_dims: see `af.pipeline`.
        sharding: precision of autofunc's contenders.
        cut: cuts the model into stages.
    """

    model: Model
    loss: Loss | None
    batch: Mapping[str, Any]
    params: dict[str, Tensor]
    key: Any
    batch_dims: BatchDims
    sharding: Sharding
    cut: Cut
    _expected: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    _stages: dict[int, Sequence[Stage]] = field(default_factory=dict)

    def stages(self, number: int) -> Sequence[Stage]:
        """Return the model in this many stages."""
        if number not in self._stages:
            self._stages[number] = self.cut(number)
        return self._stages[number]

    def microbatches(self, number: int) -> list[Microbatch]:
        """Return the batch in this many pieces."""
        return split_batch(
            self.batch, number, key=self.key, batch_dims=self.batch_dims, key_name=self.model.key_name
        )  # fmt: skip

    def expected(self, microbatches: int) -> dict[str, Tensor]:
        """Return the plain microbatch loop's gradients by canonical path."""
        if microbatches not in self._expected:
            self._expected[microbatches] = self.plain_step(microbatches)()
        return self._expected[microbatches]

    def plain_step(self, microbatches: int) -> Callable[[], dict[str, Tensor]]:
        """Return a step of the plain microbatch loop, which returns its gradients."""
        keeps = bool(self.model.state_spec)
        loop = reference_value_and_grad(
            self.model, self.loss, microbatches, has_state=keeps, batch_dims=self.batch_dims
        )  # fmt: skip
        given = {"state": self.model.init_state(self.device)} if keeps else {}
        return lambda: tree.flatten(loop(self.params, self.batch, self.key, **given)[1])

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.params.values())).device

    @property
    def rows(self) -> int:
        """Rows per step."""
        return row_dims(self.batch, self.batch_dims, cuts=False, key_name=self.model.key_name)[0]

    def units(self) -> tuple[int, str]:
        """Return the size of a step and its unit: tokens, or rows without `input_ids`."""
        ids = self.batch.get("input_ids")
        return (self.rows, "rows") if not isinstance(ids, Tensor) else (ids.numel(), "tokens")

    def flops(self, microbatches: int) -> int | None:
        """Return the FLOPs of a step's matrix products, backward included; None if they cannot be counted."""
        try:
            costs = count_operations(self.model, _on_host(self.microbatches(microbatches)[0]), self.loss)
        except ModelError:
            return None
        return 3 * microbatches * sum(each.flops for each in costs.values())


def _on_host(microbatch: Microbatch) -> Microbatch:
    """Move a microbatch to the CPU, where operations are counted on fake tensors."""
    return tree.map_leaves(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, microbatch)  # type: ignore[no-any-return]


def cut_by_costs(model: Model, points: Sequence[str] | None, microbatch: Microbatch, loss: Loss | None) -> Cut:
    """Return a function that cuts at the given points if they give the wanted number of stages, else balances by cost.

    Args:
        model: the model to cut.
        points: see `af.split`.
        microbatch: an example to count operations on.
        loss: counted into the last stage.
    """

    def cut(number: int) -> Sequence[Stage]:
        if number == 1:
            return split(model)
        if points is not None:
            stages = split(model, list(points))
            if len(stages) == number:
                return stages
        finer = model
        if number > len(model.layers):
            finer = model.cut_before(list(model.specialise().cut_points.start))
        return split(finer, number, costs=layer_costs(finer, _on_host(microbatch), loss))

    return cut
