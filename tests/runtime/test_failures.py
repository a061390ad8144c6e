"""Errors in the middle of a step: their message, place and type."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc import errors
from autofunc.cli import main
from autofunc.errors import AutofuncError, BatchError, ModelError, PeerLostError, PipelineRunError, full_message
from autofunc.runtime.executor import RankStep, run_rank
from autofunc.runtime.finish import share
from autofunc.runtime.program import build_program
from autofunc.runtime.transport import MemoryHub, MemoryTransport


class Odd(Exception):
    """Cannot be made from a message alone."""

    def __init__(self, code: int, *, path: str) -> None:
        super().__init__(code, path)
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


class OwnError(AutofuncError):
    """An `AutofuncError` that cannot be made from a message alone."""

    def __init__(self, row: int, column: int) -> None:
        super().__init__(f"bad cell {row}, {column}")
        self.cell = (row, column)


def failing(error: Exception) -> tuple[Any, Any, Any]:
    """Return a pipeline whose stage 1 raises in the forward of microbatch 2."""
    calls = []

    def apply(params: Any, x: Any, batch: Any) -> Any:
        calls.append(x)
        if len(calls) == 4:  # once on fake tensors, then microbatches 0 and 1 and 2
            raise error
        return x

    layers = {"a": af.Layer(apply=lambda p, x, batch: batch["x"]), "b": af.Layer(apply=apply)}
    s = af.schedule.build("gpipe", num_ranks=2, num_microbatches=3)
    pipe = af.pipeline(af.split(af.Model(layers), ["b"]), s, loss=lambda outputs, mb: outputs.sum(), engine="eager")
    return pipe, pipe.init(), {"x": torch.zeros(3)}


def place_of(error: PipelineRunError) -> tuple[Any, ...]:
    return error.rank, error.step, error.action, error.stage, error.microbatch


def test_an_exception_with_its_own_constructor() -> None:
    pipe, params, batch = failing(Odd(7, path="here"))
    with pytest.raises(
        PipelineRunError, match=r"rank 1, step 1, action 1F2 \(stage 1, microbatch 2\): Odd: code 7\n"
    ) as caught:
        pipe(params, batch)
    assert place_of(caught.value) == (1, 1, "1F2", 1, 2)
    assert type(caught.value.__cause__) is Odd and ">>1F2<<" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert place_of(again) == place_of(caught.value) and str(again) == str(caught.value)


def test_notes_of_an_exception_are_kept() -> None:
    error = ValueError("a row I cannot read")
    error.add_note("it is row 7")
    pipe, params, batch = failing(error)
    with pytest.raises(PipelineRunError, match="ValueError: a row I cannot read\nit is row 7\n"):
        pipe(params, batch)


@pytest.mark.parametrize("error", [OwnError(3, 4), BatchError("no labels")], ids=["constructor of its own", "ours"])
def test_an_autofunc_error_keeps_its_type(error: AutofuncError) -> None:
    pipe, params, batch = failing(error)
    with pytest.raises(type(error)) as caught:
        pipe(params, batch)
    assert caught.value is error
    said = full_message(error).splitlines()
    assert said[0] == str(error) and said[1] == "at rank 1, step 1, action 1F2 (stage 1, microbatch 2)"
    assert said[-1].startswith("rank 1 | ") and ">>1F2<<" in said[-1]


def test_a_lost_peer_error_gets_the_place() -> None:
    pipe, params, batch = failing(PeerLostError("the other end of a transfer is gone"))
    with pytest.raises(PeerLostError) as caught:
        pipe(params, batch)
    assert place_of(caught.value) == (1, 1, "1F2", 1, 2)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is PeerLostError and place_of(again) == place_of(caught.value)
    assert full_message(again) == full_message(caught.value)


def test_an_action_without_a_microbatch() -> None:
    lowered = af.schedule.lower(af.schedule.build("gpipe", num_ranks=1, num_microbatches=1), unshard="once")
    program = build_program(lowered, 0, (), {}, {}, {})

    def gather(stage: int) -> None:
        raise MemoryError("no room")

    nothing: Any = SimpleNamespace(gather=gather)
    step = RankStep(program, {}, {}, nothing, nothing, {}, (), (), (), 3)
    with pytest.raises(
        PipelineRunError, match=r"^rank 0, step 3, action 0UNSHARD \(stage 0\): MemoryError: no room\n"
    ) as caught:
        list(run_rank(step))
    assert place_of(caught.value) == (0, 3, "0UNSHARD", 0, None)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AutofuncError)],
    ids=lambda kind: kind.__name__,
)
def test_errors_can_be_sent_to_another_process(kind: type[AutofuncError]) -> None:
    error = kind("a message")
    error.add_note("and where")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind and full_message(again) == "a message\nand where"
    if isinstance(again, PipelineRunError):
        assert place_of(again) == (None,) * 5


@pytest.mark.parametrize(("error", "status"), [(BatchError("no labels"), 2), (PipelineRunError("it stopped"), 1)])
def test_the_command_line_shows_notes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: AutofuncError, status: int
) -> None:
    def app() -> None:
        raise error

    error.add_note("at rank 1")
    monkeypatch.setattr(main, "app", app)
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == status
    assert capsys.readouterr().err == f"error: {error}\nat rank 1\n"


def test_values_to_share_that_differ_from_the_plan() -> None:
    """Other ranks would receive them as something else."""
    transport = MemoryTransport(MemoryHub(2), 0)
    shared = share(0, 0, lambda: [torch.zeros(3)], [((2,), torch.float32)], torch.device("cpu"), transport, [])
    with pytest.raises(ModelError, match=r"ends in \[\(\(3,\), torch.float32\)\]; when the step was planned, it ended in"):
        next(shared)
