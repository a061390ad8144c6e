"""What needs no gradients takes a batch of any number of rows: outputs of all of them, in order, and their loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.batch import split_any_rows
from autofunc.errors import BatchError
from autofunc.losses import combine_aux, evaluate
from tests.cases import make_case

MICROBATCHES = 3
MOST_ROWS = 2 * MICROBATCHES + 1
CASES = [
    ("graph", "mlp", 1, "gpipe"), ("graph", "mlp", 2, "interleaved_1f1b"), ("graph", "mlp", 3, "zbv"),
    ("graph", "gpt2", 4, "1f1b"), ("eager", "mlp", 4, "zb_h2"), ("eager", "gpt2", 2, "v_min"),
]  # fmt: skip


def first(batch: Mapping[str, Tensor], rows: int) -> dict[str, Tensor]:
    return {name: leaf[:rows] for name, leaf in batch.items()}


def test_microbatches_have_as_few_sizes_as_can_be() -> None:
    for rows in range(1, 40):
        x, wide = torch.arange(rows), torch.arange(2 * 3 * rows).view(3, 2 * rows)
        for number in range(1, 8):
            made = split_any_rows(
                {"x": x, "wide": wide, "whole": torch.ones(())}, number, batch_dims={"wide": 1}, key=(0, 1)
            )
            sizes = [len(each["x"]) for each in made.whole]
            assert len(set(sizes)) == 1 and len(sizes) <= number and len(made.rest) <= 1
            pieces = [*made.whole, *made.rest]
            assert torch.equal(torch.cat([each["x"] for each in pieces]), x)
            assert torch.equal(torch.cat([each["wide"] for each in pieces], 1), wide)
            assert all(len(each["x"]) < sizes[0] for each in made.rest) and made.rows == rows
            assert made.share == (rows - sum(sizes)) / sizes[0]
            assert len({tuple(each["key"].tolist()) for each in pieces}) == len(pieces), "each draws numbers of its own"


@pytest.mark.parametrize(("engine", "model_name", "ranks", "name"), CASES)
def test_any_number_of_rows(engine: str, model_name: str, ranks: int, name: str) -> None:
    s = af.schedule.build(name, num_ranks=ranks, num_microbatches=MICROBATCHES)
    model, stages, loss, batch = make_case(model_name, s.num_stages, MOST_ROWS)
    pipe = af.pipeline(stages, s, loss=loss, engine=engine)
    params = model.init(seed=ranks)
    for rows in range(1, MOST_ROWS + 1):
        given = first(batch, rows)
        made = split_any_rows(given, MICROBATCHES)
        pieces = [model(params, piece) for piece in (*made.whole, *made.rest)]
        assert torch.equal(pipe.forward(params, given), torch.cat(pieces)), rows
        plain = model(params, given)
        terms = evaluate(loss, plain, given)
        torch.testing.assert_close(torch.cat(pieces), plain)
        torch.testing.assert_close(pipe(params, given), (terms.sum / terms.weight).detach())
        if rows % MICROBATCHES:
            with pytest.raises(BatchError, match="cannot be cut into 3 equal microbatches"):
                af.value_and_grad(pipe)(params, given)


def test_every_named_schedule_runs_its_first_microbatches() -> None:
    for name in af.schedule.names():
        for ranks in (1, 2, 4):
            s = af.schedule.build(name, num_ranks=ranks, num_microbatches=8)
            for number in (1, 3, 7):
                fewer = s.forward_form(number)
                assert fewer.num_microbatches == number
                af.schedule.validate(fewer)
                af.schedule.validate(af.schedule.lower(fewer))


class Net(nn.Module):
    """Rows in dim 1, a norm with state, an entry for all rows, and a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)])

    def forward(self, x: Tensor, y: Tensor, scale: Tensor) -> dict[str, Tensor]:
        x = x.transpose(0, 1) * scale
        for layer in self.layers:
            x = layer(x)
        return {"loss": (x - y).square().mean(), "x": x}


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_modules_with_state_and_rows_elsewhere(engine: str) -> None:
    torch.manual_seed(0)
    batch = {"x": torch.randn(3, 7), "y": torch.randn(7, 3), "scale": torch.tensor([1.0, 2.0, 3.0])}
    net = Net()
    net.layers[1](torch.randn(9, 3))  # statistics that are not the initial ones
    dims = {"x": 1, "scale": None}
    pipe = af.pipeline(
        af.split(af.from_module(net, batch), 2), af.schedule.build("1f1b", num_ranks=2, num_microbatches=3), engine=engine,
        batch_dims=dims,
    )  # fmt: skip
    params, state = pipe.init(), pipe.init_state()
    kept = {path: leaf.clone() for path, leaf in state.flatten_keys(".").items()}
    net.eval()
    for rows in range(1, 8):
        given = {"x": batch["x"][:, :rows], "y": batch["y"][:rows], "scale": batch["scale"]}
        expected = net(**given)
        torch.testing.assert_close(pipe(params, given, state=state), expected["loss"].detach())
        torch.testing.assert_close(pipe.forward(params, given, state=state)["x"], expected["x"].detach())
    assert all(torch.equal(leaf, kept[path]) for path, leaf in state.flatten_keys(".").items())


@af.losses.reduce_aux(error="mean", errors="cat", most="max")
def with_aux(outputs: Tensor, microbatch: Mapping[str, Tensor]) -> Any:
    errors = (outputs - microbatch["y"]).square().mean(1)
    aux = {"error": errors.mean(), "errors": errors, "most": errors.max(), "total": errors.sum()}
    return errors.sum(), torch.tensor(float(len(errors))), aux


def test_aux_is_that_of_all_rows() -> None:
    model, stages, _, batch = make_case("mlp", 2, 7)
    pipe = af.pipeline(stages, af.schedule.build("1f1b", num_ranks=2, num_microbatches=3), loss=with_aux)
    params = model.init()
    for rows in range(1, 8):
        given = first(batch, rows)
        _, aux = pipe(params, given, has_aux=True)
        expected = evaluate(with_aux, model(params, given), given).aux
        torch.testing.assert_close(aux, expected)
    one = {"error": torch.tensor(1.0)}
    assert combine_aux(with_aux, [one, {"error": torch.tensor(4.0)}], [2, 1])["error"] == 2.0


def test_a_rest_without_labels_weighs_nothing_and_a_batch_without_any_is_refused() -> None:
    model, stages, loss, batch = make_case("gpt2", 2, 5)
    pipe = af.pipeline(stages, af.schedule.build("1f1b", num_ranks=2, num_microbatches=2), loss=loss)
    params = model.init()
    labels = batch["labels"].clone()
    labels[3:] = -100
    expected = pipe(params, first({**batch, "labels": labels}, 3))
    torch.testing.assert_close(pipe(params, {**batch, "labels": labels}), expected)
    with pytest.raises(BatchError, match="the total weight of the loss is 0"):
        pipe(params, {**batch, "labels": torch.full_like(labels, -100)})
