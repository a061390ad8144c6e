"""Randomness as a function: statistics, independence, and the same bits however it is asked for."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from autofunc.random import (
    InitKey,
    as_key,
    bernoulli,
    bits,
    dropout,
    exponential,
    fold_in,
    make_key,
    multinomial,
    normal,
    permutation,
    randint,
    uniform,
)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack((a.double(), b.double())))[0, 1].item()


def test_bits_are_uniform_and_uncorrelated() -> None:
    n = 1 << 18
    drawn = bits(make_key(1, 2), n)
    assert drawn.min() >= 0 and drawn.max() < 2**32
    unit = drawn.double() / 2**32
    assert abs(unit.mean().item() - 0.5) < 0.005 and abs(unit.var().item() - 1 / 12) < 0.001
    counts = torch.bincount((unit * 256).long(), minlength=256).double()
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
    assert 160 < chi_square < 370, "255 degrees of freedom: far outside, the hash is broken"
    for lag in (1, 2, 7, 64, 768):
        assert abs(correlation(unit[:-lag], unit[lag:])) < 0.01
    for bit in range(32):
        assert abs(((drawn >> bit) & 1).double().mean().item() - 0.5) < 0.01


@pytest.mark.parametrize(
    "other", [make_key(1, 3), make_key(2, 2), fold_in(make_key(1, 2), 0), fold_in(make_key(1, 2), "h.0")]
)
def test_keys_give_unrelated_bits(other: torch.Tensor) -> None:
    n = 1 << 16
    assert abs(correlation(bits(make_key(1, 2), n), bits(other, n))) < 0.02


def test_folding_many_at_once_equals_one_by_one() -> None:
    key = make_key(5)
    assert torch.equal(fold_in(key, torch.arange(4)), torch.stack([fold_in(key, index) for index in range(4)]))
    assert len({tuple(fold_in(key, index).tolist()) for index in range(1000)}) == 1000


def test_bits_can_be_made_in_pieces() -> None:
    key = make_key(5)
    assert torch.equal(bits(key, 100), torch.cat((bits(key, 30), bits(key, 70, start=30))))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout(p: float) -> None:
    x = torch.ones(400, 250, requires_grad=True)
    batch = {"key": make_key(0, 1)}
    y = dropout(x, p, batch, "h.0.mlp")
    kept = (y != 0).double().mean().item()
    assert abs(kept - (1 - p)) < 0.01 and abs(y.mean().item() - 1) < 0.05
    assert torch.equal(y, dropout(x, p, batch, "h.0.mlp")), "the same key makes the same mask"
    assert not torch.equal(y, dropout(x, p, batch, "h.1.mlp")), "another name makes another"
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y.detach()), "the mask and its scale are the gradient"


def test_no_key_no_dropout() -> None:
    x = torch.ones(3)
    assert dropout(x, 0.5, {}, "a") is x
    assert dropout(x, 0.0, {"key": make_key(0)}, "a") is x
    with pytest.raises(ValueError, match="not a probability"):
        dropout(x, 1.0, {"key": make_key(0)}, "a")


def test_as_key() -> None:
    assert as_key(None) is None
    assert torch.equal(as_key((3, 4)), make_key(3, 4))
    assert torch.equal(as_key(make_key(3, 4)), make_key(3, 4))


def test_init_depends_on_seed_and_path_alone() -> None:
    key = InitKey(3, "h.0")
    weight = key.normal("attn.weight", (300, 200), std=0.5, mean=1.0)
    assert torch.equal(weight, InitKey(3).at("h").at("0.attn").normal("weight", (300, 200), std=0.5, mean=1.0))
    assert not torch.equal(weight, InitKey(3, "h.1").normal("attn.weight", (300, 200), std=0.5, mean=1.0))
    assert not torch.equal(weight, InitKey(4, "h.0").normal("attn.weight", (300, 200), std=0.5, mean=1.0))
    assert abs(weight.mean().item() - 1.0) < 0.01 and abs(weight.std().item() - 0.5) < 0.01
    assert abs(((weight - 1) / 0.5).pow(4).mean().item() - 3.0) < 0.1, "the kurtosis of a normal"
    uniform = key.uniform("u", (1000, 10), -2.0, 3.0)
    assert -2 <= uniform.min() < -1.9 and 2.9 < uniform.max() <= 3 and abs(uniform.mean().item() - 0.5) < 0.1


def test_init_in_other_dtypes_rounds_the_same_values() -> None:
    wide = InitKey(0, dtype=torch.float64).normal("w", (50,))
    assert torch.equal(wide.float(), InitKey(0).normal("w", (50,)))
    assert torch.equal(wide.bfloat16(), InitKey(0, dtype=torch.bfloat16).normal("w", (50,)))


def test_init_large_tensors_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = InitKey(0).normal("w", (1000,))
    monkeypatch.setattr("autofunc.random._CHUNK", 64)
    assert torch.equal(whole, InitKey(0).normal("w", (1000,)))


def test_generator_for_torchs_own_initialisers() -> None:
    def draw(seed: int) -> torch.Tensor:
        return torch.nn.init.normal_(torch.empty(5), generator=InitKey(seed, "a").generator("w"))

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_uniform(dtype: torch.dtype) -> None:
    drawn = uniform(make_key(1), (300, 200), dtype)
    assert drawn.shape == (300, 200) and drawn.dtype == dtype
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.double().mean().item() - 0.5) < 0.01 and abs(drawn.double().var().item() - 1 / 12) < 0.005
    moved = uniform(make_key(1), (300, 200), dtype, low=-2.0, high=6.0)
    assert moved.min() >= -2 and moved.max() <= 6 and abs(moved.double().mean().item() - 2) < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
def test_normal(dtype: torch.dtype) -> None:
    drawn = normal(make_key(1), (300, 200), dtype, mean=1.0, std=0.5)
    standard = (drawn.double() - 1) / 0.5
    assert drawn.shape == (300, 200) and drawn.dtype == dtype
    assert abs(standard.mean().item()) < 0.02 and abs(standard.var().item() - 1) < 0.02
    assert abs(standard.pow(4).mean().item() - 3) < 0.15, "the kurtosis of a normal"


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponential(dtype: torch.dtype) -> None:
    drawn = exponential(make_key(1), (300, 200), dtype, rate=2.0)
    assert drawn.dtype == dtype and drawn.min() > 0
    assert abs(drawn.double().mean().item() - 0.5) < 0.01 and abs(drawn.double().std().item() - 0.5) < 0.01


def test_bernoulli() -> None:
    assert abs(bernoulli(make_key(1), 0.3, (300, 200)).double().mean().item() - 0.3) < 0.01
    p = torch.tensor([0.0, 0.2, 0.9, 1.0])
    often = bernoulli(make_key(1), p, (20_000, 4)).double().mean(0)
    assert torch.allclose(often, p.double(), atol=0.01) and often[0] == 0 and often[3] == 1
    one = bernoulli(make_key(1), p)
    assert one.shape == (4,) and one.dtype == torch.bool


@pytest.mark.parametrize(("low", "high"), [(0, 2), (-3, 4), (5, 5 + 2**40), (0, 2**63 - 1)])
def test_randint(low: int, high: int) -> None:
    drawn = randint(make_key(1), (40_000,), low, high)
    assert drawn.dtype == torch.int64 and drawn.min() >= low and drawn.max() < high
    middle, spread = (low + high - 1) / 2, high - low
    assert abs(drawn.double().mean().item() - middle) < 0.01 * spread
    if spread < 10:
        counts = torch.bincount(drawn - low, minlength=spread).double() / 40_000
        assert torch.allclose(counts, torch.full((spread,), 1 / spread).double(), atol=0.01)
    assert randint(make_key(1), (3,), 0, 2, torch.uint8).dtype == torch.uint8


def test_multinomial() -> None:
    weights = torch.tensor([[0.0, 1.0, 3.0, 0.0], [2.0, 0.0, 2.0, 4.0]])
    drawn = multinomial(make_key(1), weights, 20_000, replacement=True)
    often = torch.stack([torch.bincount(row, minlength=4) for row in drawn]) / 20_000
    assert drawn.shape == (2, 20_000) and torch.allclose(often, weights / weights.sum(-1, keepdim=True), atol=0.02)
    assert (often[weights == 0] == 0).all()


def test_multinomial_without_replacement() -> None:
    weights = torch.tensor([1.0, 2.0, 0.0, 5.0]).expand(20_000, 4)
    drawn = multinomial(make_key(1), weights, 3)
    assert torch.equal(drawn.sort(-1).values, torch.tensor([0, 1, 3]).expand(20_000, 3)), (
        "each once, and never the one of 0"
    )
    first = torch.bincount(drawn[:, 0], minlength=4) / 20_000
    assert torch.allclose(first, weights[0] / 8, atol=0.02)
    second = torch.bincount(drawn[drawn[:, 0] == 3, 1], minlength=4).double()
    assert abs((second[0] / second.sum()).item() - 1 / 3) < 0.02, "those that are left keep their odds"


def test_permutation() -> None:
    drawn = torch.stack([permutation(fold_in(make_key(1), index), 4, torch.int32) for index in range(600)])
    assert drawn.dtype == torch.int32 and torch.equal(drawn.sort(-1).values, torch.arange(4).expand(600, 4).int())
    assert len({tuple(row.tolist()) for row in drawn}) == 24
    assert (torch.stack([(drawn[:, place] == 0).double().mean() for place in range(4)]) - 0.25).abs().max() < 0.08


def test_draws_are_functions_of_the_key() -> None:
    def all_draws(key: torch.Tensor) -> list[torch.Tensor]:
        shape, weights = (64,), torch.ones(64)
        return [
            uniform(key, shape), normal(key, shape), exponential(key, shape), bernoulli(key, 0.5, shape),
            randint(key, shape, 0, 100), multinomial(key, weights, 16), permutation(key, 64),
        ]  # fmt: skip

    state = torch.get_rng_state()
    for one, again, other in zip(all_draws(make_key(1)), all_draws(make_key(1)), all_draws(make_key(2)), strict=True):
        assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.full
def test_compiled_code_makes_the_same_bits() -> None:
    """A C++ compiler that takes int32 never to overflow, and the counter never to be negative, would drop a mask."""
    numel = 1003  # no multiple of a vector: the rest runs without vectors
    recorded = make_fx(lambda key: (bits(key, numel), dropout(torch.ones(numel), 0.3, {"key": key}, "a")))
    compiled = torch.compile(recorded(make_key(9)), dynamic=False)
    for seed in range(3):
        key = make_key(seed)
        drawn, dropped = compiled(key)
        assert torch.equal(drawn, bits(key, numel))
        assert torch.equal(dropped, dropout(torch.ones(numel), 0.3, {"key": key}, "a"))


def test_bits_are_a_hash_of_both_words_and_the_index() -> None:
    """`fold_in` hashes int64, `bits` int32; the two are one function."""
    key = make_key(3)
    start = (1 << 31) - 2
    folded = torch.stack([fold_in(torch.stack((index, key[0])), 0)[0] for index in start + torch.arange(4)])
    assert torch.equal(torch.stack([fold_in(torch.stack((each, key[1])), 0)[0] for each in folded]), bits(key, 4, start))
