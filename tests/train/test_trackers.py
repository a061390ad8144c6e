"""TensorBoard, Weights & Biases and MLflow receive the values of the run's file; a failing one does not end the run."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.cli.here import run_here
from tests.train.test_weighing import finetune

Calls = list[tuple[Any, ...]]


class Told:
    """Records every call of its methods, by name."""

    def __init__(self, calls: Calls, fails_at: int | None = None, **known: Any) -> None:
        self.__dict__.update(known, calls=calls, fails_at=fails_at)

    def __getattr__(self, name: str) -> Any:
        def called(*given: Any, **named: Any) -> Any:
            if self.fails_at is not None and self.fails_at in (*given, *named.values()):
                raise ConnectionError("the server is gone")
            self.calls.append((name, *given, named))
            return self.__dict__.get(f"gives_{name}")

        return called


def module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, made)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Calls]:
    """Fakes of the three packages, and their recorded calls."""
    found: dict[str, Calls] = {"tensorboard": [], "wandb": [], "mlflow": []}

    def begin(which: str, name: str, made: Any) -> Any:
        def called(*given: Any, **named: Any) -> Any:
            found[which].append((name, *given, named))
            return made

        return called

    module(monkeypatch, "tensorboard")
    module(
        monkeypatch, "torch.utils.tensorboard",
        SummaryWriter=begin("tensorboard", "SummaryWriter", Told(found["tensorboard"])),
    )  # fmt: skip
    module(monkeypatch, "wandb", init=begin("wandb", "init", Told(found["wandb"], id="abc", fails_at=None)))
    client = Told(
        found["mlflow"], gives_get_experiment_by_name=None, gives_create_experiment="7",
        gives_create_run=SimpleNamespace(info=SimpleNamespace(run_id="r1")),
    )  # fmt: skip
    module(monkeypatch, "mlflow", MlflowClient=begin("mlflow", "MlflowClient", client))
    module(monkeypatch, "mlflow.entities", Param=lambda key, value: (key, value), Metric=lambda *given: given)
    return found


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def test_all_three_receive_values(tmp_path: Path, calls: dict[str, Calls]) -> None:
    finetune(
        tmp_path, tensorboard={"flush_secs": 3}, wandb={"project": "p", "entity": "e", "tags": ["t"], "mode": "offline"},
        mlflow={"experiment_name": "x", "tracking_uri": "u", "tags": {"a": "b"}},
    )  # fmt: skip
    one, two, validated = lines_of(tmp_path)
    numbers = [{name: value for name, value in line.items() if name != "step"} for line in (one, two, validated)]
    steps = [1, 2, 2]

    made, text, *scalars, closed = calls["tensorboard"]
    assert made == ("SummaryWriter", "out/tensorboard", {"purge_step": None, "flush_secs": 3})
    assert text[:2] == ("add_text", "config") and '"lr": 0.5' in text[2]
    assert scalars == [
        ("add_scalar", name, float(value), step, {})
        for step, values in zip(steps, numbers, strict=True) for name, value in values.items()
    ]  # fmt: skip
    assert closed == ("close", {})

    made, *logged, closed = calls["wandb"]
    assert made[0] == "init" and made[1].pop("config")["optimizer"]["lr"] == 0.5
    assert made[1] == {
        "project": "p", "entity": "e", "name": "out", "tags": ["t"], "mode": "offline", "dir": "out", "resume": "allow",
    }  # fmt: skip
    assert logged == [("log", values, {"step": step}) for step, values in zip(steps, numbers, strict=True)]
    assert closed == ("finish", {"exit_code": 0})

    client, asked, experiment, run, params, *logged, closed = calls["mlflow"]
    assert client == ("MlflowClient", {"tracking_uri": "u"}) and asked == ("get_experiment_by_name", "x", {})
    assert experiment == ("create_experiment", "x", {"artifact_location": None})
    assert run == ("create_run", "7", {"run_name": "out", "tags": {"a": "b"}})
    assert params[:2] == ("log_batch", "r1") and ("optimizer.lr", "0.5") in params[2]["params"]
    for (_, run_id, named), step, values in zip(logged, steps, numbers, strict=True):
        told = {name: value for name, value, _, at in named["metrics"] if at == step}
        assert (run_id, told, named["synchronous"]) == ("r1", values, False)
    assert closed == ("set_terminated", "r1", "FINISHED", {})


def test_a_resumed_run_continues_its_trackers(tmp_path: Path, calls: dict[str, Calls]) -> None:
    sections = {"tensorboard": {}, "wandb": {}, "mlflow": {}, "checkpoint": {}}
    finetune(tmp_path, **sections)
    for each in calls.values():
        each.clear()
    more = "--checkpoint.restore_from", "LATEST", "--step_scheduler.max_steps", "4"
    done = run_here(
        tmp_path, "finetune", "llm", "-c", "run.yaml", *more, "--step_scheduler.log_remote_every_steps", "4"
    )  # fmt: skip
    assert done.status == 0, done.err
    assert calls["tensorboard"][0][2]["purge_step"] == 3
    assert calls["wandb"][0][1]["id"] == "abc" and calls["wandb"][0][1]["project"] == "autofunc"
    assert calls["mlflow"][1] == ("update_run", "r1", {"status": "RUNNING"})
    assert [named["step"] for name, *_, named in calls["wandb"] if name == "log"] == [4, 4], "every fourth, and validation"


def test_a_failing_tracker_is_dropped(tmp_path: Path, calls: dict[str, Calls], monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Told(calls["wandb"], id="abc", fails_at=2)
    module(monkeypatch, "wandb", init=lambda **_: failing)
    *_, out = finetune(tmp_path, tensorboard={}, wandb={})
    said = "wandb failed and gets no more values: ConnectionError: the server is gone. metrics.jsonl continues"
    assert " ".join(out.split()).count(said) == 1
    assert [call[0] for call in calls["wandb"]] == ["log"] and calls["tensorboard"][-1][0] == "close"
    assert len(lines_of(tmp_path)) == 3


def test_trackers_that_cannot_start(tmp_path: Path, calls: dict[str, Calls], monkeypatch: pytest.MonkeyPatch) -> None:
    finetune(tmp_path)
    words = "finetune", "llm", "-c", "run.yaml", "--overwrite"
    assert run_here(tmp_path, *words, "--wandb.enable", "false").status == 0 and not calls["wandb"]

    def refuse(**_: Any) -> None:
        raise ValueError("api_key not configured")

    module(monkeypatch, "wandb", init=refuse)
    done = run_here(tmp_path, *words, "--wandb.project", "p")
    assert done.status == 1 and "wandb cannot start: ValueError: api_key not configured" in done.err
    for name in ("tensorboard", "wandb", "mlflow"):
        monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr("autofunc.train.trackers.find_spec", lambda _: None)
        done = run_here(tmp_path, *words, f"--{name}.enable", "true")
        assert done.status == 2 and f"pip install 'autofunc[{name}]'" in done.err and "Traceback" not in done.err
