"""Parameters and state go back into the module that they came from: `model.state_dict` and `model.to_module`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import autofunc as af
from autofunc import tree
from autofunc.errors import ModelError
from tests.captured.laws import assert_unchanged, contents


class Tied(nn.Module):
    """A head that is the embedding, a part that forward does not run, and a table that is not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight
        self.spare = nn.Linear(6, 6).requires_grad_(False)
        self.register_buffer("scale", torch.full((6,), 2.0))
        self.register_buffer("table", torch.arange(6.0), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.head(torch.tanh(self.block(self.embed(ids))) * self.scale + self.table)
        return made


def of_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


ROWS = {"input": torch.linspace(-1, 1, 16).view(4, 4)}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "tied": (Tied, {"ids": torch.arange(8).view(4, 2)}),
    "statistics": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)), ROWS),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)), ROWS),
    "spectral norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4)), ROWS),
    "frozen": (lambda: nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)), ROWS),
    "meta": (of_meta, ROWS),
}


def changed(given: Any) -> Any:
    """A tree with other values, as after a step of training."""
    return given.apply(lambda leaf: leaf + 1)


@pytest.mark.parametrize("name", CASES)
def test_a_module_takes_what_it_gave(name: str) -> None:
    make, batch = CASES[name]
    module = make()
    model = af.from_module(module, batch)
    params, state = changed(model.init()), changed(model.init_state())
    before = contents(module) if name != "meta" else None  # nothing can be compared there
    found, made = model.state_dict(params, state), model.to_module(params, state)
    if before is not None:
        assert_unchanged(before, module)
    assert list(found) == list(module.state_dict())
    flat = {**tree.flatten(params), **tree.flatten(state)}
    assert all(torch.equal(found[path], leaf) for path, leaf in flat.items() if path in found)
    assert type(made) is type(module) and made.training == module.training
    assert [leaf.requires_grad for leaf in made.parameters()] == [leaf.requires_grad for leaf in module.parameters()]
    fresh = make().to_empty(device="cpu") if name == "meta" else make()
    fresh.load_state_dict(found, strict=True)
    with torch.no_grad():
        expected = fresh.eval()(*batch.values())
        torch.testing.assert_close(made.eval()(*batch.values()), expected, rtol=0, atol=0)
        torch.testing.assert_close(model(params, batch, state), expected)
    held = {leaf.data_ptr() for leaf in flat.values()}
    of_module = {leaf.data_ptr() for leaf in (*module.parameters(), *module.buffers()) if not leaf.is_meta}
    assert not held & {leaf.data_ptr() for leaf in (*made.parameters(), *made.buffers())}, "training goes on beside it"
    assert not of_module & {leaf.data_ptr() for leaf in (*made.parameters(), *made.buffers())}


def test_tied_parameters_come_back_tied() -> None:
    module = Tied()
    model = af.from_module(module, CASES["tied"][1])
    params = changed(model.init())
    made: Any = model.to_module(params)
    assert made.head.weight is made.embed.weight
    assert torch.equal(made.spare.weight, module.spare.weight), "what no layer uses is as it was"
    found = model.state_dict(params)
    assert torch.equal(found["head.weight"], found["embed.weight"])


def test_a_trained_pipeline_gives_its_module_back() -> None:
    module = CASES["statistics"][0]()
    model = af.from_module(module, ROWS)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(af.split(model, ["2"]), s, loss=lambda y, batch: y.square().mean())
    (_, state), _ = af.value_and_grad(pipe, has_state=True)(pipe.init(), ROWS, state=pipe.init_state())
    made: Any = model.to_module(pipe.gather(pipe.init()), pipe.gather(state))
    assert made[1].num_batches_tracked == 2 and torch.equal(made[1].running_mean, state["1", "running_mean"])


def test_models_of_functions_have_a_state_dict_and_no_module() -> None:
    layer = af.Layer(
        init=lambda key: {"weight": key.normal("weight", (3, 3))}, apply=lambda params, x, batch: x @ params["weight"]
    )
    plain = af.Model({"first": layer, "second": layer}, ties={"second.weight": "first.weight"})
    function = af.from_function(lambda p, b: b["x"] * p["w"]["v"], {"w": {"v": torch.ones(2)}}, {"x": torch.ones(2, 2)})
    for model, names in ((plain, ["first.weight", "second.weight"]), (function, ["w.v"])):
        params = model.init()
        found = model.state_dict(params)
        assert list(found) == names and torch.equal(found[names[-1]], tree.flatten(params)[names[0]])
        with pytest.raises(ModelError, match=r"made of functions, so there is no module .*state_dict"):
            model.to_module(params)


def test_errors() -> None:
    model, kept = (af.from_module(CASES[name][0](), CASES[name][1]) for name in ("meta", "statistics"))
    good = tree.flatten(model.init())
    layer = af.Layer(init=lambda key: {"weight": key.zeros("weight", (3,))}, apply=lambda params, x, batch: x)
    plain = af.Model({"first": layer})
    cases: list[tuple[Callable[[], Any], str]] = [
        (
            lambda: model.to_module({**good, "0.wieght": good["0.bias"]}),
            r"no parameter '0\.wieght'; did you mean 0\.weight",
        ),
        (
            lambda: model.to_module({**good, "0.weight": torch.ones(3)}),
            r"'0\.weight' is \(3,\), but \(4, 4\) in Sequential",
        ),
        (lambda: model.state_dict({"0.weight": good["0.weight"]}), r"params have no '0\.bias'.*pipe\.gather"),
        (lambda: kept.state_dict(kept.init()), r"Sequential keeps state .*state=model\.init_state\(\)"),
        (lambda: plain.state_dict({}), r"params have no 'first\.weight'; give the full tree"),
        (lambda: plain.state_dict({"first.weight": good["0.bias"], "x": good["0.bias"]}), "has no parameter 'x'"),
    ]
    for call, message in cases:
        with pytest.raises(ModelError, match=message):
            call()
