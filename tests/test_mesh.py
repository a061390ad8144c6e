"""Equal meshes share their process groups, on all ranks alike, whatever each rank's garbage collector has done."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import autofunc as af
from autofunc.errors import MeshError
from autofunc.mesh import expert_mesh, folded
from autofunc.train.axes import Axes
from autofunc.train.tensor_parallel_check import imagined
from tests.pool import WorkerPool


@contextmanager
def collecting_by_hand() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def by_hand(pp: int, dp_shard: int, cp: int) -> DeviceMesh:
    return init_device_mesh("cpu", (pp, dp_shard, cp), mesh_dim_names=("pp", "dp_shard", "cp"))


def by_make_mesh(pp: int, dp_shard: int, cp: int) -> DeviceMesh:
    return af.make_mesh(pp, dp_shard=dp_shard, cp=cp, device_type="cpu")


def over_experts(mesh: DeviceMesh) -> DeviceMesh:
    return expert_mesh(mesh, 2)


def over_shards(mesh: DeviceMesh) -> DeviceMesh:
    found = folded(mesh)
    assert found is not None
    return found


def twice(
    make: Callable[..., DeviceMesh], sizes: tuple[int, int, int], derive: Callable[[DeviceMesh], DeviceMesh]
) -> float:  # fmt: skip
    """The sum of ones along an axis of what is derived from a second mesh, when rank 0 alone has forgotten the first."""
    with collecting_by_hand():
        mesh = make(*sizes)
        derive(mesh)
        holder: list[object] = [mesh]
        holder.append(holder)  # a cycle, as between a pipeline and what it has built
        del mesh, holder
        if dist.get_rank() == 0:
            gc.collect()
        found = torch.ones(())
        dist.all_reduce(found, group=derive(make(*sizes)).get_group("ep" if derive is over_experts else "dp_shard"))
        return found.item()


@pytest.mark.parametrize("make", [by_hand, by_make_mesh])
@pytest.mark.parametrize(("sizes", "derive"), [((2, 1, 2), over_shards), ((1, 4, 1), over_experts)])
def test_garbage_that_only_some_ranks_have_collected(
    workers: WorkerPool, make: Callable[..., DeviceMesh], sizes: tuple[int, int, int],
    derive: Callable[[DeviceMesh], DeviceMesh],
) -> None:  # fmt: skip
    assert workers.run(twice, make, sizes, derive) == [2.0] * 4


def test_equal_meshes_are_one_until_the_default_group_is_destroyed() -> None:
    axes = Axes(pp=2, dp_shard=2, cp=2)
    with imagined(axes) as mesh:
        assert axes.mesh("cpu") is mesh and folded(mesh) is folded(axes.mesh("cpu")) is not mesh
        assert af.make_mesh(pp=4, dp_shard=2, device_type="cpu") is not mesh
        first = mesh
    with imagined(axes) as mesh:
        assert mesh is not first, "the groups of the first are gone"


def test_one_device_is_not_a_kind_of_device() -> None:
    with imagined(Axes(pp=2)), pytest.raises(MeshError, match=r"'cpu:0' names one device; expected .* 'cpu'"):
        af.make_mesh(pp=2, device_type="cpu:0")
