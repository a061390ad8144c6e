"""`pipe.advance`: every microbatch has its own state, which is donated and returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc.errors import BatchError

COLUMNS, ROWS, CACHES = 5, 4, 2


def noting() -> af.Layer:
    """Write the input into the next column of its notes, and add up all columns."""

    def apply(params: Any, x: Tensor | None, batch: Any, state: Any, training: bool) -> tuple[Tensor, Any]:
        given = batch["x"] if x is None else x
        notes = state["notes"].index_copy(1, batch["column"].view(1), (given * params["scale"]).detach().unsqueeze(1))
        count = state["count"] + training
        return given + notes.sum(1), {"notes": notes, "count": count}

    def init_state(key: Any) -> Any:
        return {"notes": torch.zeros(ROWS // CACHES, COLUMNS, device=key.device), "count": key.zeros("count", ())}

    return af.Layer(init=lambda key: {"scale": key.ones("scale", ()) * 2}, apply=apply, init_state=init_state)


def model_of_notes() -> af.Model:
    return af.Model({"a": noting(), "b": noting(), "c": noting()})


def by_hand(x: Tensor) -> list[Tensor]:
    """Compute the outputs of all columns: each layer adds twice the sum of all inputs so far."""
    sums = [torch.zeros(ROWS) for _ in range(3)]
    found = []
    for column in range(COLUMNS):
        given = x[:, column]
        for total in sums:
            total += 2 * given
            given = given + total
        found.append(given)
    return found


@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_each_microbatch_has_its_own_state(num_ranks: int, engine: str) -> None:
    model = model_of_notes()
    schedule = af.schedule.build("gpipe", num_ranks=num_ranks, num_microbatches=8)
    pipe = af.pipeline(af.split(model, num_ranks), schedule, engine=engine, batch_dims={"x": 0, "column": None})
    params, states = pipe.init(), [pipe.empty_state("cpu") for _ in range(CACHES)]
    x = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
    places = []
    for column, expected in enumerate(by_hand(x)):
        outputs, states = pipe.advance(params, {"x": x[:, column], "column": torch.tensor(column)}, states)
        assert torch.equal(outputs, expected)
        places.append([state["a", "notes"].data_ptr() for state in states])
    assert [float(state["c", "count"]) for state in states] == [COLUMNS] * CACHES
    if engine == "graph":
        assert all(each == places[0] for each in places), "a part is written where the state lies, but in the first call"
    with pytest.raises(BatchError, match="a batch of 3 rows cannot be cut into 2"):
        pipe.advance(params, {"x": x[:3, 0], "column": torch.tensor(0)}, states)


def test_evaluation_changes_no_state() -> None:
    """Only the states given to `advance` are donated."""
    pipe = af.pipeline(af.split(model_of_notes()), af.schedule.build("gpipe", num_ranks=1, num_microbatches=1))
    params, state = pipe.init(), pipe.init_state()
    pipe.forward(params, {"x": torch.ones(ROWS // CACHES), "column": torch.tensor(1)}, state=state)
    assert not any(leaf.any() for leaf in af.tree.flatten(state).values())
