"""Experts whose rows the data decides: each computes all rows, and those that were not chosen are discarded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autofunc as af
from autofunc.captured.branches import Replaying
from autofunc.captured.export import export
from autofunc.captured.module_source import ModuleSource
from autofunc.errors import ModelError
from tests.captured.laws import assert_unchanged, check_layouts, contents

Mix = Callable[["Experts", Tensor, Tensor], Tensor]

WIDTH, COUNT, ROUTES = 6, 3, 2


class Expert(nn.Module):
    """Two layers; the result of the second is changed in place, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4), nn.Linear(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Of [rows, width]."""
        gate, value = self.up(x).view(x.shape[0], 2, 2).unbind(-1)
        made = self.down(F.silu(gate) * value)
        made *= 0.5
        return made


class Experts(nn.Module):
    """A layer, experts that a test combines, and a layer."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.router = nn.Linear(WIDTH, COUNT)
        self.experts = nn.ModuleList(Expert() for _ in range(COUNT))
        self.named = nn.ModuleDict({f"expert_{number}": expert for number, expert in enumerate(self.experts)})
        self.weight = nn.Parameter(torch.randn(COUNT, WIDTH, WIDTH))
        self.mix = mix

    def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
        """Of [batch, tokens, width] and [batch, tokens]; a loss."""
        h = self.first(x)
        mixed = self.mix(self, h.reshape(-1, WIDTH), kinds.reshape(-1)).reshape(h.shape)
        return self.second(h + mixed).square().mean()  # type: ignore[no-any-return]

    def routed(self, h: Tensor, routes: int = ROUTES) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and indices of each row's experts, and a one-hot mask [experts, routes, rows]."""
        weights, chosen = self.router(h).softmax(-1).topk(routes, dim=-1)
        return weights, chosen, F.one_hot(chosen, COUNT).permute(2, 1, 0)


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(0, 2, (4, 5), generator=generator)
    return {"x": torch.randn(4, 5, WIDTH, generator=generator), "kinds": kinds}


def like_switch(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    weights, _, mask = self.routed(h, routes=1)
    mixed = torch.zeros_like(h)
    hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert in hit:
        route, row = torch.where(mask[expert].squeeze(0))
        made = self.named[f"expert_{expert[0]}"](h[None, row].reshape(-1, h.shape[-1])) * weights[row, route, None]
        mixed.index_add_(0, row, made.to(h.dtype))
    return mixed


def like_dbrx(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    weights, _, mask = self.routed(h)
    mixed = torch.zeros_like(h)
    with torch.no_grad():  # nothing is ever of the last kind, which no expert has a weight for
        mask = F.pad(mask, (0, 0, 0, 0, 0, 1))
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert in hit:
        expert = expert[0]
        with torch.no_grad():
            route, row = torch.where(mask[expert])
        made = torch.tanh(h[row].matmul(self.weight[expert].T)) * weights[row, route, None]
        mixed.index_add_(0, row, made.view(-1, WIDTH))
    return mixed


def over_all(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    weights, chosen, _ = self.routed(h)
    mixed = torch.zeros_like(h)
    for number, expert in enumerate(self.experts):
        row, route = (chosen == number).nonzero(as_tuple=True)
        mixed[row] += expert(h.index_select(0, row)) * weights[row].gather(1, route.unsqueeze(-1))
    return mixed


def put_back(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    mixed = h.clone()
    for number, expert in enumerate(self.experts):  # nothing is of the last kind
        mask = kinds == number
        mixed[mask] = expert(h[mask]) + mixed[mask] * kinds[mask].unsqueeze(-1)
    return mixed


def added_up(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    _, chosen, _ = self.routed(h)
    mixed, counts = torch.zeros_like(h), h.new_zeros(COUNT)
    for number in range(COUNT):
        route, row = torch.where(chosen.t() == number)
        rows = torch.einsum("rd,od->ro", h[row], self.weight[number]).softmax(-1)
        mixed.index_put_((row,), rows, accumulate=True)
        mixed = mixed.scatter_add(0, row.unsqueeze(-1).expand(-1, WIDTH), rows * rows.mean(-1, keepdim=True))
        counts = counts.index_add(0, chosen[row, route], torch.ones_like(row, dtype=h.dtype))
    return mixed * counts.mean()


def with_two_dims(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    h, mask = h.view(-1, 5, WIDTH), kinds.view(-1, 5) == 1
    mixed = torch.zeros_like(h)
    mixed[mask] = torch.cat([h[mask][:, :3], torch.stack([h[mask][:, 3:].sum(-1)] * 3, -1)], -1)
    mixed[kinds.view(-1, 5) == 0, :2] = h.masked_select(mask.unsqueeze(-1)).mean() if mask is None else 1.5
    return mixed


@pytest.mark.parametrize(
    ("mix", "layout"),
    [
        (like_switch, (["router", "second"], "zb_h1")),
        (put_back, (["experts.1"], "1f1b")),  # between two of the experts
        (added_up, (["second"], "1f1b")),
    ],
)
def test_experts_compute_all_rows(mix: Mix, layout: tuple[list[str], str]) -> None:
    model = check_layouts(Experts(mix), batch(), [layout])
    (told,) = [note for note in model.notes if "experts compute all rows" in note]
    assert "test_experts.py" in told and not any("decides by data" in note for note in model.notes)


@pytest.mark.parametrize("mix", [like_switch, like_dbrx, over_all, with_two_dims])
def test_any_batch_works(mix: Mix) -> None:
    module, given = Experts(mix), batch()
    model = af.from_module(module, given)
    for bias in (torch.tensor([50.0, 0.0, 0.0]), torch.tensor([0.0, -50.0, 9.0])):  # all to one; none to another
        params = model.init()
        params["router", "bias"].copy_(bias)
        changed = given | {"kinds": torch.full_like(given["kinds"], int(bias.argmax()))}
        with torch.no_grad():
            module.router.bias.copy_(bias)
        grads = torch.autograd.grad(loss := module(**changed), list(module.parameters()), allow_unused=True)
        found_loss, found = af.reference_value_and_grad(model, None, 1)(params, changed)
        assert abs(found_loss - loss) <= 1e-6 * loss
        for (name, leaf), grad in zip(module.named_parameters(), grads, strict=True):
            wanted = torch.zeros_like(leaf) if grad is None else grad
            assert (found[tuple(name.split("."))] - wanted).abs().max() <= 1e-6 * wanted.abs().max().clamp_min(1e-3), name


def averaged(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    return h * h[kinds == 1].mean()


def normalised(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    rows, mixed = h[kinds == 1], h.clone()
    mixed[kinds == 1] = (rows - rows.mean(0)) / rows.std(0)
    return mixed


def counted(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    return h * (kinds == 1).nonzero().shape[0]


def measured(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    return h * len(h[kinds == 1])


def enumerated(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    mixed = torch.zeros_like(h)
    for number, row in enumerate((kinds == 1).nonzero()):
        mixed.index_add_(0, row, h[row] * number)
    return mixed


def numbered(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    mixed, number = torch.zeros_like(h), 0
    for row in (kinds == 1).nonzero():
        number += 1  # noqa: SIM113  # what a loop may not do
        mixed.index_add_(0, row, h[row] * number)
    return mixed


def added_in_a_loop(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    for number in F.one_hot(kinds, COUNT).amax(0).nonzero():
        h = h + self.experts[int(number)](h)
    return h


def kept_from_a_loop(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    kept = []
    for number in F.one_hot(kinds, COUNT).amax(0).nonzero():
        kept.append(self.experts[number](h))
    return torch.stack(kept).sum(0)


def written_in_a_loop(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    mixed = torch.zeros_like(h)
    for number in F.one_hot(kinds, COUNT).amax(0).nonzero():
        mixed += self.experts[number](h)
    return mixed


def left_early(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    mixed = torch.zeros_like(h)
    for row in (kinds == 1).nonzero():
        mixed.index_add_(0, row, h[row])
        break
    return mixed


def read_beside_a_loop(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    return self.experts[int((kinds[:3] == 1).nonzero()[0])](h)


def first_of_rows(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    return h * h[kinds == 1][0]


def of_two_masks(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    mixed = torch.zeros_like(h)
    mixed[kinds == 1] = h[kinds.flip(0) == 1]
    return mixed


def sorted_rows(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    mixed = torch.zeros_like(h)
    mixed[kinds == 1] = h[kinds == 1].sort(0).values
    return mixed


def unique_experts(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    mixed = torch.zeros_like(h)
    for number in torch.unique(kinds):
        mixed[kinds == number] = self.experts[int(number)](h[kinds == number])
    return mixed


def compared(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    rows = h[kinds == 1]
    return h if rows.numel() > 20 else -h


def summed_by_a_product(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    rows = h[kinds == 1]
    return h @ (rows.t() @ rows)


def scattered_rows(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    mixed, rows = torch.zeros_like(h), (kinds == 1).nonzero().squeeze(1)
    return mixed.scatter_add(1, (rows % WIDTH).unsqueeze(1), h[rows])


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (averaged, "aten.mean.default sees"), (normalised, "aten.mean.dim sees"), (counted, "reads their number"),
        (measured, "reads their number"), (enumerated, "unbind"), (numbered, "counts them in 'number'"),
        (added_in_a_loop, "reads what a loop over them makes"), (kept_from_a_loop, "reads what a loop over them makes"),
        (written_in_a_loop, "aten.add_.Tensor sees"), (left_early, "leaves a loop over them early"),
        (read_beside_a_loop, "outside a loop"), (first_of_rows, "aten.select.int sees"),
        (of_two_masks, "index_put_.default sees"), (sorted_rows, "aten.sort"),
        (compared, "reads their number"), (summed_by_a_product, "aten.matmul.default sees"),
        (scattered_rows, "scatter_add.default sees"),
    ],
)  # fmt: skip
def test_seeing_which_rows_there_are_is_refused(mix: Mix, message: str) -> None:
    module = Experts(mix)
    source, reading = ModuleSource(module), partial(Replaying, "Experts", [], all_places=True)
    before = contents(module)
    with pytest.raises(ModelError, match=rf"the data decides how many rows .*test_experts.py.*{message}"):
        export(module, source.arguments, batch(), "Experts", None, {}, reading)
    assert_unchanged(before, module)


def counted_by_a_list(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    mixed, seen = torch.zeros_like(h), []
    for row in (kinds == 1).nonzero():
        seen.append(int(row))
        mixed.index_add_(0, row, h[row])
    return mixed * len(seen)


def read_after_a_loop(self: Experts, h: Tensor, kinds: Tensor) -> Tensor:
    mixed = torch.zeros_like(h)
    for row in (kinds == 1).nonzero():
        last = int(row)
        mixed.index_add_(0, row, h[row])
    return mixed * torch.tensor(last)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (counted_by_a_list, r"the data decides how many rows .*; a loop over them changes a number or a list"),
        (read_after_a_loop, r"the data decides how many rows .*; a loop over them changes a number or a list"),
        (averaged, r"the data decides how many rows .*test_experts.py.*ignore_index.*; aten.mean.default sees"),
        (unique_experts, r"test_experts.py.*for number in torch.unique\(kinds\)"),
    ],
)
def test_other_rows_of_data_are_still_refused(mix: Mix, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        af.from_module(Experts(mix), batch())


def test_without_weights() -> None:
    with torch.device("meta"):
        module = Experts(over_all)
    real, given = Experts(over_all), batch()
    loss = af.from_module(module, given)(dict(real.named_parameters()), given)
    assert torch.equal(loss, af.from_module(real, given)(dict(real.named_parameters()), given))
    assert abs(loss - real(**given)) <= 1e-6 * loss
    with pytest.raises(ModelError, match="depend on weights"):
        module.mix = lambda self, h, kinds: h * h[h[:, 0] > 0].sum()
        af.from_module(module, given)


def test_experts_can_be_refused() -> None:
    with pytest.raises(ModelError, match="nonzero"):
        af.from_module(Experts(over_all), batch(), branches="refuse")
