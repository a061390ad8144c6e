"""Forwards that decide by data: captured as they go on the example; a batch that decides differently stops the step."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from autofunc.captured.module_source import ModuleSource
from autofunc.captured.rehearsal import decisions_of
from autofunc.errors import BatchError, ModelError
from tests.captured.laws import assert_unchanged, check_layouts, contents

Forward = Callable[["Deciding", Tensor, Tensor], Tensor]


class Deciding(nn.Module):
    """Two layers with a test's function between them."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.register_buffer("temperature", torch.tensor(2.0))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("chosen", torch.tensor([True, False, True, True, False, False]))
        self.forward_ = forward

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Apply the test's function, and compute a loss."""
        return self.second(self.forward_(self, self.first(x), ids)).square().mean()  # type: ignore[no-any-return]


def batch() -> dict[str, Tensor]:
    """Each row of ids holds 2 twice, and nothing larger."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    return {"x": x, "ids": torch.tensor([[1, 2, 0, 2], [2, 2, 1, 0], [0, 2, 2, 1], [1, 0, 2, 2]])}


def step(pipe: Any, params: Any, **changed: Tensor) -> Any:
    return af.value_and_grad(pipe)(params, batch() | changed)


def pipeline(module: nn.Module, **options: Any) -> tuple[Any, Any]:
    model = af.from_module(module, batch())
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2)
    return af.pipeline(af.split(model, ["second"]), s, **options), model.init()


def raising(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    if ids.max() >= 3:
        raise ValueError("an id is out of range")
    return h


def asserting(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    with torch.no_grad():
        assert not h.isnan().any()
    return h


def clamping(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    if not torch.isfinite(h).all():
        h = h.clamp(-1, 1)
    return torch.tanh(h)


def choosing(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    is_global = (ids > 1).flatten().any().item()
    return h * 2 if is_global else h


def comparing(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    if torch.equal(ids, ids.abs()) and not torch.allclose(h, -h) and 2 in ids:
        return h.tanh()
    return h


def bounding(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    longest = (ids > 0).sum(1).max()
    return h[:, :longest].repeat(1, 2) + h.new_ones(longest, 6)[0]


def listing(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    return torch.cat(h.split(self.chosen.sum().item()), 0) * int(ids.max()) + (ids.amax(0) > 0).sum().tolist()


def a_large_number(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    if h.abs().max().item() > 1e4:
        h = h / 1e4
    return h * max(h.abs().max().item(), 1e-3)


def of_constants(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    if self.temperature.item() > 1 and self.count == 3:
        h = h * float(self.temperature)
    return torch.cat([h[:, self.chosen], h[:, : self.count]], 1)


def not_at_random(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    return h if torch.rand([]) < 0.0 else h.tanh()


def marked_places(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    assert torch.unique_consecutive((ids == 2).sum(1)).numel() == 1
    rows = h.unsqueeze(1) * ids.unsqueeze(-1)
    return rows[ids == 2, :].view(h.shape[0], -1, 6)[:, -1].contiguous()


def written_places(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    rows, columns = (ids == 2).nonzero(as_tuple=True)
    made = h.new_zeros(*ids.shape, 6)
    made[rows, columns] = h[rows] * columns.unsqueeze(-1)
    return made.sum(1) + torch.masked_select(h, h.abs() >= 0).view_as(h)


def repeating(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    torch._check_tensor_all(ids >= 0)
    runs = torch.unique_consecutive(torch.repeat_interleave(self.chosen.long() + 1, self.chosen.long() + 1))
    lengths = torch.tensor([each.abs().sum() for each in (ids[0, :2], ids[:1, 1])])
    return h.repeat_interleave(ids.new_tensor([2]), dim=0) * runs.sum() * lengths.sum()


@pytest.mark.parametrize(
    ("forward", "notes"),
    [
        (raising, 1), (asserting, 1), (clamping, 1), (choosing, 1), (comparing, 1), (bounding, 1), (listing, 1),
        (a_large_number, 1), (of_constants, 0), (not_at_random, 0), (marked_places, 1), (written_places, 1), (repeating, 0),
    ],
)  # fmt: skip
def test_a_forward_goes_as_on_the_example(forward: Forward, notes: int) -> None:
    model = check_layouts(Deciding(forward), batch(), [(["second"], "1f1b")])
    told = [note for note in model.notes if "decides by data" in note]
    assert len(told) == notes and all("test_branches.py" in note for note in told)


def _changed(entry: str, place: Any, value: float) -> dict[str, Tensor]:
    entries = batch()
    entries[entry][place] = value
    return {entry: entries[entry]}


@pytest.mark.parametrize(
    ("engine", "forward", "changed", "message"),
    [
        (
            "graph",
            raising,
            _changed("ids", (3, 0), 5),
            r"if ids.max\(\) >= 3: reads True, and on the example batch it was False",
        ),
        ("eager", asserting, _changed("x", (3, 0), float("nan")), r"assert not h.isnan\(\).any\(\) reads True"),
        ("graph", bounding, _changed("ids", (2, 0), 1), r"h\[:, :longest\].* reads 4, and on the example batch it was 3"),
        ("eager", marked_places, _changed("ids", (3, 0), 2), r"torch.unique_consecutive.* reads False"),
        ("graph", written_places, _changed("ids", (3, 0), 2), r"nonzero\(as_tuple=True\) reads 5, .* it was 4"),
    ],
)
def test_a_batch_that_decides_differently_stops_the_step(
    engine: str, forward: Forward, changed: dict[str, Tensor], message: str
) -> None:  # fmt: skip
    pipe, params = pipeline(Deciding(forward), engine=engine)
    expected = step(pipe, params)
    with pytest.raises(BatchError, match=message) as caught:
        step(pipe, params, **changed)
    assert "stage" in caught.value.__notes__[0] and "microbatch 1" in caught.value.__notes__[0]
    for call in (pipe, pipe.forward):
        with pytest.raises(BatchError, match=message):
            call(params, batch() | changed)
    assert torch.equal(step(pipe, params)[0], expected[0])


def test_recomputed_decisions_are_checked() -> None:
    pipe, params = pipeline(Deciding(clamping), remat="stage")
    step(pipe, params)
    with pytest.raises(BatchError, match=r"if not torch.isfinite"):
        step(pipe, params, **_changed("x", (0, 0), float("inf")))


def test_a_weight_that_decides_differently() -> None:
    pipe, params = pipeline(Deciding(asserting))
    params["first", "bias"][0] = float("nan")
    with pytest.raises(BatchError, match=r"assert not h.isnan") as caught:
        step(pipe, params)
    assert "stage 0" in caught.value.__notes__[0]


def converting(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    return h * float(h.abs().max())


def layer_drop(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    return h if torch.rand([]) < 0.5 else h.tanh()


def uneven(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    return h * h[ids[:, 0] == 1].sum()


def distinct(self: Deciding, h: Tensor, ids: Tensor) -> Tensor:
    return h * torch.unique_consecutive(ids[1]).sum()


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (converting, r"makes a plain float from data \(.*float\(h.abs\(\).max\(\)\)\), .* use the tensor itself"),
        (layer_drop, r"decides by a random number \(.*torch.rand\(\[\]\) < 0.5.*layerdrop=0"),
        (uneven, r"the data decides how many rows a mask makes \(.*ids\[:, 0\] == 1.*ignore_index"),
        (distinct, r"the data decides how many rows a mask makes \(.*unique_consecutive"),
    ],
)
def test_values_that_differ_in_every_batch_are_refused(forward: Forward, message: str) -> None:
    module = Deciding(forward)
    before = contents(module)
    with pytest.raises(ModelError, match=message):
        af.from_module(module, batch())
    assert_unchanged(before, module)


def test_branches_can_be_refused() -> None:
    with pytest.raises(ModelError, match=r"reads the value of a tensor \(.*if ids.max\(\) >= 3"):
        af.from_module(Deciding(raising), batch(), branches="refuse")
    with pytest.raises(ModelError, match="branches='maybe'; known: example, refuse"):
        af.from_module(Deciding(raising), batch(), branches="maybe")  # type: ignore[arg-type]


def test_other_numbers_of_decisions_than_on_the_example() -> None:
    pipe, params = pipeline(Deciding(lambda self, h, ids: h if ids.sum(1).tolist()[0] > 2 else -h))
    with pytest.raises(ModelError, match=r"with these shapes reads fewer values than on the example batch \(.*test_branch"):
        step(pipe, params)


def test_a_function() -> None:
    def net(params: Any, entries: Any) -> Tensor:
        h = af.split_point(entries["x"] @ params["first"], "second")
        assert not h.isnan().any()
        return (h @ params["second"]).mean()

    params = {"first": torch.ones(6, 6), "second": torch.ones(6, 2)}
    given = {"x": batch()["x"]}
    model = af.from_function(net, params, given)
    assert torch.equal(model(model.init(), given), net(params, given))
    with pytest.raises(BatchError, match=r"assert not h.isnan"):
        model(model.init(), {"x": given["x"] * float("nan")})
    with pytest.raises(ModelError, match="reads the value of a tensor"):
        af.from_function(net, params, given, branches="refuse")


def test_without_weights_the_batch_can_decide() -> None:
    with torch.device("meta"):
        module = Deciding(raising)
    del module.chosen, module.temperature, module.count
    pipe, params = pipeline(module)
    step(pipe, params)
    with pytest.raises(BatchError, match=r"if ids.max"):
        step(pipe, params, **_changed("ids", (0, 0), 9))
    module.forward_ = asserting
    with pytest.raises(ModelError, match=r"depend on weights \(.*h.isnan.*'first.weight' is on the meta device"):
        af.from_module(module, batch())
    with pytest.raises(ModelError, match="the example's 'x' has no values"):
        af.from_module(Deciding(asserting), {name: leaf.to("meta") for name, leaf in batch().items()})


def test_running_the_example_has_no_side_effects() -> None:
    def keeping(self: Any, h: Tensor, ids: Tensor) -> Tensor:
        self.kept, self.first.bias.data[0] = h, 5
        self.count += 1
        ids += random.randint(1, 2)
        return nn.functional.dropout(h, 0.5) * torch.rand(6) if h.isnan().any() else h + torch.rand(6)

    module, given = Deciding(keeping), batch()
    before, drawn, python = contents(module), torch.get_rng_state(), random.getstate()
    (decision,) = decisions_of(ModuleSource(module), given, torch.device("cpu"), {module: False})
    assert (decision.kind, decision.value) == ("bool", False) and "h.isnan" in decision.place.line
    assert_unchanged(before, module)
    assert torch.equal(torch.get_rng_state(), drawn) and random.getstate() == python
    assert all(torch.equal(given[name], leaf) for name, leaf in batch().items())


def test_a_failed_check_names_the_line() -> None:
    report = af.check(Deciding(clamping), batch())
    (cuts,) = [each for each in report.verdicts if each.code == "P1"]
    assert cuts.status == "pass" and "decides by data" in cuts.message and "torch.isfinite" in cuts.message, report
    assert report.ok, report


def test_a_failed_check_names_the_part() -> None:
    report = af.check(Deciding(lambda self, h, ids: h if (ids == 7).any() else -h), batch() | _changed("ids", (0, 0), 7))
    (cuts,) = [each for each in report.verdicts if each.code == "P1"]
    assert cuts.status == "fail" and "on a part of the batch: a captured forward takes one branch" in cuts.message, report


def test_one_line_reached_in_several_ways() -> None:
    def is_any(mask: Tensor) -> bool:
        return bool(mask.any())

    def forward(self: Any, h: Tensor, ids: Tensor) -> Tensor:
        filled = torch.zeros_like(ids)
        filled[:, 1] = ids[:, 1]
        if is_any(filled > 1):
            h = h * 2
        return h.tanh() if is_any(self.chosen[:2] & self.chosen[4:]) else h

    pipe, params = pipeline(Deciding(forward))
    assert torch.equal(
        step(pipe, params)[0], af.reference_value_and_grad(pipe.stages[0].model, None, 2)(params, batch())[0]
    )
    with pytest.raises(BatchError, match=r"return bool\(mask.any\(\)\) reads False, and on the example batch it was True"):
        step(pipe, params, ids=torch.zeros_like(batch()["ids"]))


def test_state_that_decides() -> None:
    def counting(self: Any, h: Tensor, ids: Tensor) -> Tensor:
        self.count += 1
        return h if self.count < 8 else h * 0.5  # 3 before the first microbatch

    pipe, params = pipeline(Deciding(counting))
    state = pipe.init_state()
    run = af.value_and_grad(pipe, has_state=True)
    (_, state), _ = run(params, batch(), state=state)
    (_, state), _ = run(params, batch(), state=state)
    assert state["count"] == 7
    with pytest.raises(BatchError, match=r"if self.count < 8 .* reads False, and on the example batch it was True"):
        run(params, batch(), state=state)
