"""The law of checkpoints: whatever layout has written one, any other goes on from it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import autofunc as af
from autofunc.mesh import data_coordinate
from stages.gpt2 import build_gpt2_model
from tests.cases import mesh_of, pp_mesh
from tests.pool import WorkerPool

BEFORE, AFTER, MICROBATCHES = 3, 3, 4

ONE_PROCESS = {
    "pp1": ("gpipe", 1, []),
    "pp2": ("1f1b", 2, ["h.1"]),
    "zbv": ("zbv", 2, ["h.0", "h.1", "h.3"]),
}
MESHES: dict[str, tuple[str, dict[str, int], list[str]]] = {
    "pp4 uneven": ("zb_h1", {"pp": 4}, ["h.2", "h.3", "head"]),
    "pp2 x dp_shard2": ("1f1b", {"pp": 2, "dp_shard": 2}, ["h.1"]),
    "pp2 x tp2": ("1f1b", {"pp": 2, "tp": 2}, ["h.2"]),
    "two copies of pp2": ("zbv", {}, ["h.0", "h.1", "h.3"]),
    "dp_replicate2 x dp_shard2": ("gpipe", {"dp_replicate": 2, "dp_shard": 2}, []),
}


def batch_of(step: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 18, (8, 7), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


@cache
def pipe_of(layout: str) -> Any:
    model = build_gpt2_model(vocab_size=18, n_positions=8, n_embd=8, n_layer=4, n_head=2)
    if layout in ONE_PROCESS:
        name, ranks, points = ONE_PROCESS[layout]
        mesh, dp = None, 1
    else:
        name, sizes, points = MESHES[layout]
        mesh = mesh_of(**sizes) if sizes else pp_mesh(2)
        ranks, dp = mesh.size(mesh.mesh_dim_names.index("pp")), data_coordinate(mesh)[1]  # type: ignore[union-attr]
    schedule = af.schedule.build(name, num_ranks=ranks, num_microbatches=MICROBATCHES // dp)
    return af.pipeline(af.split(model, points), schedule, loss=af.losses.causal_lm, mesh=mesh, engine="eager")


def optimizer_of() -> Any:
    return af.optimizer(torch.optim.AdamW, lr=1e-2)


def go_on(pipe: Any, params: Any, state: Any, first: int, count: int) -> tuple[Any, Any, list[float]]:
    place, places = data_coordinate(pipe.mesh)
    losses = []
    for step in range(first, first + count):
        rows = {key: leaf.chunk(places)[place] for key, leaf in batch_of(step).items()}
        loss, grads = af.value_and_grad(pipe)(params, rows, (0, step))
        params, state = optimizer_of().update(grads, state, params)
        losses.append(loss.item())
    return params, state, losses


def write(layout: str, path: Path) -> list[float]:
    """Train, save, train on: the losses after."""
    pipe = pipe_of(layout)
    params = pipe.init(seed=3)
    params, state, _ = go_on(pipe, params, optimizer_of().init(params), 0, BEFORE)
    af.save(path, params=params, optimizer_state=state, extra={"step": BEFORE})
    return go_on(pipe, params, state, BEFORE, AFTER)[2]


def read(layout: str, paths: list[Path]) -> list[list[float]]:
    """The losses after each of some checkpoints."""
    pipe, found = pipe_of(layout), []
    for path in paths:
        checkpoint = af.load(path, pipe, optimizer=optimizer_of())
        assert checkpoint.extra == {"step": BEFORE}
        found.append(go_on(pipe, checkpoint.params, checkpoint.optimizer_state, BEFORE, AFTER)[2])
    return found


LAYOUTS = (*ONE_PROCESS, *MESHES)


@pytest.mark.parametrize("distances", [(0, 1, 3), pytest.param((2, 4, 5, 6, 7), marks=pytest.mark.full)], ids=str)
def test_every_layout_reads_what_every_layout_wrote(
    workers: WorkerPool, tmp_path: Path, distances: tuple[int, ...]
) -> None:
    """By default every layout reads its own and two others; the rest in a full run."""
    paths = {layout: tmp_path / layout.replace(" ", "-") for layout in LAYOUTS}
    written = {
        layout: write(layout, path) if layout in ONE_PROCESS else workers.run(write, layout, path)[0]
        for layout, path in paths.items()
    }
    for number, layout in enumerate(LAYOUTS):
        writers = [LAYOUTS[(number + distance) % len(LAYOUTS)] for distance in distances]
        given = [paths[writer] for writer in writers]
        found = read(layout, given) if layout in ONE_PROCESS else workers.run(read, layout, given)[0]
        for writer, losses in zip(writers, found, strict=True):
            same_sums = writer == layout or {writer, layout} <= {*ONE_PROCESS, "pp4 uneven", "two copies of pp2"}
            if same_sums:  # without dp and tp their order is the same in every layout
                assert losses == written[writer], f"{writer} -> {layout}"
            torch.testing.assert_close(losses, written[writer], rtol=1e-5, atol=1e-5)


def save_where_one_cannot(path: Path, background: bool) -> str:
    """One rank's disk takes nothing."""
    pipe = pipe_of("pp2 x dp_shard2")
    if dist.get_rank() == 2:
        real = torch.save
        torch.save = lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    group = dist.new_group(backend="gloo") if background else False
    try:
        saving = af.checkpoint.begin_save(path, params=pipe.init(seed=0), background=group)
        with pytest.raises(af.errors.CheckpointError) as error:
            saving.finish()
        return str(error.value)
    finally:
        if dist.get_rank() == 2:
            torch.save = real


@pytest.mark.parametrize("background", [False, True])
def test_all_know_when_one_cannot_write(workers: WorkerPool, tmp_path: Path, background: bool) -> None:
    for said in workers.run(save_where_one_cannot, tmp_path / "c", background):
        assert "No space left on device" in said and "(rank 2)" in said
    assert not list(tmp_path.iterdir())
