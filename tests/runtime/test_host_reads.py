"""A step never makes the host wait for the device: it reads no values of tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import autofunc as af
from autofunc import pipe as pipe_module
from autofunc.errors import BatchError
from autofunc.runtime import weight_check
from tests.cases import make_case, mesh_of
from tests.pool import WorkerPool

READS = {"aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default"}
CASES = [("gpt2", "graph"), ("gpt2", "eager"), ("mlp", "graph")]


class Reads(TorchDispatchMode):
    """Counts the operators whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += str(func) in READS
        return func(*args, **(kwargs or {}))


def reads_of_a_step(model_name: str, engine: str, mesh: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return the reads in `run_step` and `clip`, once all is built."""
    model, stages, loss, batch = make_case(model_name, 2, rows=4)
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=4)
    pipe = af.pipeline(stages, s, loss=loss, mesh=mesh, engine=engine)
    params, step, reads = pipe.place(model.init(0)), af.value_and_grad(pipe), Reads()
    step(params, batch, (0, 0))
    run_step = pipe_module.run_step

    def counted(*args: Any) -> Any:
        with reads:
            return run_step(*args)

    monkeypatch.setattr(pipe_module, "run_step", counted)
    _, grads = step(params, batch, (0, 1))
    with reads:
        pipe.clip(grads, 0.1)
    return +reads.found


@pytest.mark.parametrize(("model_name", "engine"), CASES)
def test_nothing_is_read_in_one_process(model_name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reads_of_a_step(model_name, engine, None, monkeypatch) == {}


def on_gloo() -> dict[str, int]:
    with pytest.MonkeyPatch.context() as patch:
        return dict(reads_of_a_step("gpt2", "graph", mesh_of(pp=2, dp_shard=2), patch))


def test_nothing_is_read_over_processes(workers: WorkerPool) -> None:
    assert workers.run(on_gloo) == [{}] * 4


def test_reads_are_counted() -> None:
    reads = Reads()
    with reads:
        torch.ones(1).item()
    assert reads.found["aten._local_scalar_dense.default"] == 1


class LateEvent:
    """Stands in for a device's event."""

    def __init__(self) -> None:
        self.is_done = False

    def query(self) -> bool:
        return self.is_done


def test_a_weight_is_checked_on_arrival() -> None:
    """As on an accelerator: nothing waits, and the error names the step."""
    check, event = weight_check.WeightCheck(), LateEvent()
    check._asked.append(weight_check._Asked(3, torch.zeros(()), event))  # type: ignore[arg-type]
    check.add(4, torch.ones(()))
    check.raise_if_nothing_weighed()
    event.is_done = True
    with pytest.raises(BatchError, match="step 3: the total weight of the loss is 0"):
        check.raise_if_nothing_weighed()
    check.raise_if_nothing_weighed()


def test_gradients_of_a_step_without_weight_are_zero() -> None:
    """If the error comes late, no harm is done by then."""
    model, stages, _, batch = make_case("mlp", 2, rows=4)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=4)
    pipe = af.pipeline(stages, s, loss=lambda outputs, mb: (0.0 * outputs.sum(), 0))
    pipe._weight_check.raise_if_nothing_weighed = lambda: None  # type: ignore[method-assign]
    loss, grads = af.value_and_grad(pipe)(model.init(0), batch)
    assert loss.isnan() and not any(grad.any() for grad in af.tree.flatten(grads).values())
