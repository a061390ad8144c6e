"""Cutting batches, the loss contract, and auxiliary outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc.batch import split_batch
from autofunc.errors import BatchError
from autofunc.row_dims import rows_in_words
from tests.cases import make_case


def test_rows_are_cut_and_the_rest_goes_everywhere() -> None:
    table, mask = torch.arange(12).view(6, 2), torch.ones(3)
    pieces = split_batch({"x": table, "nested": {"y": [table + 1]}, "mask": mask, "flag": True}, 3)
    assert [piece["x"].tolist() for piece in pieces] == [table[i : i + 2].tolist() for i in (0, 2, 4)]
    assert torch.equal(pieces[1]["nested"]["y"][0], table[2:4] + 1)
    assert all(piece["mask"] is mask and piece["flag"] is True for piece in pieces)
    assert pieces[0]["x"].data_ptr() == table.data_ptr(), "views, not copies"


def test_batch_dims_override() -> None:
    pieces = split_batch(
        {"x": torch.zeros(4, 2), "t": torch.zeros(3, 4), "w": torch.zeros(4)}, 2, batch_dims={"t": 1, "w": None}
    )
    assert pieces[0]["t"].shape == (3, 2) and pieces[0]["w"].shape == (4,)
    with pytest.raises(BatchError, match="names 'z', which is not in the batch"):
        split_batch({"x": torch.zeros(4)}, 2, batch_dims={"z": 0})
    with pytest.raises(BatchError, match=r"batch\['t'\] has 3 rows in dim 0, but the batch has 4"):
        split_batch({"x": torch.zeros(4), "y": torch.zeros(4), "t": torch.zeros(3)}, 2, batch_dims={"t": 0})


def test_the_batch_size_does_not_depend_on_the_order_of_entries() -> None:
    x, y, scale = torch.zeros(4, 6), torch.zeros(4), torch.ones(2)
    for batch in ({"scale": scale, "x": x, "y": y}, {"x": x, "y": y, "scale": scale}):
        pieces = split_batch(batch, 2)
        assert pieces[0]["x"].shape == (2, 6) and pieces[0]["scale"] is scale
    with pytest.raises(BatchError, match=r"cannot tell the batch size: 'mask' has 6 rows and 'x' has 4; set batch_dims="):
        split_batch({"mask": torch.zeros(6, 6), "x": x}, 2)
    assert split_batch({"mask": torch.zeros(6, 6), "x": x}, 2, batch_dims={"mask": None})[0]["x"].shape == (2, 6)
    with pytest.raises(BatchError, match="the batch has no rows"):
        split_batch({"x": torch.zeros(0, 3)}, 2)


def test_rows_that_do_not_divide() -> None:
    with pytest.raises(
        BatchError, match="6 rows cannot be cut into 4 equal microbatches; 6 rows can be cut into 1, 2, 3, 6"
    ):
        split_batch({"x": torch.zeros(6)}, 4)
    with pytest.raises(BatchError, match="nothing in the batch has rows"):
        split_batch({"x": torch.tensor(1.0)}, 1)


def test_each_microbatch_has_its_own_key() -> None:
    by_argument = split_batch({"x": torch.zeros(4)}, 4, key=(1, 2))
    by_entry = split_batch({"x": torch.zeros(4), "key": (1, 2)}, 4)
    keys = [tuple(piece["key"].tolist()) for piece in by_argument]
    assert keys == [tuple(piece["key"].tolist()) for piece in by_entry] and len(set(keys)) == 4
    assert "key" not in split_batch({"x": torch.zeros(4)}, 4)[0]


def test_causal_lm_is_the_mean_over_labels_that_count() -> None:
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, -100, 2], [-100, -100, 4]])
    total, weight = af.losses.causal_lm({"logits": logits}, {"labels": labels})
    assert weight == 3
    expected = torch.nn.functional.cross_entropy(logits.view(-1, 5), labels.view(-1))
    assert torch.allclose(total / weight, expected)


def run(loss: Any, num_microbatches: int = 2, has_aux: bool = False) -> Any:
    _, stages, _, batch = make_case("mlp", 2, 4)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=num_microbatches)
    pipe = af.pipeline(stages, s, loss=loss)
    return af.value_and_grad(pipe, has_aux=has_aux)(pipe.init(), batch)


def weighted(outputs: Tensor, microbatch: Mapping[str, Any]) -> tuple[Tensor, float]:
    weights = microbatch["y"][:, 0].abs()
    return ((outputs - microbatch["y"]).square().sum(1) * weights).sum(), weights.sum()


def test_weighted_loss_does_not_depend_on_the_number_of_microbatches() -> None:
    losses = [run(weighted, count)[0] for count in (1, 2, 4)]
    assert torch.allclose(losses[0], losses[1]) and torch.allclose(losses[0], losses[2])


def test_aux_is_combined_as_declared() -> None:
    @af.losses.reduce_aux(mean="mean", largest="max", rows="cat", scalars="cat")
    def loss(outputs: Tensor, microbatch: Mapping[str, Any]) -> Any:
        value = outputs.sum()
        aux = {"count": len(outputs), "mean": value, "largest": value, "rows": outputs, "scalars": value, "nested": [value]}
        return value, 1, aux

    (value, aux), _ = run(loss, has_aux=True)
    assert set(aux) == {"count", "mean", "largest", "rows", "scalars", "nested"}
    assert aux["count"] == 4 and aux["rows"].shape == (4, 3) and aux["scalars"].shape == (2,)
    assert torch.allclose(aux["mean"], value) and aux["largest"] == aux["scalars"].max()
    assert torch.allclose(aux["nested"][0], aux["scalars"].sum())
    assert not any(leaf.requires_grad for leaf in (aux["mean"], aux["rows"]))
    model, _, _, batch = make_case("mlp", 1, 4)
    (_, expected), _ = af.reference_value_and_grad(model, loss, 2, has_aux=True)(model.init(), batch)
    assert all(torch.equal(torch.as_tensor(expected[name]), aux[name]) for name in ("count", "mean", "largest", "rows"))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs, mb: outputs, r"must be a floating-point scalar .*float32 of shape \(2, 3\)"),
        (lambda outputs, mb: outputs.long().sum(), "got torch.int64 of shape"),
        (lambda outputs, mb: 3.0, "got float"),
        (lambda outputs, mb: (outputs.sum(), 0), "total weight of the loss is 0"),
        (None, "no loss given, and the model's output .* has no 'loss'"),
    ],
)
def test_invalid_losses(loss: Any, message: str) -> None:
    with pytest.raises(BatchError, match=message):
        run(loss)


def test_the_models_own_loss() -> None:
    def head(params: Any, x: Any, batch: Any) -> dict[str, Tensor]:
        return {"loss": (batch["x"] @ params["w"]).square().mean()}

    model = af.Model({"only": af.Layer(init=lambda key: {"w": key.normal("w", (3,))}, apply=head)})
    s = af.schedule.build("gpipe", num_ranks=1, num_microbatches=2)
    pipe = af.pipeline(af.split(model), s)
    params, batch = pipe.init(), {"x": torch.randn(4, 3)}
    loss, _ = af.value_and_grad(pipe)(params, batch)
    assert torch.allclose(loss, model(params, batch)["loss"])


def test_unknown_reduction() -> None:
    with pytest.raises(BatchError, match="unknown reduction 'avg'"):
        af.losses.reduce_aux(accuracy="avg")


def test_aux_asked_for_but_not_given() -> None:
    with pytest.raises(BatchError, match="the loss returns no aux"):
        run(weighted, has_aux=True)


def test_how_a_batch_is_cut_in_words() -> None:
    batch = {
        "ids": torch.zeros(4, 7),
        "positions": torch.zeros(3, 4, 7),
        "mask": torch.zeros(7, 7),
        "scale": 2.0,
        "key": (0, 1),
    }
    assert rows_in_words(batch, {"positions": 1}) == "4 rows, in dim 0 of ids, in dim 1 of positions; whole: mask"
    assert rows_in_words({"ids": torch.zeros(4, 7), "labels": torch.zeros(4)}, 0) == "4 rows, in dim 0 of ids, labels"
