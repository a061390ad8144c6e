"""The next batch is read while a device computes: the same rows, in the same order, at most one batch early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from autofunc.config import parse_config
from autofunc.data import START, Part, make_loader
from autofunc.errors import DataError
from autofunc.runtime.position import here
from autofunc.train import loop, step
from autofunc.train.batches import Batches
from autofunc.train.loop import TrainResult, train
from autofunc.train.progress import Silent
from autofunc.train.recipe import prepare
from autofunc.tree import flatten
from tests.train.test_nonfinite import CONFIG, folder

__all__ = ["folder"]  # a fixture

CPU = torch.device("cpu")


def numbered(count: int, asked: list[Any]) -> Iterator[list[Part]]:
    """Yield numbered batches, noting when each is read; then raise an error."""
    for number in range(count):
        asked.append(number)
        here.enter("reading rows")
        yield [Part({"x": torch.tensor([number])}, 1, ends_batch=True, after=START)]
    raise DataError("the rows are torn")


@pytest.mark.parametrize("ahead", [False, True])
def test_at_most_one_batch_is_read_ahead(ahead: bool) -> None:
    asked: list[Any] = []
    batches, phases = Batches(numbered(3, asked), CPU, reads_ahead=ahead), []
    with pytest.raises(DataError, match="torn"):
        for number, batch in enumerate(batches):
            assert batch.sent[0]["x"].item() == number == batch.parts[0].batch["x"].item()
            here.enter(f"step {number}")
            batches.read_ahead()
            batches.read_ahead()
            phases.append(here.phase)
            assert asked == list(range(min(number + 1 + ahead, 3))), "the last one is trained on before the error is raised"
    assert phases == ["step 0", "step 1", "step 2"]


class Kept:
    """Notes the extra values a checkpoint would have after each step."""

    is_busy = False

    def __init__(self) -> None:
        self.extras: list[Any] = []

    def is_due(self, step: int, ends_epoch: bool) -> bool:
        return True

    def finish(self) -> None: ...

    def save(self, step: int, pipe: Any, now: Any, extra: Any) -> bool:
        self.extras.append(extra)
        return True


def trained(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[TrainResult, list[Any], list[str]]:
    """Return a run of more than an epoch, its checkpoints' extra values, and its order of reading rows and losses."""
    steps = {**CONFIG["step_scheduler"], "max_steps": 8, "num_epochs": 5}
    recipe = prepare(parse_config({**CONFIG, "step_scheduler": steps}))
    rows, order, kept = recipe.dataset, [], Kept()

    class Noted(list):  # type: ignore[type-arg]
        def __getitem__(self, index: Any) -> Any:
            order.append("row")
            return list.__getitem__(self, index)

    def noting(together: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda results: order.append("loss") or together(results)  # type: ignore[func-returns-value]

    loader = partial(make_loader, Noted(rows), 4, microbatch=2, seed=3, shuffle=True)  # type: ignore[arg-type]
    made = replace(recipe, make_train_loader=loader)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Batches", partial(Batches, reads_ahead=ahead))
        patch.setattr(step, "together", noting(step.together))
        result = train(made, None, CPU, Silent(), None, kept)  # type: ignore[arg-type]
    return result, kept.extras, order


def test_reading_ahead_does_not_change_a_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late, late_extras, late_order = trained(False, monkeypatch)
    early, early_extras, early_order = trained(True, monkeypatch)
    assert late_order == (["row"] * 4 + ["loss"]) * 8
    assert early_order == ["row"] * 4 + (["row"] * 4 + ["loss"]) * 7 + ["loss"], "read before the loss; none after the run"
    assert len(early_extras) == 8 and early_extras == late_extras
    assert all(torch.equal(leaf, flatten(late.params)[path]) for path, leaf in flatten(early.params).items())
