"""Gradients in transit stay in memory no longer than needed."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc.shard import reduce
from tests.cases import make_case, mesh_of
from tests.pool import WorkerPool


def sums_left() -> list[int]:
    """Count the sums of earlier layers in memory when each layer's are handed over."""
    post, seen, left = reduce.Reduction.post, [], []

    def noting(self: reduce.Reduction, sums: dict[str, Tensor]) -> None:
        left.append(sum(each() is not None for each in seen))
        seen.extend(weakref.ref(total) for total in sums.values())
        post(self, sums)

    reduce.Reduction.post = noting  # type: ignore[method-assign]
    try:
        _, stages, loss, batch = make_case("mlp", 2, 4)
        s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
        pipe = af.pipeline(stages, s, loss=loss, mesh=mesh_of(pp=2, dp_shard=2))
        af.value_and_grad(pipe)(pipe.init(0), batch)
    finally:
        reduce.Reduction.post = post  # type: ignore[method-assign]
    return left


def test_a_layers_sums_are_freed_before_the_next_is_copied(workers: WorkerPool) -> None:
    for left in workers.run(sums_left):
        assert len(left) > 1 and not any(left)


class Work:
    """A reduction that ends on command."""

    def __init__(self) -> None:
        self.is_done, self.waits = False, 0

    def is_completed(self) -> bool:
        return self.is_done

    def wait(self) -> None:
        self.waits += 1


def test_gradients_are_freed_as_soon_as_they_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's works report it; nothing waits for them before the end of the step."""
    works: list[Work] = []
    given: list[Any] = []

    def start(arriving: Tensor, parts: Tensor, group: Any, async_op: bool) -> Work:
        arriving.copy_(parts[: arriving.numel()])
        given.append(weakref.ref(parts))
        works.append(Work())
        return works[-1]

    monkeypatch.setattr(reduce, "axis_size", lambda mesh, axis: 2)
    monkeypatch.setattr(reduce, "coordinate", lambda mesh, axis: 0)
    monkeypatch.setattr(reduce, "axis_group", lambda mesh, axis: "ranks" if axis == "dp_shard" else None)
    monkeypatch.setattr(reduce.dist, "reduce_scatter_single", start)
    reduction = reduce.Reduction(None, None)
    for number in range(3):
        if number == 2:
            works[0].is_done = True
        reduction.post({f"{number}.weight": torch.full((4,), float(number))})
    assert [each() is None for each in given] == [True, False, False]
    assert [work.waits for work in works] == [1, 0, 0]
    sums = reduction.finish(())
    assert [each() is None for each in given] == [True, True, True]
    assert [work.waits for work in works] == [1, 1, 1]
    assert {path: total.tolist() for path, total in sums.items()} == {f"{n}.weight": [n, n] for n in range(3)}
