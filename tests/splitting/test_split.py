"""Split points, balance and stages."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import autofunc as af
from autofunc.errors import ModelError, SplitError
from autofunc.model import CutPoints
from autofunc.splitting.balance import balance
from autofunc.splitting.points import resolve_points
from stages.gpt2 import build_gpt2_model
from tests.cases import make_case

GPT2 = ["wte", "wpe", "h.0", "h.1", "h.2", "h.3", "ln_f", "head"]


def places(layers: list[str]) -> CutPoints:
    """The layers as cut points, with a part that is refused."""
    return CutPoints({name: position for position, name in enumerate(layers)}, {"rotary": "needs no weights"})


PREFIXED = ["embed", "transformer.h.0", "transformer.h.1", "transformer.norm"]


@pytest.mark.parametrize(
    ("layers", "points", "starts"),
    [
        (GPT2, [], []),
        (GPT2, ["h.2"], [4]),
        (GPT2, ["h.0", "h.2", "head"], [2, 4, 7]),
        (GPT2, ["h.*"], [2, 3, 4, 5]),
        (GPT2, ["h.[13]"], None),
        (GPT2, ["*"], [1, 6, 7]),  # stops at dots; the cut before the first layer is dropped
        (GPT2, ["wte", "h.1"], [3]),
        (PREFIXED, ["h.1"], [2]),
        (PREFIXED, ["h.*"], [1, 2]),
        (PREFIXED, ["transformer.*"], [3]),
    ],
)
def test_points(layers: list[str], points: list[str], starts: list[int] | None) -> None:
    if starts is None:
        with pytest.raises(SplitError):
            resolve_points(places(layers), points)
    else:
        assert resolve_points(places(layers), points) == [layers[start] for start in starts]


@pytest.mark.parametrize(
    ("layers", "points", "message"),
    [
        (GPT2, ["h.7"], r"split point 'h.7' names no layer: did you mean h\.\d"),
        (GPT2, ["h.2", "h.1"], "'h.1' runs before 'h.2'"),
        (GPT2, ["h.2", "h.2"], "a stage already begins at 'h.2'"),
        (GPT2, ["h.2", "h.*"], "'h.0' runs before 'h.2'"),
        (GPT2, [2], "split point 2 is int"),
        (GPT2, ["rotary"], "'rotary' needs no weights"),
        (["a.h.0", "b.h.0"], ["h.0"], "ambiguous: a.h.0, b.h.0 end in it"),
    ],
)
def test_invalid_points_are_refused(layers: list[str], points: list[str], message: str) -> None:
    with pytest.raises(SplitError, match=message):
        resolve_points(places(layers), points)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 8))
def test_balance_is_the_best_partition(costs: list[int], parts: int) -> None:
    if parts > len(costs):
        with pytest.raises(SplitError, match=f"cannot split {len(costs)} layers into {parts} stages"):
            balance(costs, parts)
        return

    def largest(starts: tuple[int, ...]) -> int:
        return max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *starts, len(costs)]))

    found = balance(costs, parts)
    assert len(found) == parts - 1 and found == sorted(set(found))
    assert largest(tuple(found)) == min(map(largest, itertools.combinations(range(1, len(costs)), parts - 1)))


def test_a_number_of_stages_counts_the_head() -> None:
    """A head over a large vocabulary costs as much as many blocks; an embedding costs nothing."""
    model = build_gpt2_model(vocab_size=4096, n_positions=8, n_embd=32, n_layer=8, n_head=2)
    stages = af.split(model, 2)
    blocks = [sum(name.startswith("h.") for name in stage.layers) for stage in stages]
    assert blocks[0] > blocks[1]
    assert [s.layers for s in af.split(model, "auto", num_stages=2)] == [s.layers for s in stages]
    equal = af.split(model, 2, costs=dict.fromkeys(model.layers, 1.0))
    assert [len(stage.layers) for stage in equal] == [6, 6]


def test_invalid_arguments_of_split_are_refused() -> None:
    model, _, _, _ = make_case("gpt2", 1, 2)
    with pytest.raises(SplitError, match="needs num_stages"):
        af.split(model, "auto")
    with pytest.raises(SplitError, match="expected a list of names"):
        af.split(model, "h.1")
    with pytest.raises(SplitError, match="goes with"):
        af.split(model, ["h.1"], num_stages=2)
    with pytest.raises(SplitError, match="costs have no 'wpe'"):
        af.split(model, 2, costs={"wte": 1.0})
    with pytest.raises(SplitError, match="can be cut into 8 stages at most, not 9"):
        af.split(model, 9)


def test_stages_compose_to_the_model() -> None:
    model, stages, _, batch = make_case("gpt2", 4, 4)
    params = model.init()
    x = None
    for stage in stages:
        own = {path: leaf for path, leaf in af.tree.flatten(params).items() if path in stage.paths}
        x = stage.apply(own, x, batch)
    assert torch.equal(x, model(params, batch))
    assert stages[-1].holders == ("head.weight", "ln_f.bias", "ln_f.weight")
    assert stages[-1].paths == ("ln_f.bias", "ln_f.weight", "wte.weight")


def test_a_failing_layer_is_named_before_anything_runs() -> None:
    layers = {
        "a": af.Layer(apply=lambda p, x, batch: batch["x"]),
        "b": af.Layer(apply=lambda p, x, batch: x @ torch.zeros(7, 7)),
    }
    pipe = af.pipeline(
        af.split(af.Model(layers), ["b"]),
        af.schedule.build("1f1b", num_ranks=2, num_microbatches=2),
        loss=lambda outputs, mb: outputs.sum(),
    )
    with pytest.raises(ModelError, match=r"stage 1 \(layers b .. b\) cannot run on this batch: RuntimeError"):
        pipe.build({"x": torch.zeros(2, 3)})
