"""Buffers that forward writes to are state: an argument and a return value, the same in every layout."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import autofunc as af
from autofunc import tree
from autofunc.batch import COUNTS, split_batch
from autofunc.counted_rows import weighed
from autofunc.errors import ModelError
from tests.captured.laws import assert_unchanged, close, contents
from tests.cases import assert_same_tree, mesh_of
from tests.pool import WorkerPool

ROWS, WIDTH = 8, 6


class Net(nn.Module):
    """Two blocks, a part that keeps state, two blocks."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self._block(), self._block(), middle, self._block(), self._block()])
        self.head = nn.Linear(WIDTH, 3)

    def _block(self) -> nn.Module:
        return nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True))

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return {"loss": functional.cross_entropy(self.head(x.mean(-1)), labels)}


class Averages(nn.Module):
    """Exponential averages, kept in several ways."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("inside", "through_data", "replaced", "last"):
            self.register_buffer(name, torch.zeros(WIDTH))
        self.register_buffer("rows", torch.zeros(3, WIDTH))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("unsaved", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean((0, 2))
        if self.training:
            self.seen += 1
            self.unsaved.add_(x.numel())
            with torch.no_grad():
                self.inside.mul_(0.9).add_(mean, alpha=0.1)
                self.through_data.data.copy_(0.9 * self.through_data + 0.1 * mean)
                self.rows[1:] = self.rows[:-1].clone()
                self.rows[0] = mean
                self.last.copy_(mean)  # is written, never read
            self.replaced = 0.5 * self.replaced + 0.5 * mean
        kept = self.inside + self.through_data + self.replaced + self.rows.sum(0)
        return x - kept[:, None] * self.seen


class Codebook(nn.Module):
    """The nearest codes, which move towards the values they are chosen for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, WIDTH))
        self.register_buffer("sizes", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.transpose(1, 2).reshape(-1, WIDTH)
        chosen = functional.one_hot(torch.cdist(flat, self.codes).argmin(1), 4).to(flat.dtype)
        found = (chosen @ self.codes).view(x.shape[0], -1, WIDTH).transpose(1, 2)
        if self.training:
            with torch.no_grad():
                self.sizes.lerp_(chosen.sum(0), 0.1)
                self.codes.lerp_(chosen.t() @ flat / self.sizes[:, None].clamp_min(1), 0.1)
        return x + (found - x).detach()


MIDDLES: Mapping[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(WIDTH, affine=False),
    "instance norm": lambda: nn.InstanceNorm1d(WIDTH, track_running_stats=True),
    "averages": Averages,
    "codebook": Codebook,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
}


def make(middle: str) -> tuple[Net, dict[str, Tensor]]:
    torch.manual_seed(0)
    net = Net(MIDDLES[middle]())
    return net, {"x": torch.randn(ROWS, WIDTH, 5), "labels": torch.randint(0, 3, (ROWS,))}


def plain_loop(module: nn.Module, batch: Mapping[str, Any], count: int) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
    """Loss, gradients and buffers of a copy of the module, microbatch by microbatch."""
    module = copy.deepcopy(module)
    losses = []
    for microbatch in split_batch(batch, count):
        losses.append(module(microbatch["x"], microbatch["labels"])["loss"])
        (losses[-1] / count).backward()
    grads = {name: leaf.grad for name, leaf in module.named_parameters()}
    return sum(losses).detach() / count, grads, dict(module.named_buffers())  # type: ignore[union-attr]


@pytest.mark.parametrize("middle", MIDDLES)
def test_matches_the_plain_loop(middle: str) -> None:
    module, batch = make(middle)
    before = contents(module)
    model = af.from_module(module, batch, verify=True)
    params, state = model.init(), model.init_state()
    given = state.clone()
    (expected_loss, expected_state), expected = af.reference_value_and_grad(model, None, 4, has_state=True)(
        params, batch, state=state
    )
    stages = af.split(model, ["blocks.2", "blocks.3"])
    for name, options in (("1f1b", {}), ("zb_h1", {"remat": "stage"}), ("zb_h1", {"engine": "eager", "remat": "stage"})):
        pipe = af.pipeline(stages, af.schedule.build(name, num_ranks=3, num_microbatches=4), **options)
        (loss, after), grads = af.value_and_grad(pipe, has_state=True)(params, batch, state=state)
        assert torch.equal(loss, expected_loss)
        assert_same_tree(expected, grads)
        assert_same_tree(expected_state, after)
    assert_same_tree(given, state)
    assert_unchanged(before, module)

    plain_loss, plain, buffers = plain_loop(module, batch, 4)
    torch.testing.assert_close(expected_loss, plain_loss)
    close(expected, plain)
    flat = tree.flatten(expected_state)
    for path, leaf in buffers.items():  # those that are not state have not changed
        assert torch.equal(leaf, flat[path] if path in flat else module.get_buffer(path)), path

    evaluated = copy.deepcopy(module).eval()
    evaluated.load_state_dict(flat, strict=False)
    with torch.no_grad():
        whole = [evaluated(part["x"], part["labels"])["loss"] for part in split_batch(batch, 4)]
    torch.testing.assert_close(pipe(params, batch, state=after), sum(whole) / 4)
    assert torch.equal(pipe(params, batch, state=after), pipe(params, batch, state=after))


@pytest.mark.full
@pytest.mark.parametrize("name", ["gpipe", "interleaved_1f1b", "zb_h2", "zbv", "dualpipe_v", "looped_bfs"])
@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_every_in_order_schedule(name: str, engine: str) -> None:
    module, batch = make("averages")
    model = af.from_module(module, batch)
    params, state = model.init(), model.init_state()
    schedule = af.schedule.build(name, num_ranks=2, num_microbatches=4)
    pipe = af.pipeline(af.split(model, schedule.num_stages), schedule, engine=engine)
    (loss, after), grads = af.value_and_grad(pipe, has_state=True)(params, batch, state=state)
    (expected_loss, expected_state), expected = af.reference_value_and_grad(model, None, 4, has_state=True)(
        params, batch, state=state
    )
    assert torch.equal(loss, expected_loss)
    assert_same_tree(expected_state, after)
    assert_same_tree(expected, grads)


@pytest.mark.full
def test_compiled() -> None:
    module, batch = make("averages")
    model = af.from_module(module, batch)
    params, state = model.init(), model.init_state()
    (_, expected), _ = af.reference_value_and_grad(model, None, 4, has_state=True)(params, batch, state=state)
    pipe = af.pipeline(af.split(model, 1), af.schedule.build("1f1b", num_ranks=1, num_microbatches=4), compile=True)
    (_, after), _ = af.value_and_grad(pipe, has_state=True)(params, batch, state=state)
    found = tree.flatten(after)
    for path, leaf in tree.flatten(expected).items():
        torch.testing.assert_close(found[path], leaf, msg=path)


def test_remat_repeats_no_power_iteration() -> None:
    """A step with remat does the products of its forwards twice, and of its gradients."""
    module, batch = make("spectral norm")
    model = af.from_module(module, batch)
    counts = {}
    for remat in (None, "stage"):
        pipe = af.pipeline(af.split(model, 1), af.schedule.build("1f1b", num_ranks=1, num_microbatches=4), remat=remat)
        step, params, state = af.value_and_grad(pipe, has_state=True), pipe.init(), pipe.init_state()
        step(params, batch, state=state)
        with FlopCounterMode(display=False) as counter:
            (_, counts[remat, "state"]), _ = step(params, batch, state=state)
        counts[remat, "flops"] = counter.get_total_flops()
    assert_same_tree(counts[None, "state"], counts["stage", "state"])
    assert counts[None, "flops"] < counts["stage", "flops"]


def test_bytes_are_known_ahead() -> None:
    module, batch = make("batch norm")
    model = af.from_module(module, batch)
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=4)
    pipe = af.pipeline(af.split(model, 2), s)
    params = pipe.init()
    measured = pipe.measure_bytes(params, batch)
    lowered = next(iter(pipe._plans)).schedule
    assert [list(row) for row in af.schedule.live_bytes(lowered, pipe.memory(params, batch))] == [
        list(row) for row in measured
    ]


def test_state_of_the_first_data_parallel_rank(workers: WorkerPool) -> None:
    found = workers.run(_on_gloo)
    module, batch = make("averages")
    model = af.from_module(module, batch)
    reference = af.reference_value_and_grad(model, None, 2, has_state=True)
    halves = [
        reference(model.init(), {name: value[rows] for name, value in batch.items()}, state=model.init_state())
        for rows in (slice(None, ROWS // 2), slice(ROWS // 2, None))
    ]
    (first, second), (grads_of_first, grads_of_second) = zip(*halves, strict=True)
    mean = {path: (leaf + tree.flatten(grads_of_second)[path]) / 2 for path, leaf in tree.flatten(grads_of_first).items()}
    for (loss, state), grads in found:
        assert_same_tree(first[1], state)
        torch.testing.assert_close(loss, (first[0] + second[0]) / 2)
        close(grads, mean)


def _on_gloo() -> Any:
    module, batch = make("averages")
    mesh = mesh_of(pp=2, dp_replicate=2)
    place = mesh.get_local_rank("dp_replicate") * ROWS // 2
    mine = {name: value[place : place + ROWS // 2] for name, value in batch.items()}
    model = af.from_module(module, batch)
    pipe = af.pipeline(af.split(model, 2), af.schedule.build("1f1b", num_ranks=2, num_microbatches=2), mesh=mesh)
    placed = pipe.place_state(model.init_state())
    assert_same_tree(placed, pipe.init_state())
    (loss, state), grads = af.value_and_grad(pipe, has_state=True)(pipe.init(), mine, state=placed)
    return (loss, pipe.gather(state)), pipe.gather(grads)


def test_errors() -> None:
    module, batch = make("averages")
    model = af.from_module(module, batch)
    stages = af.split(model, 2)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(stages, s)
    with pytest.raises(
        ModelError, match=r"Net keeps state \(blocks.0.1.num_batches_tracked, .* and \d+ more\).*has_state=True"
    ):
        af.value_and_grad(pipe)
    step, params, state = af.value_and_grad(pipe, has_state=True), pipe.init(), pipe.init_state()
    with pytest.raises(ModelError, match=r"Net keeps state .*pass state=pipe.init_state\(\)"):
        step(params, batch)
    with pytest.raises(ModelError, match=r"Net keeps state"):
        pipe(params, batch)
    del state["blocks", "2", "inside"]
    with pytest.raises(ModelError, match=r"state has no 'blocks.2.inside'"):
        step(params, batch, state=state)
    state["blocks", "2", "inside"] = torch.zeros(WIDTH + 1)
    with pytest.raises(ModelError, match=r"state 'blocks.2.inside' is \(7,\) torch.float32; expected \(6,\)"):
        pipe(params, batch, state=state)


def test_frozen_in_eval_mode() -> None:
    module, batch = make("averages")
    model = af.from_module(module.eval(), batch)
    assert not model.state_spec
    pipe = af.pipeline(af.split(model, 2), af.schedule.build("1f1b", num_ranks=2, num_microbatches=2))
    (_, state), _ = af.value_and_grad(pipe, has_state=True)(pipe.init(), batch, state=pipe.init_state())
    assert not tree.flatten(state)
    af.value_and_grad(pipe)(pipe.init(), batch)


def test_a_cut_between_reading_and_writing() -> None:
    """State read in one place and written in a later one stays in one stage."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            for number, layer in enumerate(self.layers):
                x = layer(x)
                x = self.norm(x) if number in (1, 2) else x
            return x

    model = af.from_module(Shared(), {"x": torch.randn(4, WIDTH)})
    refused = model.specialise().cut_points.refused
    assert "begins between two writes to the same memory" in refused["layers.2"]
    assert [stage.states for stage in af.split(model, ["layers.1", "layers.3"])] == [
        (),
        ("norm.num_batches_tracked", "norm.running_mean", "norm.running_var"),
        (),
    ]


def test_synchronised_statistics(workers: WorkerPool) -> None:
    """`SyncBatchNorm` normalises over the rows of all data parallel ranks, and is `BatchNorm` on one process."""
    found = workers.run(_synchronised)
    module, batch = make("batch norm")
    quarter = ROWS // 4  # microbatches of ranks 0, 0, 1, 1; those of the same number belong together
    order = torch.cat([torch.arange(start * quarter, (start + 1) * quarter) for start in (0, 2, 1, 3)])
    together = {name: value[order] for name, value in batch.items()}
    model = af.from_module(nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(module)), batch)
    reference = af.reference_value_and_grad(model, None, 2, has_state=True)
    (loss, state), _ = reference(model.init(), together, state=model.init_state())
    plain_loss, plain, buffers = plain_loop(module, together, 2)
    torch.testing.assert_close(loss, plain_loss)
    assert all(torch.equal(leaf, buffers[path]) for path, leaf in tree.flatten(state).items())
    for (found_loss, found_state), found_grads in found:
        torch.testing.assert_close(found_loss, plain_loss)
        torch.testing.assert_close(tree.flatten(found_state), tree.flatten(state))
        for path, leaf in tree.flatten(found_grads).items():
            torch.testing.assert_close(leaf, plain[path], msg=path, rtol=1e-4, atol=1e-6)


def _synchronised() -> Any:
    module, batch = make("batch norm")
    mesh = mesh_of(pp=2, dp_replicate=2)
    place = mesh.get_local_rank("dp_replicate") * ROWS // 2
    mine = {name: value[place : place + ROWS // 2] for name, value in batch.items()}
    model = af.from_module(nn.SyncBatchNorm.convert_sync_batchnorm(module), batch)
    pipe = af.pipeline(af.split(model, 2), af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2), mesh=mesh)
    (loss, state), grads = af.value_and_grad(pipe, has_state=True)(pipe.init(), mine, state=pipe.init_state())
    return (loss, pipe.gather(state)), pipe.gather(grads)


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_padding_microbatches_leave_state_unchanged(engine: Any) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(ROWS, WIDTH, 5), "labels": torch.randint(3, (ROWS,))}
    model = af.from_module(Net(nn.BatchNorm1d(WIDTH)), batch)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=4)
    pipe = af.pipeline(af.split(model, 2), s, loss=weighed(None, ROWS // 4), engine=engine)
    counts = torch.ones(ROWS)
    counts[-2:] = 0
    given = {**batch, COUNTS: counts}
    (_, found), _ = af.value_and_grad(pipe, has_state=True)(pipe.init(), given, state=pipe.init_state())
    real = {name: leaf[:-2] for name, leaf in batch.items()}
    step = af.reference_value_and_grad(model, None, 3, has_state=True)
    (_, expected), _ = step(model.init(), real, state=model.init_state())
    assert_same_tree(expected, found)
