"""Trees collected on the first process for writing: the same bits, and at most one tensor on the others."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

from autofunc.runtime.collect import collect_tree
from autofunc.tree import flatten
from tests.cases import assert_same_tree, mesh_of
from tests.pool import WorkerPool
from tests.shard.test_parameters import pipe_on


def collected(sizes: dict[str, int]) -> tuple[bool, int, int]:
    """Return whether this is the first process, its tree, and the most whole tensors alive at once."""
    pipe, model, _ = pipe_on(mesh_of(**sizes))
    params = pipe.init(seed=5)
    made: list[Any] = []
    alive: list[int] = []
    full = pipe._parameters.full

    def noted(path: str, leaf: torch.Tensor) -> torch.Tensor:
        alive.append(1 + sum(each() is not None for each in made))
        whole: torch.Tensor = full(path, leaf)
        made.append(weakref.ref(whole))
        return whole

    pipe._parameters.full = noted
    found = pipe.collect(params)
    is_first = dist.get_rank() == 0
    if is_first:
        assert_same_tree(model.init(seed=5), found)
        assert all(leaf.device.type == "cpu" for leaf in flatten(found).values())
    assert len(alive) == len(flatten(params))
    return is_first, len(flatten(found)), max(alive)


@pytest.mark.parametrize("sizes", [{"pp": 4}, {"pp": 2, "dp_shard": 2}, {"dp_replicate": 2, "tp": 2}], ids=str)
def test_only_the_first_process_gets_the_tree(workers: WorkerPool, sizes: dict[str, int]) -> None:
    for is_first, count, most in workers.run(collected, sizes):
        assert (count > 0) == is_first
        assert is_first or most == 1


def odd_tensors() -> None:
    """Make tensors of dtypes that a backend may lack, empty ones, and non-contiguous ones."""
    rank = dist.get_rank()
    mine = {
        f"{rank}.half": torch.full((2, 3), rank, dtype=torch.bfloat16).t(),
        f"{rank}.none": torch.empty(0, 4),
        f"{rank}.flag": torch.tensor(rank % 2 == 0),
        "both": torch.tensor([rank], dtype=torch.int64),
    }
    layouts = {path: (tuple(leaf.shape), leaf.dtype) for path, leaf in mine.items()}
    assert dist.group.WORLD is not None
    full = collect_tree(layouts, mine.__getitem__, [0, 1, 2, 3], dist.group.WORLD, torch.device("cpu"))
    if rank:
        assert not full
        return
    assert len(full) == 13 and full["both"].item() == 0
    for each in range(4):
        assert torch.equal(full[f"{each}.half"], torch.full((3, 2), each, dtype=torch.bfloat16))
        assert full[f"{each}.none"].shape == (0, 4) and full[f"{each}.flag"].item() == (each % 2 == 0)


def test_any_tensor_can_be_collected(workers: WorkerPool) -> None:
    workers.run(odd_tensors)
