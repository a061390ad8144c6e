"""The public transform: what it checks, builds, explains and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.errors import (
    AutofuncError,
    BatchError,
    MeshError,
    ModelError,
    PipelineRunError,
    ScheduleError,
    SplitError,
)
from tests.cases import assert_same_tree, make_case


def build(num_ranks: int = 2, num_microbatches: int = 2) -> tuple[Any, Any, Any]:
    model, stages, loss, batch = make_case("gpt2", num_ranks, 2 * num_microbatches)
    s = af.schedule.build("1f1b", num_ranks=num_ranks, num_microbatches=num_microbatches)
    return model, af.pipeline(stages, s, loss=loss), batch


def test_stages_must_fit_the_schedule() -> None:
    _, stages, loss, _ = make_case("gpt2", 3, 2)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    with pytest.raises(ScheduleError, match="2 ranks has 2 stages, but the model is split into 3; use 1 split points"):
        af.pipeline(stages, s, loss=loss)


def test_an_invalid_schedule_is_refused() -> None:
    _, stages, loss, _ = make_case("gpt2", 2, 2)
    with pytest.raises(ScheduleError, match="cannot go on"):
        af.pipeline(stages, af.schedule.from_text("0F0 0B0 0F1 0B1 \n 1F0 1F1 1B0 1B1"), loss=loss)


def test_a_forward_only_schedule_gives_a_loss_but_no_gradients() -> None:
    model, stages, loss, batch = make_case("gpt2", 2, 4)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(stages, s.forward_form(), loss=loss)
    assert torch.equal(pipe(model.init(), batch), af.pipeline(stages, s, loss=loss)(model.init(), batch))
    with pytest.raises(ScheduleError, match="has no backward actions"):
        af.value_and_grad(pipe)(model.init(), batch)


@pytest.mark.parametrize("wrong", [lambda s: s[:2], lambda s: s[1:], lambda s: [s[0], s[0]], lambda s: s[1::-1]])
def test_stages_that_are_not_the_model_are_refused(wrong: Any) -> None:
    _, stages, loss, _ = make_case("gpt2", 3, 2)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    with pytest.raises(SplitError, match="the stages run the layers"):
        af.pipeline(wrong(stages), s, loss=loss)


def test_a_loss_that_selects_rows_by_a_mask() -> None:
    def masked(outputs: torch.Tensor, microbatch: Any) -> Any:
        keep = microbatch["labels"] >= 0
        chosen = outputs[keep]
        return torch.nn.functional.cross_entropy(chosen, microbatch["labels"][keep], reduction="sum"), keep.sum()

    model, stages, _, batch = make_case("gpt2", 2, 4)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    params = model.init()
    found, grads = af.value_and_grad(af.pipeline(stages, s, loss=masked))(params, batch)
    expected, expected_grads = af.reference_value_and_grad(model, masked, 2)(params, batch)
    assert torch.equal(found, expected)
    assert_same_tree(expected_grads, grads)


def test_a_layer_that_reads_a_value_is_told_where() -> None:
    def reads(params: Any, x: Any, batch: Any) -> Any:
        return batch["x"] if batch["x"].sum() > 0 else -batch["x"]

    s = af.schedule.build("gpipe", num_ranks=1, num_microbatches=1)
    pipe = af.pipeline(af.split(af.Model({"a": af.Layer(apply=reads)})), s, loss=lambda outputs, mb: outputs.sum())
    with pytest.raises(ModelError, match=r"reads the value of a tensor \(.*test_transform.py, line \d+: return batch"):
        pipe(pipe.init(), {"x": torch.ones(2)})


def test_plans_are_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autofunc.runtime.plans._MOST_PLANS", 3)
    _, pipe, batch = build()
    for number in range(5):
        pipe(pipe.init(), {**batch, "temperature": float(number)})
    assert len(pipe._plans) == 3
    with pytest.raises(BatchError, match="the batch holds a ndarray; expected tensors"):
        pipe(pipe.init(), {**batch, "more": batch["labels"].numpy()})


def test_place_and_gather_copy() -> None:
    model, pipe, _ = build()
    full = model.init()
    placed = pipe.place(full)
    gathered = pipe.gather(placed)
    placed["wte", "weight"].zero_()
    assert full["wte", "weight"].any() and gathered["wte", "weight"].any()


def test_parameters_that_change_shape_are_refused() -> None:
    model, pipe, batch = build()
    params = model.init()
    pipe(params, batch)
    params["ln_f", "bias"] = torch.zeros(1)
    with pytest.raises(ModelError, match=r"'ln_f.bias' has shape \(1,\); expected \(8,\)"):
        pipe(params, batch)


@pytest.mark.parametrize("key", [5, (1,), (1.0, 2), torch.tensor(5)])
def test_invalid_keys_are_refused(key: Any) -> None:
    _, pipe, batch = build()
    with pytest.raises(BatchError, match="expected a pair of integers"):
        pipe(pipe.init(), batch, key)


def test_unknown_engine() -> None:
    _, stages, loss, _ = make_case("gpt2", 1, 2)
    s = af.schedule.build("gpipe", num_ranks=1, num_microbatches=1)
    with pytest.raises(AutofuncError, match="unknown engine 'egaer': did you mean eager"):
        af.pipeline(stages, s, loss=loss, engine="egaer")


def test_batches_that_do_not_divide() -> None:
    _, pipe, _ = build()
    batch = {"input_ids": torch.zeros(3, 4, dtype=torch.int64), "labels": torch.zeros(3, 4, dtype=torch.int64)}
    with pytest.raises(BatchError, match="3 rows cannot be cut into 2"):
        af.value_and_grad(pipe)(pipe.init(), batch)


def test_parameters_that_do_not_fit() -> None:
    model, pipe, batch = build()
    params = pipe.init()
    del params["ln_f"]
    with pytest.raises(ModelError, match=r"params have no 'ln_f.bias'"):
        af.value_and_grad(pipe)(params, batch)
    params = model.init()
    params["ln_f", "bias"] = torch.zeros(5)
    with pytest.raises(ModelError, match=r"'ln_f.bias' has shape \(5,\); expected \(8,\)"):
        af.value_and_grad(pipe)(params, batch)


def test_value_and_grad_of_something_else() -> None:
    with pytest.raises(AutofuncError, match="takes a pipeline"):
        af.value_and_grad(lambda params, batch: 0.0)


def test_build_ahead_and_explain() -> None:
    _, pipe, batch = build()
    assert "bytes a microbatch" not in pipe.explain()
    text = pipe.build(batch, key=(0, 0)).explain()
    assert "stage 0 on rank 0: wte .. h.1, 1,944 parameters" in text and "x: float32 2x6x8, 384 bytes a microbatch" in text
    assert "tied across stages: head.weight is wte.weight" in text
    assert "schedule 1f1b: 2 ranks, 2 microbatches, bubble 33.3%" in text
    assert max(map(len, text.splitlines())) <= 80
    af.value_and_grad(pipe)(pipe.init(), batch, (0, 0))
    assert len(pipe._plans) == 1, "the first call found what was built ahead"


def test_batches_of_different_shapes() -> None:
    model, pipe, batch = build()
    params = model.init()
    for tokens in (6, 4):
        shorter = {name: leaf[:, :tokens] for name, leaf in batch.items()}
        expected_loss, expected = af.reference_value_and_grad(model, pipe.loss, 2)(params, shorter)
        found_loss, found = af.value_and_grad(pipe)(params, shorter)
        assert torch.equal(found_loss, expected_loss)
        assert_same_tree(expected, found)


def test_forward_gives_rows_in_order() -> None:
    model, pipe, batch = build(3, 4)
    params = model.init()
    expected = torch.cat([model(params, piece) for piece in af.batch.split_batch(batch, 4)])
    assert torch.equal(pipe.forward(params, batch), expected)
    del batch["labels"]
    assert torch.equal(pipe.forward(params, batch, gather="all"), expected), "labels are not needed"
    with pytest.raises(AutofuncError, match="gather='some'"):
        pipe.forward(params, batch, gather="some")


def test_an_error_at_run_time_names_the_place() -> None:
    calls = []

    def fails_later(params: Any, x: Any, batch: Any) -> Any:
        calls.append(x)
        if len(calls) == 4:  # one run on fake tensors, then microbatches 0 and 1 and 2
            raise ValueError("a row I cannot read")
        return x

    layers = {"a": af.Layer(apply=lambda p, x, batch: batch["x"]), "b": af.Layer(apply=fails_later)}
    s = af.schedule.build("gpipe", num_ranks=2, num_microbatches=3)
    pipe = af.pipeline(af.split(af.Model(layers), ["b"]), s, loss=lambda outputs, mb: outputs.sum(), engine="eager")
    with pytest.raises(PipelineRunError) as caught:
        pipe(pipe.init(), {"x": torch.zeros(3)})
    text = str(caught.value)
    assert "rank 1, step 1, action 1F2 (stage 1, microbatch 2): ValueError: a row I cannot read" in text
    assert ">>1F2<<" in text


def test_trace_prints_each_action(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AUTOFUNC_TRACE", "1")
    _, pipe, batch = build()
    pipe(pipe.init(), batch)
    lines = capsys.readouterr().err.splitlines()
    assert "autofunc: rank 0 step 1 0F0 (2, 6, 8)" in lines
    assert any("0SEND_F1" in line for line in lines) and any("1RECV_F1" in line for line in lines)


def test_mesh_without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(MeshError, match=r"torchrun --nproc-per-node 2 .* or pass mesh=None"):
        af.make_mesh(pp=2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(MeshError, match="pp=2 needs 2 processes, but there are 3"):
        af.make_mesh(pp=2)


def test_memory_of_a_step_is_freed() -> None:
    """After a step nothing of it is alive but its results."""
    import gc

    _, pipe, batch = build()
    params = pipe.init()
    step = af.value_and_grad(pipe)

    def tensors() -> int:
        while gc.collect():  # what other tests left may take several rounds
            pass
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    results = step(params, batch)
    before = tensors()
    results = step(params, batch)
    assert tensors() == before
    del results


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_profile_returns_when_every_action_ran(engine: str, tmp_path: Path) -> None:
    _, stages, loss, batch = make_case("gpt2", 4, 6)
    s = af.schedule.build("zbv", num_ranks=2, num_microbatches=3)
    pipe = af.pipeline(stages, s, loss=loss, engine=engine)
    params = pipe.init()
    timeline = pipe.profile(params, batch, steps=2)
    assert timeline.label == "measured" and timeline.schedule.is_lowered
    for start, end in zip(timeline.start, timeline.end, strict=True):
        assert (start > 0).all() and (end >= start).all() and (start[1:] >= end[:-1]).all(), "one after the other"
    assert 0 < max(timeline.busy) <= timeline.makespan
    picture = af.schedule.draw(timeline)
    assert all(f"rank {rank} | " in picture for rank in range(2))
    assert all(entry in picture for entry in ("0 forward", "i0 input gradient", "w0 weight gradient", ". idle"))
    assert "zbv, measured: 2 ranks" in af.schedule.draw(timeline, tmp_path / "profile.svg")
    costs = pipe.costs(params, batch, steps=2)
    assert costs.comm == 0 and len(costs.F) == 4 and min(costs.F) > 0  # type: ignore[arg-type, type-var]
    assert af.schedule.simulate(s, costs).makespan > 0


def test_costs_of_a_schedule_that_never_splits() -> None:
    _, stages, loss, batch = make_case("gpt2", 2, 6)
    pipe = af.pipeline(stages, af.schedule.build("1f1b", num_ranks=2, num_microbatches=3), loss=loss)
    found: list[Any] = [pipe.costs(pipe.init(), batch, steps=3) for _ in range(3)]
    assert all(costs.I[1] > 0 and costs.W[1] > 0 for costs in found)
    least_i, least_w = (min(getattr(costs, kind)[0] for costs in found) for kind in "IW")  # whatever else the machine does
    assert least_i < least_w, "the first stage needs no input gradient"
