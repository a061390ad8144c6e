"""Random operators of a captured forward, as functions of (key, name)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.distributions import Distribution

from autofunc import random
from autofunc.errors import ModelError
from autofunc.graph.lines import line_of
from autofunc.graph.schema import arguments

Node = fx.Node
_Shape = Sequence[int]


def draw(
    kind: str, shape: _Shape, dtype: torch.dtype, options: Sequence[Any], where: str, key: Tensor | None, name: str
) -> Tensor:
    """Return what an operator draws, on the key's device; without gradients, like torch's, except gamma and Dirichlet.

    Args:
        kind: the operator's name, without "aten." and an in-place operator's underscore.
        shape: of the result.
        dtype: of the result.
        options: of the distribution, see `options_of`.
        where: the user's call that draws, for messages.
        key: the microbatch's, or None.
        name: the draw's, unique in the model.

    Raises:
        ModelError: without a key.
    """
    if key is None:
        raise ModelError(
            f"{where}, which takes a key: af.value_and_grad(pipe)(params, batch, key=(seed, step)); without a key a module "
            "is evaluated, and what it draws only `if self.training` is not drawn"
        )
    return _KINDS[kind](random.fold_in(key, name), shape, dtype, *options)


@contextmanager
def unvalidated() -> Iterator[None]:
    """Inside, distributions do not validate arguments by default, since checks of values cannot be exported."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


def options_of(kind: str, node: Node, what: str) -> tuple[Any, ...] | None:
    """Return what a random operator's distribution depends on besides shape and dtype; None for an unknown operator.

    Raises:
        ModelError: for complex numbers.
    """
    if kind not in _KINDS:
        return None
    if node.meta["val"].dtype.is_complex:
        raise ModelError(
            f"{what} draws complex numbers ({node.target}; {line_of(node)}); draw two real ones: "
            "torch.complex(torch.randn(...), torch.randn(...)) * 0.5**0.5"
        )
    given = arguments(node)
    if kind == "bernoulli":
        return (given.get("p", given["self"]),)
    return tuple(given[name] for name in _OPTIONS[kind] if name in given)


# Options by their names in the operators' schemas; those that some overloads lack come last, or default below.
_OPTIONS: dict[str, tuple[str, ...]] = {
    "rand": (), "rand_like": (), "randn": (), "randn_like": (), "uniform": ("from", "to"), "normal": ("mean", "std"),
    "log_normal": ("mean", "std"), "cauchy": ("median", "sigma"), "exponential": ("lambd",), "geometric": ("p",),
    "randint": ("high", "low"), "randint_like": ("high", "low"), "random": ("to", "from"),
    "multinomial": ("self", "num_samples", "replacement"), "randperm": (), "_standard_gamma": ("self",),
    "_sample_dirichlet": ("self",),
}  # fmt: skip


def _uniform(key: Tensor, shape: _Shape, dtype: torch.dtype, low: float = 0.0, high: float = 1.0) -> Tensor:
    return random.uniform(key, shape, dtype, low=low, high=high)


def _normal(key: Tensor, shape: _Shape, dtype: torch.dtype, mean: Any = 0.0, std: Any = 1.0) -> Tensor:
    if isinstance(mean, Tensor) or isinstance(std, Tensor):
        mean, std = (each.detach() if isinstance(each, Tensor) else each for each in (mean, std))
        values: Tensor = random.normal(key, shape, dtype) * std + mean
        return values.to(dtype)
    return random.normal(key, shape, dtype, mean=mean, std=std)


def _log_normal(key: Tensor, shape: _Shape, dtype: torch.dtype, mean: float, std: float) -> Tensor:
    return random.normal(key, shape, torch.float64, mean=mean, std=std).exp().to(dtype)


def _cauchy(key: Tensor, shape: _Shape, dtype: torch.dtype, median: float, sigma: float) -> Tensor:
    angle: Tensor = math.pi * (random.uniform(key, shape, torch.float64) - 0.5)
    return (angle.tan() * sigma + median).to(dtype)


def _exponential(key: Tensor, shape: _Shape, dtype: torch.dtype, rate: float) -> Tensor:
    return random.exponential(key, shape, dtype, rate=rate)


def _geometric(key: Tensor, shape: _Shape, dtype: torch.dtype, p: float) -> Tensor:
    rate = -math.log1p(-p) if p < 1 else math.inf
    return (random.exponential(key, shape, torch.float64) / rate).ceil().clamp_min(1).to(dtype)


def _randint(key: Tensor, shape: _Shape, dtype: torch.dtype, high: Any, low: Any = 0) -> Tensor:
    return random.randint(key, shape, low, high, dtype)


def _random(key: Tensor, shape: _Shape, dtype: torch.dtype, high: int | None = None, low: int = 0) -> Tensor:
    if high is None:  # every integer the dtype holds exactly, from 0
        high = round(2 / torch.finfo(dtype).eps) + 1 if dtype.is_floating_point else _end_of(dtype)
    return random.randint(key, shape, low, high, dtype)


def _end_of(dtype: torch.dtype) -> int:
    return 2 if dtype is torch.bool else min(torch.iinfo(dtype).max, 2**63 - 2) + 1


def _bernoulli(key: Tensor, shape: _Shape, dtype: torch.dtype, p: Any) -> Tensor:
    return random.bernoulli(key, p, shape).to(dtype)


def _multinomial(
    key: Tensor, shape: _Shape, dtype: torch.dtype, weights: Tensor, count: int, replacement: bool
) -> Tensor:  # fmt: skip
    return random.multinomial(key, weights, count, replacement=replacement)


def _randperm(key: Tensor, shape: _Shape, dtype: torch.dtype) -> Tensor:
    return random.permutation(key, shape[0], dtype)


def _standard_gamma(key: Tensor, shape: _Shape, dtype: torch.dtype, alpha: Tensor) -> Tensor:
    """Take the first accepted of several tries; its gradient is that of `torch._standard_gamma`.

    Marsaglia and Tsang, "A simple method for generating gamma variables", 2000: at least 95 % of tries are accepted.
    """
    given = alpha.detach().to(torch.float64)
    d = torch.where(given < 1, given + 1, given) - 1 / 3
    tries = (_GAMMA_TRIES, *shape)
    x = random.normal(random.fold_in(key, 0), tries, torch.float64)
    v = (1 + x / (9 * d).sqrt()) ** 3
    waited = random.exponential(random.fold_in(key, 1), tries, torch.float64)
    accepted = (v > 0) & (-waited < 0.5 * x.square() + d - d * v + d * v.clamp_min(1e-300).log())
    first = accepted.to(torch.int64).argmax(0, keepdim=True)
    sample = d * v.gather(0, first)[0]
    less = torch.exp(-random.exponential(random.fold_in(key, 2), shape, torch.float64) / given)  # for alpha below 1
    sample = torch.where(given < 1, sample * less, sample).to(dtype).clamp_min(torch.finfo(dtype).tiny)
    slope: Tensor = torch.ops.aten._standard_gamma_grad(alpha.detach(), sample)
    return sample + (alpha - alpha.detach()) * slope


def _sample_dirichlet(key: Tensor, shape: _Shape, dtype: torch.dtype, alpha: Tensor) -> Tensor:
    parts = _standard_gamma(key, shape, dtype, alpha)
    return parts / parts.sum(-1, keepdim=True)


_GAMMA_TRIES = 8

_KINDS: dict[str, Callable[..., Tensor]] = {
    "rand": _uniform, "rand_like": _uniform, "uniform": _uniform, "randn": _normal, "randn_like": _normal,
    "normal": _normal, "log_normal": _log_normal, "cauchy": _cauchy, "exponential": _exponential,
    "geometric": _geometric, "randint": _randint, "randint_like": _randint, "random": _random, "bernoulli": _bernoulli,
    "multinomial": _multinomial, "randperm": _randperm, "_standard_gamma": _standard_gamma,
    "_sample_dirichlet": _sample_dirichlet,
}  # fmt: skip
