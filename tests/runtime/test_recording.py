"""Recorded steps equal normal ones bit for bit, with graphs that run on the CPU; on a GPU: `tests/gpu/test_graphs.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import autofunc as af
from autofunc.errors import AutofuncError, ModelError
from autofunc.runtime import cuda_graphs
from autofunc.runtime.fixed import Fixed
from autofunc.runtime.plan import Mode
from autofunc.tree import flatten, to_tensordict
from tests.cases import assert_same_tree, make_case
from tests.runtime.replayed import ReplayedGraphs

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[ReplayedGraphs]:
    """Record graphs on the CPU; return the ones made."""
    made: list[ReplayedGraphs] = []

    class Noted(ReplayedGraphs):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            made.append(self)

    monkeypatch.setitem(cuda_graphs.KINDS, "cpu", Noted)
    return made


def pipes(
    model_name: str, name: str, rows: int = 8, *, cut: bool = False, **options: Any
) -> tuple[Any, Any, Any, dict[str, Tensor]]:
    """Return (recorded pipeline, the same unrecorded, model, batch)."""
    s = af.schedule.build(name, num_ranks=2, num_microbatches=4)
    model, stages, loss, batch = make_case(model_name, s.num_stages, rows)
    pair = [af.pipeline(stages, s, loss=loss, compile=each, **options) for each in ("graphs", False)]
    if cut:
        cut_at_transfers(pair[0])
    return *pair, model, batch


def check_steps(pipe: Any, plain: Any, params: Any, batch: dict[str, Tensor], moves: tuple[int, ...]) -> None:
    """Check six steps with in-place updates; parameters move before some; each step has different rows and another key."""
    opt = af.optimizer(torch.optim.AdamW, lr=1e-2)
    state, kept = opt.init(params), []
    for step in range(6):
        if step in moves:
            params = moved(params)
        rows = {each: leaf.roll(step, 0) for each, leaf in batch.items()}
        expected_loss, expected = af.value_and_grad(plain)(params, rows, (3, step))
        loss, grads = af.value_and_grad(pipe)(params, rows, (3, step))
        assert torch.equal(loss, expected_loss), step
        assert_same_tree(expected, grads)
        kept.append((loss, expected_loss))
        params, state = opt.update(expected if step % 2 else grads, state, params)
    assert all(torch.equal(*pair) for pair in kept), "what a step gave is not the next one's"


def cut_at_transfers(pipe: af.Pipeline) -> None:
    """As between processes."""
    make = pipe._plans._make

    def made(*args: Any) -> Any:
        plan, transport = make(*args)
        plan.recordings.cuts = True
        return plan, transport

    pipe._plans._make = made  # type: ignore[method-assign]


def moved(params: Any) -> Any:
    """Copy the values to other memory."""
    return to_tensordict({path: leaf.clone() for path, leaf in flatten(params).items()})


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize(
    ("model_name", "name"),
    [
        ("gpt2", "zb_h1"),
        *(
            pytest.param(model_name, name, marks=pytest.mark.full)
            for name in af.schedule.names()
            for model_name in ("mlp", "gpt2")
        ),
    ],
)
def test_steps_have_the_same_bits(replayed: list[ReplayedGraphs], model_name: str, name: str, cut: bool) -> None:
    """With parameters updated in place, then moved elsewhere; with keys, and changing values."""
    pipe, plain, model, batch = pipes(model_name, name, cut=cut)
    check_steps(pipe, plain, model.init(seed=7), batch, moves=(3, 5))
    assert len(replayed) == (2 if cut else 1), "a pool of memory for each tape: they are played in turns"
    replays = [graph.replays for graphs in replayed for graph in graphs.made]
    assert len(replays) == 2 if not cut else len(replays) > 4
    assert set(replays) == {2, 3}, "steps 1 and 2, until parameters move; then 3 to 5, which copy them"


def test_gradients_are_the_callers(replayed: list[ReplayedGraphs]) -> None:
    pipe, _, model, batch = pipes("mlp", "zb_h1")
    params, step = model.init(seed=7), af.value_and_grad(pipe)
    step(params, batch, (0, 0))
    _, first = step(params, batch, (0, 1))
    before = first.clone()
    _, second = step(params, batch, (0, 2))
    assert_same_tree(before, first)
    mine = {leaf.data_ptr() for leaf in flatten(first).values()}
    assert mine.isdisjoint(leaf.data_ptr() for leaf in flatten(second).values())


@pytest.mark.full
@pytest.mark.parametrize("remat", ["layer", "stage"])
def test_recomputed(replayed: list[ReplayedGraphs], remat: str) -> None:
    pipe, plain, model, batch = pipes("gpt2", "zb_h1", remat=remat, cut=True)
    params = model.init(seed=7)
    expected_loss, expected = af.value_and_grad(plain)(params, batch, (3, 5))
    for _ in range(3):
        loss, grads = af.value_and_grad(pipe)(params, batch, (3, 5))
        assert torch.equal(loss, expected_loss)
        assert_same_tree(expected, grads)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_batches_of_alternating_shapes(replayed: list[ReplayedGraphs], cut: bool) -> None:
    """They share slots, sums and parameters; a slot that grows moves, and its readers are recorded again."""
    pipe, plain, model, small = pipes("mlp", "1f1b", cut=cut)
    _, _, _, large = make_case("mlp", 2, 16)
    params = model.init(seed=7)
    for batch in (small, small, small, large, large, small, small, large):
        expected_loss, expected = af.value_and_grad(plain)(params, batch, (3, 5))
        loss, grads = af.value_and_grad(pipe)(params, batch, (3, 5))
        assert torch.equal(loss, expected_loss)
        assert_same_tree(expected, grads)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_without_gradients(replayed: list[ReplayedGraphs], cut: bool) -> None:
    """The loss, also of leftover rows; outputs; and steps with gradients in between."""
    pipe, plain, model, batch = pipes("mlp", "1f1b", rows=10, cut=cut)
    params, training = model.init(seed=7), {name: leaf[:8] for name, leaf in batch.items()}
    for step in range(3):
        assert torch.equal(pipe(params, batch, (0, step)), plain(params, batch, (0, step)))
        assert torch.equal(pipe.forward(params, batch), plain.forward(params, batch))
        assert torch.equal(pipe.forward(params, batch, gather="all"), plain.forward(params, batch, gather="all"))
        expected = af.value_and_grad(plain)(params, training, (0, step))
        loss, grads = af.value_and_grad(pipe)(params, training, (0, step))
        assert torch.equal(loss, expected[0])
        assert_same_tree(expected[1], grads)
        params = moved(params)


@pytest.mark.parametrize(
    ("model_name", "sharding"),
    [
        pytest.param("gpt2", None, id="parameters", marks=pytest.mark.full),
        pytest.param("mlp", af.Sharding(mp_policy=BF16), id="policy"),
    ],
)
def test_low_precision(replayed: list[ReplayedGraphs], model_name: str, sharding: Any) -> None:
    """In parameters, or in what they are cast to in each step."""
    pipe, plain, model, batch = pipes(model_name, "zb_h1", cut=True, sharding=sharding)
    params = model.init(seed=7, dtype=torch.bfloat16 if sharding is None else torch.float32)
    opt = af.optimizer(torch.optim.SGD, lr=0.1)
    state = opt.init(params)
    for step in range(4):
        expected_loss, expected = af.value_and_grad(plain)(params, batch, (3, step))
        loss, grads = af.value_and_grad(pipe)(params, batch, (3, step))
        assert torch.equal(loss, expected_loss)
        assert_same_tree(expected, grads)
        params, state = opt.update(grads, state, params)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_state_carries_over_between_steps(replayed: list[ReplayedGraphs], cut: bool) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(8, 4)}
    model = af.from_module(Normalised(), batch)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe, plain = (af.pipeline(af.split(model, 2), s, compile=each) for each in ("graphs", False))
    if cut:
        cut_at_transfers(pipe)
    params, states = model.init(), [pipe.init_state(), plain.init_state()]
    seen = []
    for step in range(4):
        rows = {"x": batch["x"] + step}
        (loss, states[0]), grads = af.value_and_grad(pipe, has_state=True)(params, rows, state=states[0])
        (expected_loss, states[1]), expected = af.value_and_grad(plain, has_state=True)(params, rows, state=states[1])
        assert torch.equal(loss, expected_loss)
        assert_same_tree(expected, grads)
        assert_same_tree(states[1], states[0])
        seen.append(states[0].clone())
        assert all(torch.equal(*pair) for pair in zip(flatten(seen[-1]).values(), flatten(states[0]).values(), strict=True))


def test_aux_and_rows_in_the_second_dim(replayed: list[ReplayedGraphs]) -> None:
    layer = af.Layer(
        init=lambda key: {"w": key.normal("w", (3, 3))}, apply=lambda p, x, b: (b["x"].T if x is None else x) @ p["w"]
    )
    model = af.Model({"a": layer, "b": layer})

    def loss(out: Tensor, mb: Any) -> Any:
        return (out * mb["scale"]).sum(), mb["rows"].sum(), {"largest": out.max()}

    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2)
    dims = {"x": 1, "scale": None, "rows": 0}
    pipe, plain = (
        af.pipeline(af.split(model, 2), s, loss=loss, batch_dims=dims, compile=each) for each in ("graphs", False)
    )
    params = model.init()
    for step in range(4):
        batch = {"x": torch.randn(3, 8), "scale": torch.full((1, 1), 1.0 + step).expand(4, 3), "rows": torch.ones(8)}
        (loss_found, aux), grads = af.value_and_grad(pipe, has_aux=True)(params, batch)
        (expected_loss, expected_aux), expected = af.value_and_grad(plain, has_aux=True)(params, batch)
        assert torch.equal(loss_found, expected_loss)
        assert_same_tree(expected, grads)
        torch.testing.assert_close(aux, expected_aux, rtol=0, atol=0)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_observers(replayed: list[ReplayedGraphs], name: str, cut: bool) -> None:
    """Times are those of graphs, one per action; steps with observers of values run op by op."""
    pipe, plain, model, batch = pipes("mlp", name, cut=cut)
    params = model.init(seed=7)
    timeline = pipe.profile(params, batch, (3, 5), steps=2)
    assert timeline.makespan > 0 and all(
        (end >= start).all() for start, end in zip(timeline.start, timeline.end, strict=True)
    )
    made = [graph for graphs in replayed for graph in graphs.made]
    assert len(made) >= timeline.schedule.num_microbatches * 2
    assert {graph.replays for graph in made} == {2}
    assert all(cost > 0 for cost in pipe.costs(params, batch, (3, 5), steps=1).F)
    assert pipe.measure_bytes(params, batch, (3, 5)) == plain.measure_bytes(params, batch, (3, 5))
    for _ in range(2):
        loss, grads = af.value_and_grad(pipe)(params, batch, (3, 5))
        expected_loss, expected = af.value_and_grad(plain)(params, batch, (3, 5))
        assert torch.equal(loss, expected_loss)
        assert_same_tree(expected, grads)


def test_the_position_of_a_rank(replayed: list[ReplayedGraphs], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape reports its position at every transfer, for reports of hangs."""
    from autofunc.runtime.position import here

    pipe, _, model, batch = pipes("mlp", "1f1b", cut=True)
    params, step = model.init(seed=7), af.value_and_grad(pipe)
    for _ in range(2):
        step(params, batch)
    monkeypatch.setattr(here, "is_on", True)
    before, places = here.changes, []
    enter = type(here).end

    def end(position: Any, number: int) -> None:
        places.append(here.action)
        enter(position, number)

    monkeypatch.setattr(type(here), "end", end)
    step(params, batch)
    assert places == ["after all"] and here.changes > before + 20


def test_close_frees_memory(replayed: list[ReplayedGraphs]) -> None:
    pipe, plain, model, batch = pipes("mlp", "1f1b")
    params, step = model.init(seed=7), af.value_and_grad(pipe)
    for _ in range(2):
        step(params, batch)
        step(moved(params), batch)
    memory = pipe._blueprint.graph_memory
    assert memory._parameters and memory._sums
    pipe.close()
    assert not memory._parameters and not memory._sums and not memory._graphs
    loss, _ = step(params, batch)
    assert torch.equal(loss, af.value_and_grad(plain)(params, batch)[0])


# --- what cannot be recorded


def build(**options: Any) -> af.Pipeline:
    _, stages, loss, _ = make_case("mlp", 2, 4)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    return af.pipeline(stages, s, loss=loss, compile="graphs", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(
        AutofuncError, match=r'compile="graphs" records CUDA graphs, and this machine has no GPU; use compile=True'
    ):
        build()


def test_parameters_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pipe = build()
    model, _, _, batch = make_case("mlp", 2, 4)
    with pytest.raises(AutofuncError, match=r'compile="graphs".*the parameters are on cpu; use compile=True'):
        af.value_and_grad(pipe)(model.init(), batch)


def test_conflicting_options_are_refused() -> None:
    with pytest.raises(AutofuncError, match=r"unknown compile 'graph'.*did you mean graphs"):
        af.pipeline([], None, compile="graph")  # type: ignore[arg-type]
    with pytest.raises(AutofuncError, match=r"compile='graphs' records captured stages, so it needs engine=\"graph\""):
        af.pipeline([], None, compile="graphs", engine="eager")  # type: ignore[arg-type]


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if x.isnan().any():
                raise ValueError("not a number")
        return x.square().mean()


def test_a_branch_on_data_is_refused(replayed: list[ReplayedGraphs]) -> None:
    batch = {"x": torch.randn(4, 4)}
    model = af.from_module(Deciding(), batch)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(af.split(model, 2), s, compile="graphs")
    with pytest.raises(ModelError, match=r"stage 0 .* cannot be recorded: it branches on the data .*x.isnan\(\).any\(\)"):
        af.value_and_grad(pipe)(model.init(), batch)


def test_an_entry_on_another_device_is_refused(replayed: list[ReplayedGraphs]) -> None:
    meta = torch.device("meta")
    with pytest.raises(AutofuncError, match=r"'scale' is on meta, but a recorded step reads its values on cpu only"):
        cuda_graphs_check(meta)


def cuda_graphs_check(device: torch.device) -> None:
    from autofunc.engine.recordable import check_tensors

    check_tensors([("x", torch.ones(1)), ("scale", torch.ones((), device=device))], torch.device("cpu"))


def test_a_failure_while_recording(replayed: list[ReplayedGraphs], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _, model, batch = pipes("mlp", "1f1b")
    params, step = model.init(seed=7), af.value_and_grad(pipe)
    step(params, batch)

    def fails(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("tests.runtime.replayed.ReplayedGraph.__torch_dispatch__", fails)
    with pytest.raises(AutofuncError, match=r"a step cannot be recorded: rank 0, step 2, action 0F0 .*not permitted"):
        step(params, batch)
    assert torch.ones(1).item() == 1, "nothing is captured any more"


@pytest.mark.parametrize(
    "like",
    [torch.arange(6.0).view(2, 3), torch.arange(12.0).view(3, 4)[:, 1:3], torch.ones(1, 3).expand(4, 3), torch.ones(0, 2)],
    ids=["whole", "columns", "expanded", "empty"],
)
def test_fixed_memory(like: Tensor) -> None:
    fixed = Fixed([like])
    (tensor,) = fixed.tensors
    assert tensor.stride() == like.stride()
    for value in (like, like * 2):
        given = (
            like if like.numel() == 0 or 0 in like.stride() else torch.empty_strided(like.shape, like.stride()).copy_(value)
        )
        fixed.fill([given])
        assert torch.equal(tensor, given)


def test_generating_is_not_recorded(replayed: list[ReplayedGraphs]) -> None:
    """Caches are donated, and written in place."""
    pipe, _, model, batch = pipes("mlp", "1f1b")
    for _ in range(3):
        pipe.advance(model.init(), batch, [{}] * 4)
    assert not replayed and all(plan.recordings is None for plan in pipe._plans if plan.mode is Mode.ADVANCE)
