"""Values between stages may be any pytree: integers and values without a gradient go forward only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from tests.cases import assert_same_tree, pp_mesh, squared_error
from tests.laws.test_memory import check_bytes
from tests.pool import WorkerPool

WIDTH = 5


def weights(key: Any) -> dict[str, Tensor]:
    return {"w": key.normal("w", (WIDTH, WIDTH))}


def first(p: Any, x: None, b: Any) -> dict[str, Any]:
    ids = b["ids"]
    return {"h": b["x"] @ p["w"], "ids": ids + 1, "scale": (ids * 0.5).detach(), "skip": torch.tanh(b["x"] @ p["w"])}


def middle(p: Any, x: dict[str, Any], b: Any) -> dict[str, Any]:
    """Read all, change one, and pass on the others unchanged."""
    h = torch.tanh(x["h"] @ p["w"]) * x["scale"][:, None] + x["ids"][:, None]
    return {**x, "h": h}


def last(p: Any, x: dict[str, Any], b: Any) -> Tensor:
    return (x["h"] + x["skip"]) @ p["w"]


def case() -> tuple[af.Model, dict[str, Tensor]]:
    layers = {"first": first, "a": middle, "b": middle, "last": last}
    model = af.Model({name: af.Layer(init=weights, apply=apply) for name, apply in layers.items()})
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, WIDTH, generator=generator) for _ in range(2))
    return model, {"x": x, "y": y, "ids": torch.arange(8)}


def check(name: str, num_ranks: int, engine: str, mesh: Any = None, remat: str | None = None) -> None:
    model, batch = case()
    s = af.schedule.build(name, num_ranks=num_ranks, num_microbatches=4)
    full = model.init(seed=2)
    expected_loss, expected = af.reference_value_and_grad(model, squared_error, 4)(full, batch)
    stages = af.split(model, ["a", "b", "last"] if s.num_stages == 4 else ["b"])
    pipe = af.pipeline(stages, s, loss=squared_error, mesh=mesh, engine=engine, remat=remat)
    params = pipe.place(full)
    found_loss, found = af.value_and_grad(pipe)(params, batch)
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(pipe.place(expected), found)
    if engine == "graph":
        check_bytes(pipe, params, batch, None)


@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize("remat", [None, "layer", "stage"])
@pytest.mark.parametrize(("name", "num_ranks"), [("1f1b", 4), ("zb_h1", 4), ("zb_h2", 2), ("zbv", 2), ("dualpipe_v", 2)])
def test_in_memory(name: str, num_ranks: int, remat: str | None, engine: str) -> None:
    check(name, num_ranks, engine, remat=remat)


def on_gloo(name: str, num_ranks: int, engine: str) -> None:
    check(name, num_ranks, engine, pp_mesh(num_ranks))


@pytest.mark.parametrize("engine", ["graph", pytest.param("eager", marks=pytest.mark.full)])
def test_on_gloo(workers: WorkerPool, engine: str) -> None:
    workers.run(on_gloo, "zb_h1", 4, engine)
    workers.run(on_gloo, "zbv", 2, engine)
