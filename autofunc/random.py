"""Randomness as a pure function: seeded init, dropout and draws by a counter hash.

Nothing here reads or advances a global generator. The bits of a random tensor are a hash of (key, index of the element),
computed with integer tensor operations, so they are the same on CPU and GPU, in any layout, and can be recomputed instead
of stored.

- Initial weights depend on (seed, path) alone: `InitKey`.
- Dropout depends on (seed, step, microbatch, layer name) alone: `fold_in`, `dropout`.
- So does every other draw of a layer, from a key that its name was folded into: `uniform`, `normal`, `exponential`,
  `bernoulli`, `randint`, `multinomial`, `permutation`. They have no gradient; `mean + std * normal(...)` has.

    noise = af.random.normal(af.random.fold_in(batch["key"], "h.3.noise"), x.shape, x.dtype)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from autofunc.counter_hash import MASK, at_least, hashed, mix_key, unsigned, words
from autofunc.errors import BatchError
from autofunc.tree import join

KEY = "key"
"""The entry of a batch and of a microbatch that holds its key ..."""
KEY_BESIDE_ENTRY = "random key"
"""... and its name if the model's forward has an argument `key`, which then is an ordinary entry."""

_DIGITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}  # bits of the mantissa
_CHUNK = 1 << 22  # elements hashed at a time, so that the int64 temporaries of a large weight stay small


def make_key(seed: int, step: int = 0, *, device: torch.device | str = "cpu") -> Tensor:
    """Return a key for the randomness of one step: two 32-bit words in an int64 tensor of shape (2,)."""
    return torch.tensor(words("step", int(seed), int(step)), dtype=torch.int64, device=device)


def as_key(key: Any, *, device: torch.device | str = "cpu") -> Tensor | None:
    """Read a user's key: None, a pair (seed, step), or a tensor from `make_key`.

    Raises:
        BatchError: for anything else.
    """
    if key is None:
        return None
    if isinstance(key, Tensor) and key.shape == (2,) and key.dtype == torch.int64:
        return key.to(device)
    if isinstance(key, (tuple, list)) and len(key) == 2 and all(isinstance(part, int) for part in key):
        return make_key(*key, device=device)
    raise BatchError(f"key={key!r}: expected a pair of integers (seed, step), or the result of af.random.make_key")


def fold_in(key: Tensor, data: int | str | Tensor) -> Tensor:
    """Derive a new key from a key and a number, a name, or a tensor of numbers, as `jax.random.fold_in` does.

    Args:
        key: int64, shape (2,).
        data: what to fold in. A tensor of shape (n,) gives n keys at once, shape (n, 2).

    Returns:
        A key: int64, shape (2,), or (n, 2) for a tensor of numbers.
    """
    if isinstance(data, str):
        low, high = words(data)
        both = torch.stack((key[..., 0] ^ low, key[..., 1] ^ high), dim=-1)  # no constant tensor: one waits for a copy
        return mix_key(both, both.flip(-1))
    number: Tensor | int = data.unsqueeze(-1) if isinstance(data, Tensor) else int(data) & MASK
    return mix_key(key ^ number, key.flip(-1))


def bits(key: Tensor, numel: int, start: int = 0) -> Tensor:
    """Return `numel` hashed 32-bit integers for elements `start`, `start + 1`, ... of a tensor: int64, shape (numel,)."""
    return unsigned(hashed(key, numel, start))


def _two_bits(key: Tensor, numel: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Return two independent numbers per element: the bits of the key with 0 and with 1 folded in."""
    first, second = hashed(fold_in(key, torch.arange(2, device=key.device)), numel, start).unbind()
    return unsigned(first), unsigned(second)


def uniform(
    key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Return uniform values in [low, high), on the key's device; rounding to `dtype` may give `high` itself.

    Args:
        key: int64, shape (2,); use a new key for each draw.
        shape: of the result.
        dtype: floating point, of at least 16 bits.
    """
    if dtype not in _DIGITS:
        raise ValueError(f"dtype={dtype}: expected one of {', '.join(map(str, _DIGITS))}")
    digits = min(_DIGITS[dtype], 32)  # as many as fit, so that nothing rounds up to 1
    unit = (bits(key, math.prod(shape)) >> (32 - digits)).to(torch.float64) * 2.0**-digits
    return (unit * (high - low) + low).to(dtype).view(tuple(shape))


def normal(
    key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Return normal values, computed in fp64 and rounded once. Arguments as in `uniform`."""
    return _normal(key, math.prod(shape), 0, mean, std).to(dtype).view(tuple(shape))


def exponential(
    key: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, rate: float = 1.0
) -> Tensor:  # fmt: skip
    """Return exponentially distributed values with mean 1 / rate; never 0. Arguments as in `uniform`."""
    values = torch.log(_unit(bits(key, math.prod(shape)))) / -rate
    return values.to(dtype).clamp_min(torch.finfo(dtype).tiny).view(tuple(shape))


def bernoulli(key: Tensor, p: float | Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return a bool tensor, True with probability `p`.

    Args:
        key: int64, shape (2,); use a new key for each draw.
        p: a probability in [0, 1], or a tensor with one per element.
        shape: of the result; by default the shape of `p`.
    """
    shape = tuple(shape) if shape is not None else tuple(p.shape) if isinstance(p, Tensor) else ()
    unit = _unit(bits(key, math.prod(shape))).view(shape)
    return unit < (p.to(torch.float64) if isinstance(p, Tensor) else p)


def randint(
    key: Tensor, shape: Sequence[int], low: int | Tensor, high: int | Tensor, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Return integers in [low, high), uniform up to one part in 2**31.

    Args:
        key: int64, shape (2,); use a new key for each draw.
        shape: of the result.
        low: smallest value, an int or a 0-dim int64 tensor.
        high: one above the largest value, an int or a 0-dim int64 tensor.
        dtype: wide enough for the values.
    """
    first, second = _two_bits(key, math.prod(shape))
    wide = (first << 31) | (second >> 1)  # 63 bits
    return (wide % (high - low) + low).to(dtype).view(tuple(shape))


def multinomial(key: Tensor, weights: Tensor, num_samples: int = 1, *, replacement: bool = False) -> Tensor:
    """Draw category numbers with probabilities proportional to weights.

    Args:
        key: int64, shape (2,); use a new key for each draw.
        weights: non-negative, shape (..., categories); without replacement at least `num_samples` must be positive.
        num_samples: draws per row of weights.
        replacement: whether a category may be drawn again.

    Returns:
        int64, shape (..., num_samples), in the order drawn.
    """
    wide = weights.detach().to(torch.float64)
    if replacement or num_samples == 1:
        below = wide.cumsum(-1).contiguous()
        draws = _unit(bits(key, math.prod(wide.shape[:-1]) * num_samples)).view(*wide.shape[:-1], num_samples)
        return torch.searchsorted(below, draws * below[..., -1:], right=True)
    waiting = -torch.log(_unit(bits(key, wide.numel()))).view(wide.shape)  # exponential race: the first arrivals win
    return (wide / waiting).topk(num_samples).indices


def permutation(key: Tensor, n: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return the numbers 0 ... n - 1 in random order, shape (n,)."""
    return torch.sort(bits(key, n), stable=True).indices.to(dtype)


def dropout(
    x: Tensor, p: float, batch: Mapping[str, Any] | None = None, name: str = "", *, training: bool = True
) -> Tensor:
    """Apply dropout whose mask is a function of (key, name) alone: the same in every layout, and recomputable.

    Without a key, or with `p == 0`, return `x` itself: no key means evaluation. `dropout(x, p)` finds both on its own: in
    the `apply` of an `af.Layer` it uses the microbatch's key, and the layer's name with the number of the call. In the
    forward of an `nn.Module` it is torch's dropout, which `af.from_module` turns into a function of the key.

    Args:
        x: any floating-point tensor.
        p: probability of setting an element to zero, in [0, 1).
        batch: the microbatch; its `"key"` is the microbatch's own key (int64, shape (2,)).
        name: distinguishes this call from all others in the model, usually a path such as `"h.3.mlp"`.
        training: False disables dropout regardless of the key: pass `self.training` in a module.

    Raises:
        BatchError: for a `p` outside [0, 1); without a batch, if a forward is rerun while gradients are computed
            (`torch.utils.checkpoint`).
    """
    if not training:
        return x
    if batch is not None:
        key = batch.get(KEY)
    else:
        place = _place.get()
        if place is None:
            return torch.nn.functional.dropout(x, p)
        key, name = place.key, name or place.next_name()
    if key is None or p == 0.0:
        return x
    if not 0.0 <= p < 1.0:
        raise BatchError(f"dropout {name!r}: p={p} is not a probability in [0, 1)")
    keep = at_least(min(round(p * 2.0**32), MASK), hashed(fold_in(key, name), x.numel())).view(x.shape)
    return x * keep.to(x.dtype) * (1.0 / (1.0 - p))


@dataclass
class _Place:
    """The layer in which `dropout` is called."""

    key: Tensor | None
    layer: str
    calls: int = 0

    def next_name(self) -> str:
        """Return a name for this call; numbering restarts whenever the layer runs."""
        if not self.layer:
            raise BatchError(
                "af.random.dropout(x, p) was called while gradients are computed, when no layer provides its key "
                "(torch.utils.checkpoint?); pass the batch and a name: af.random.dropout(x, p, batch, name)"
            )
        self.calls += 1
        return f"{self.layer}#{self.calls}"


_place: ContextVar[_Place | None] = ContextVar("_place", default=None)


@contextmanager
def drawing(key: Tensor | None, layer: str) -> Iterator[None]:
    """Provide, while a layer runs, the key that `dropout` without a batch uses. An empty name refuses such calls."""
    token = _place.set(_Place(key, layer))
    try:
        yield
    finally:
        _place.reset(token)


@dataclass(frozen=True)
class InitKey:
    """The argument of `Layer.init`: makes tensors whose values depend on (seed, path) alone.

    A path is the layer's name joined with the name given to the call; the same path gives the same values regardless of
    where and in which order it is used.

    Example:
        def init(key):
            return {"weight": key.normal("weight", (64, 32), std=0.02), "bias": key.zeros("bias", (64,))}
    """

    seed: int
    path: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def at(self, name: str) -> InitKey:
        """Return the key of a sub-tree: `key.at("attn").normal("weight", ...)` is `key.normal("attn.weight", ...)`."""
        return replace(self, path=join(self.path, name))

    def zeros(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return zeros (`name` only keeps the signatures of initialisers alike)."""
        return torch.zeros(tuple(shape), device=self.device, dtype=self.dtype)

    def ones(self, name: str, shape: Sequence[int]) -> Tensor:
        """Return ones (`name` only keeps the signatures of initialisers alike)."""
        return torch.ones(tuple(shape), device=self.device, dtype=self.dtype)

    def normal(self, name: str, shape: Sequence[int], std: float = 1.0, mean: float = 0.0) -> Tensor:
        """Return normal values by Box-Muller, computed in fp64 and rounded once."""
        return self._fill(name, shape, lambda key, count, start: _normal(key, count, start, mean, std))

    def uniform(self, name: str, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return uniform values in (low, high), computed in fp64 and rounded once."""
        return self._fill(name, shape, lambda key, count, start: low + (high - low) * _unit(bits(key, count, start)))

    def generator(self, name: str) -> torch.Generator:
        """Return a CPU generator seeded from (seed, path), for initialisers that need one."""
        low, high = words("init", self.seed, join(self.path, name))
        return torch.Generator().manual_seed(low | (high << 31))

    def _fill(self, name: str, shape: Sequence[int], draw: Any) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(tuple(shape), device=self.device, dtype=self.dtype)
        key = torch.tensor(words("init", self.seed, join(self.path, name)), dtype=torch.int64, device=self.device)
        values = torch.empty(math.prod(shape), device=self.device, dtype=self.dtype)
        for start in range(0, values.numel(), _CHUNK):
            count = min(_CHUNK, values.numel() - start)
            values[start : start + count] = draw(key, count, start)
        return values.view(tuple(shape))


def _unit(hashed: Tensor) -> Tensor:
    """Map 32-bit integers to fp64 in the open interval (0, 1)."""
    return (hashed.to(torch.float64) + 0.5) * 2.0**-32


def _normal(key: Tensor, count: int, start: int, mean: float, std: float) -> Tensor:
    """Return normal values by Box-Muller, in fp64."""
    first, second = map(_unit, _two_bits(key, count, start))
    return mean + std * torch.sqrt(-2.0 * torch.log(first)) * torch.cos(2.0 * math.pi * second)
