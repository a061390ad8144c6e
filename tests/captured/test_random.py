"""Randomness of captured modules: the right distributions, the same in every layout, and all of it from the key."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributions, nn
from torch.nn import functional

import autofunc as af
from autofunc.errors import ModelError
from autofunc.random import make_key
from autofunc.splitting import layer_costs
from tests.cases import assert_same_tree

Draw = Callable[[Tensor], Tensor]


def in_place(x: Tensor, keep: float = 0.7) -> Tensor:
    """Stochastic depth as timm and torchvision write it."""
    mask = x.new_empty(x.shape[0], 1).bernoulli_(keep)
    return mask.div_(keep)


def rounded(x: Tensor) -> Tensor:
    """Stochastic depth as transformers writes it."""
    kept = 0.7 + torch.rand(x.shape[0], 1, dtype=x.dtype, device=x.device)
    kept.floor_()
    return kept / 0.7


def in_parts(x: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    made[:, ::2].normal_()
    made[:, 1].uniform_()
    return made


def initialised(x: Tensor) -> Tensor:
    return nn.init.xavier_uniform_(torch.empty(64, 64))


DRAWS: dict[str, Draw] = {
    "bernoulli_": lambda x: torch.empty_like(x).bernoulli_(0.3),
    "bernoulli_ by default": lambda x: torch.empty(x.shape).bernoulli_(),
    "bernoulli_ of a tensor": lambda x: torch.empty(x.shape, dtype=torch.int32).bernoulli_(x.abs().clamp(0, 1)),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli of a number": lambda x: torch.bernoulli(x, 0.8),
    "rand": lambda x: torch.rand(x.shape, dtype=torch.float64, device=x.device),
    "rand_like": torch.rand_like,
    "randn": lambda x: torch.randn(x.shape, dtype=torch.bfloat16),
    "randn_like": lambda x: torch.randn_like(x.T, dtype=torch.float64).T,
    "randn out": lambda x: torch.randn(x.shape, out=torch.empty(x.shape)),
    "randint": lambda x: torch.randint(7, x.shape),
    "randint from": lambda x: torch.randint(-3, 5, x.shape, dtype=torch.int32),
    "randint_like": lambda x: torch.randint_like(x, 4) + torch.randint_like(x, -2, 2),
    "normal_": lambda x: x.new_empty(x.shape).normal_(1.0, 2.0),
    "normal": lambda x: torch.normal(x, x.abs()),
    "normal around": lambda x: torch.normal(x, 0.5),
    "normal of width": lambda x: torch.normal(2.0, x.abs()),
    "normal of numbers": lambda x: torch.normal(-1.0, 0.5, x.shape),
    "uniform_": lambda x: torch.empty_like(x).uniform_(-1, 3),
    "exponential_": lambda x: torch.empty_like(x).exponential_(2.0),
    "random_": lambda x: torch.empty_like(x).random_(5),
    "random_ of bytes": lambda x: torch.empty_like(x, dtype=torch.uint8).random_(),
    "random_ of floats": lambda x: torch.empty_like(x).random_(),
    "random_ of integers": lambda x: torch.empty_like(x, dtype=torch.int64).random_(),
    "geometric_": lambda x: torch.empty_like(x).geometric_(0.4),
    "log_normal_": lambda x: torch.empty_like(x).log_normal_(0.5, 0.25),
    "cauchy_": lambda x: torch.empty_like(x).cauchy_(1.0, 0.5).atan(),
    "multinomial": lambda x: torch.multinomial(x[:, :8].exp(), 3),
    "multinomial again": lambda x: torch.multinomial(x[:, :8].exp(), 16, replacement=True),
    "randperm": lambda x: torch.randperm(4096, device=x.device)[:2048].float(),
    "in place": in_place,
    "rounded": rounded,
    "in parts": in_parts,
    "initialised": initialised,
    "rrelu": lambda x: functional.rrelu(x, training=True),
    "rrelu in place": lambda x: functional.rrelu_(x.clone(), 0.2, 0.8, training=True),
    "alpha_dropout": lambda x: functional.alpha_dropout(x, 0.3, training=True),
    "feature_alpha_dropout": lambda x: functional.feature_alpha_dropout(x, 0.3, training=True),
    "gumbel_softmax": lambda x: functional.gumbel_softmax(x, hard=True),
    "Normal": lambda x: distributions.Normal(x, x.sigmoid()).rsample(),
    "Gumbel": lambda x: distributions.Gumbel(x, 0.5).rsample(),
    "Laplace": lambda x: distributions.Laplace(x, 0.5).rsample(),
    "Categorical": lambda x: distributions.Categorical(logits=x[:, :8]).sample(),
    "Bernoulli": lambda x: distributions.Bernoulli(logits=x).sample(),
    "RelaxedBernoulli": lambda x: distributions.RelaxedBernoulli(torch.tensor(0.5), logits=x).rsample(),
    "Gamma": lambda x: distributions.Gamma(x.exp(), torch.tensor(2.0)).rsample(),
    "Beta": lambda x: distributions.Beta(x.exp(), torch.tensor(0.5)).rsample(),
    "Dirichlet": lambda x: distributions.Dirichlet(x[:, :4].exp()).rsample(),
}  # fmt: skip


class Drawing(nn.Module):
    """All kinds of draws, and one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": self.linear(x), "drawn": {name: draw(x) for name, draw in DRAWS.items()}}


X = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def drawing() -> Callable[[int], dict[str, Tensor]]:
    """Return a function from a step to its draws."""
    model = af.from_module(Drawing(), {"x": X})
    params = model.init()
    known: dict[int, dict[str, Tensor]] = {}

    def drawn(step: int) -> dict[str, Tensor]:
        if step not in known:
            known[step] = model(params, {"x": X, "key": make_key(0, step)})["drawn"]
        return known[step]

    return drawn


@pytest.mark.parametrize("name", DRAWS)
def test_the_right_distributions(name: str, drawing: Callable[[int], dict[str, Tensor]]) -> None:
    """Shape and dtype are torch's, and so, roughly, are the mean, spread and range of the values."""
    found = drawing(1)[name]
    assert not torch.equal(found, drawing(2)[name]), "another step draws anew"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = [DRAWS[name](X) for _ in range(8)]
    assert found.shape == expected[0].shape and found.dtype == expected[0].dtype
    many, ours = torch.cat(expected).double(), found.double()
    spread, count = many.std().item(), found.numel()
    assert abs(ours.mean().item() - many.mean().item()) < 5 * spread / count**0.5
    assert abs(ours.std().item() - spread) < 0.25 * spread
    far = 0.5 * (many.max() - many.min())
    assert many.min() - far <= ours.min() and ours.max() <= many.max() + far
    if len(many.unique()) <= 300:
        assert set(ours.unique().tolist()) <= set(many.unique().tolist())


def test_gradients_of_draws_are_torchs() -> None:
    """Reparametrised draws have torch's gradient; draws of `torch.normal` have none."""

    def slope(name: str, run: Callable[[Any, Tensor], Tensor]) -> Tensor:
        x = X.clone().requires_grad_()
        (grad,) = torch.autograd.grad(run(DRAWS[name], x).sum() + 0 * x.sum(), x)
        return grad.mean()

    def captured(draw: Draw, x: Tensor) -> Tensor:
        class Module(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.x = nn.Parameter(torch.empty_like(X))

            def forward(self, scale: Tensor) -> Tensor:
                return draw(self.x * scale)

        model = af.from_module(Module(), {"scale": torch.ones(1)})
        return model({"x": x}, {"scale": torch.ones(1), "key": make_key(0)})  # type: ignore[no-any-return]

    for name in ("normal", "Normal", "Gamma", "rrelu", "alpha_dropout"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            expected = slope(name, lambda draw, x: draw(x))
        assert abs(slope(name, captured) - expected) < 0.1, name


# --- layouts ----------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Separate noise in each block, and noise drawn once that all blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.last = nn.GRU(8, 8, 2, batch_first=True, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        everywhere = torch.rand(8)
        for number, block in enumerate(self.blocks):
            h = block(x) * everywhere
            if number == 0:
                h = h + torch.randn_like(h) * in_place(h)[:, :, None].square()
            if number == 1:
                h = functional.alpha_dropout(functional.rrelu(h, training=True), 0.3)
            if number == 2:
                h = functional.gumbel_softmax(h)[:, torch.randperm(h.shape[1])]
            if number == 3:
                h = distributions.Normal(h, h.exp()).rsample() + distributions.Beta(h.exp(), h.exp()).rsample()
            x = x + h
        out: Tensor = self.last(x)[0] + everywhere
        return out


def loss(outputs: Tensor, microbatch: Mapping[str, Any]) -> Tensor:
    return (outputs - microbatch["target"]).square().mean()


NOISY = {name: torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(n)) for n, name in enumerate(("x", "target"))}


def test_the_same_in_every_layout() -> None:
    torch.manual_seed(0)
    module = Noisy()
    model = af.from_module(module, NOISY)
    params = model.init()
    expected_loss, expected = af.reference_value_and_grad(model, loss, 2)(params, NOISY, key=(0, 1))
    state = torch.get_rng_state()
    for points, name, options in (
        (["blocks.1", "blocks.3"], "1f1b", {"remat": "stage"}),
        (["blocks.2", "last"], "zb_h1", {"remat": "layer"}),
        (["blocks.3"], "zb_h1", {"engine": "eager", "remat": "stage"}),
    ):  # fmt: skip
        stages = af.split(model, points)
        s = af.schedule.build(name, num_ranks=len(stages), num_microbatches=2)
        pipe = af.pipeline(stages, s, loss=loss, **options)
        found_loss, found = af.value_and_grad(pipe)(params, NOISY, key=(0, 1))
        assert torch.equal(found_loss, expected_loss), (points, name)
        assert_same_tree(expected, found)
    assert torch.equal(pipe(params, NOISY, key=(0, 1)), expected_loss)  # forward only
    assert pipe(params, NOISY, key=(0, 2)) != expected_loss
    assert torch.equal(state, torch.get_rng_state())


def test_microbatches_and_places_differ() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop = nn.Linear(64, 64), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            h = self.linear(x)
            return (
                torch.rand(64) + 0 * h,
                torch.rand(64) + 0 * h,
                self.drop(torch.ones_like(h)),
                self.drop(torch.ones_like(h)),
            )

    model = af.from_module(Twice(), {"x": X})
    pipe = af.pipeline(af.split(model, []), af.schedule.build("gpipe", num_ranks=1, num_microbatches=2), loss=loss)
    first, second, dropped, again = pipe.forward(model.init(), {"x": X}, key=(0, 1))
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[32]), "a draw for each microbatch"
    assert not torch.equal(first, second) and not torch.equal(dropped, again)


def test_dropping_everything_and_in_place_dropout() -> None:
    module = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(64, 64), nn.Dropout(1.0), nn.Linear(64, 64))
    model = af.from_module(module, {"input": X})
    found = model(model.init(), {"input": X, "key": make_key(0)})
    assert torch.equal(found, module[3].bias.expand(64, 64))


@pytest.mark.full
def test_compiled() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x) * in_place(x, 0.5)[:, :, None] + torch.randn(8)
            return self.last(h)  # type: ignore[no-any-return]

    model = af.from_module(Small(), NOISY)
    params = model.init()
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    expected, grads = af.reference_value_and_grad(model, loss, 2)(params, NOISY, key=(0, 1))
    found, others = af.value_and_grad(af.pipeline(af.split(model, ["last"]), s, loss=loss, compile=True))(
        params, NOISY, key=(0, 1)
    )
    torch.testing.assert_close(found, expected)
    for path, leaf in af.tree.flatten(grads).items():
        torch.testing.assert_close(af.tree.flatten(others)[path], leaf)


# --- without a key ----------------------------------------------------------------------------------------------------


class Depth(nn.Module):
    """Stochastic depth as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return x * in_place(x)[:, :, None] if self.training else x


class Block(nn.Module):
    """Stochastic depth as a function, with a norm that must stay in its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.linear(x))
        return x + (h * rounded(x)[:, :, None] if self.training else h)


def test_evaluation_draws_nothing() -> None:
    """Without a key, parts that draw only in training behave as in eval mode, even if they are layers."""
    torch.manual_seed(0)
    module = nn.Sequential(Block(), Depth(), Block(), Depth(), nn.Linear(8, 8), Depth())
    batch = {"input": NOISY["x"], "target": NOISY["target"]}
    model = af.from_module(module, batch, verify=True)
    params = model.init()
    results = []
    for points, engine in ((["1", "2", "5"], "graph"), (["3"], "eager")):
        stages = af.split(model, points)
        s = af.schedule.build("1f1b", num_ranks=len(stages), num_microbatches=2)
        pipe = af.pipeline(stages, s, loss=loss, engine=engine)
        still = pipe(params, batch)
        assert torch.equal(af.value_and_grad(pipe)(params, batch)[0], still)
        results += [still, af.value_and_grad(pipe)(params, batch, key=(0, 1))[0]]
    assert all(part.training for part in module.modules())
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3]) and results[0] != results[1]
    torch.testing.assert_close(results[0], loss(module.eval()(batch["input"]), batch))
    assert set(layer_costs(model, batch)) == set(model.layers)


class Always(nn.Module):
    """Also draws in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.last(h + torch.randn_like(h))  # type: ignore[no-any-return]


def test_a_draw_takes_a_key() -> None:
    model = af.from_module(Always(), NOISY)
    pipe = af.pipeline(af.split(model, 2), af.schedule.build("1f1b", num_ranks=2, num_microbatches=2), loss=loss)
    wanted = r"Always draws random numbers \(aten.randn_like.*test_random.py.*which takes a key: .*key=\(seed, step\)"
    for run in (pipe, af.value_and_grad(pipe)):
        with pytest.raises(ModelError, match=wanted):
            run(model.init(), NOISY)
    af.value_and_grad(pipe)(model.init(), NOISY, key=(0, 1))
    with pytest.raises(ModelError, match="in eval mode too, so two runs cannot be compared"):
        af.from_module(Always(), NOISY, verify=True)
    found = {verdict.code: verdict.status for verdict in af.check(Always(), NOISY, loss=loss).verdicts}
    assert found["P1"] == "pass" and found["P3"] == found["P6"] == "skip" and "fail" not in found.values()


# --- generators of the host --------------------------------------------------------------------------------------------


class Dropping(nn.Module):
    """Drops layers by a host generator."""

    def __init__(self, probability: float, drawn: Callable[[], float]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.probability, self.drawn = probability, drawn

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x if self.drawn() < self.probability and self.training else block(x)
        return x


HOST: dict[str, tuple[str, Callable[[], float]]] = {
    "random": ("Python's random", lambda: random.random()),
    "uniform": ("Python's random", lambda: random.uniform(0, 1)),
    "rand": ("numpy.random", lambda: np.random.rand()),
    "numpy uniform": ("numpy.random", lambda: np.random.uniform(0, 1)),
}


@pytest.mark.parametrize("name", HOST)
def test_host_generators(name: str) -> None:
    """Their draws may not matter: with a small probability they rarely do, and still count."""
    generator, drawn = HOST[name]
    before = (random.getstate(), np.random.get_state()[1].tolist())
    with pytest.raises(ModelError, match=f"Dropping draws from {generator}, and a capture would fix"):
        af.from_module(Dropping(0.001, drawn), NOISY)
    af.from_module(Dropping(0.001, drawn).eval(), NOISY)
    af.from_module(Dropping(0.0, drawn), NOISY)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_masks_drawn_on_the_host() -> None:
    masked = (lambda x: x * torch.tensor(np.random.permutation(8)), lambda x: x * torch.tensor(np.random.randn(8)))
    for function in masked:
        with pytest.raises(ModelError, match=r"draws from numpy.random"):
            af.from_module(nn.Sequential(nn.Linear(8, 8), Function(function)), {"input": X[:, :8]})


# --- refused ----------------------------------------------------------------------------------------------------------


class Rounding(torch.autograd.Function):
    """Stochastic rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x + torch.rand_like(x)).floor()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.noise: Tensor
        self.register_buffer("noise", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.noise.normal_()


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_a_draw_into_a_buffer_is_state() -> None:
    model = af.from_module(nn.Sequential(nn.Linear(8, 8), Kept(), nn.Linear(8, 8)), {"input": torch.ones(4, 8)})
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(af.split(model, ["1"]), s, loss=lambda outputs, batch: outputs.square().mean())
    reference = af.reference_value_and_grad(model, pipe.loss, 2, has_state=True)
    given = (pipe.init(), {"input": torch.ones(4, 8)}, (0, 1), pipe.init_state())
    ((loss, state), _), ((expected_loss, expected), _) = af.value_and_grad(pipe, has_state=True)(*given), reference(*given)
    assert torch.equal(loss, expected_loss) and torch.equal(state["1", "noise"], expected["1", "noise"])
    assert not torch.equal(state["1", "noise"], given[3]["1", "noise"])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Function(lambda x: torch.poisson(x.exp())), r"global random generator \(aten.poisson.*torch.rand"),
        (Function(lambda x: x * torch.randn(8, dtype=torch.complex64).real), "draws complex numbers .*draw two real ones"),
        (
            Function(Rounding.apply),
            r"forward of an autograd.Function draws random numbers \(aten.rand_like.*draw them before",
        ),
        (
            Function(lambda x: x + torch.rand(8, generator=torch.Generator().manual_seed(0))),
            "random generator is not needed",
        ),
    ],
)
def test_refused_draws(part: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        af.from_module(nn.Sequential(nn.Linear(8, 8), part), {"input": NOISY["x"]})
