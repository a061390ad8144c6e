"""Randomness as a pure function: seeded init, and dropout by a counter hash.

Nothing here reads or advances a global generator. The bits of a random tensor are a hash of (key, index of the element),
computed with integer tensor operations, so they are the same on CPU and GPU, in any layout, and can be made again
instead of being stored.

- Initial weights depend on (seed, path) alone: `InitKey`.
- Dropout depends on (seed, step, microbatch, layer name) alone: `fold_in`, `dropout`.

The mixer is the 32-bit finaliser with multipliers 0x21f0aaad and 0x735a2d97 found by C. Wellons' hash-prospector
(github.com/skeeto/hash-prospector, issue 19). Both multipliers are below 2**31, so that products of 32-bit values fit
into int64 without overflow, which torch does not define.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from autofunc.errors import BatchError
from autofunc.tree import join

_MASK = 0xFFFFFFFF
_MULTIPLIER_1 = 0x21F0AAAD
_MULTIPLIER_2 = 0x735A2D97
_CHUNK = 1 << 22  # elements hashed at a time, so that the int64 temporaries of a large weight stay small


def _mix(x: Tensor, salt: Tensor | int) -> Tensor:
    """Hash int64 values in [0, 2**32) to the same range; `salt` enters between the two rounds."""
    x = x ^ (x >> 16)
    x = (x * _MULTIPLIER_1) & _MASK
    x = x ^ (x >> 15) ^ salt
    x = (x * _MULTIPLIER_2) & _MASK
    return x ^ (x >> 15)


def _words(*parts: object) -> tuple[int, int]:
    """Two 32-bit words from any printable parts (a seed, a name): stable across processes and Python versions."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def make_key(seed: int, step: int = 0, *, device: torch.device | str = "cpu") -> Tensor:
    """A key for the randomness of one step: two 32-bit words in an int64 tensor of shape (2,)."""
    return torch.tensor(_words("step", int(seed), int(step)), dtype=torch.int64, device=device)


def as_key(key: Any, *, device: torch.device | str = "cpu") -> Tensor | None:
    """Read a user's key: None, a pair (seed, step), or a tensor that `make_key` made.

    Raises:
        BatchError: for anything else.
    """
    if key is None:
        return None
    if isinstance(key, Tensor) and key.shape == (2,) and key.dtype == torch.int64:
        return key.to(device)
    if isinstance(key, (tuple, list)) and len(key) == 2 and all(isinstance(part, int) for part in key):
        return make_key(*key, device=device)
    raise BatchError(f"key={key!r}: expected a pair of integers (seed, step), or what af.random.make_key returns")


def fold_in(key: Tensor, data: int | str | Tensor) -> Tensor:
    """Derive a new key from a key and a number, a name, or a tensor of numbers, as `jax.random.fold_in` does.

    Args:
        key: int64, shape (2,).
        data: what to fold in. A tensor of shape (n,) gives n keys at once, shape (n, 2).

    Returns:
        A key: int64, shape (2,), or (n, 2) for a tensor of numbers.
    """
    if isinstance(data, str):
        low, high = _words(data)
        return torch.stack(
            (_mix(key[..., 0] ^ low, key[..., 1] ^ high), _mix(key[..., 1] ^ high, key[..., 0] ^ low)), dim=-1
        )
    number: Tensor | int = data if isinstance(data, Tensor) else int(data) & _MASK
    return torch.stack((_mix(key[..., 0] ^ number, key[..., 1]), _mix(key[..., 1] ^ number, key[..., 0])), dim=-1)


def bits(key: Tensor, numel: int, start: int = 0) -> Tensor:
    """`numel` hashed 32-bit integers, int64 of shape (numel,), for the elements `start`, `start + 1`, ... of a tensor."""
    counter = torch.arange(start, start + numel, dtype=torch.int64, device=key.device)
    return _mix(_mix(counter & _MASK, key[0]) ^ (counter >> 32), key[1])


def dropout(x: Tensor, p: float, batch: Mapping[str, Any], name: str) -> Tensor:
    """Dropout whose mask is a function of (key, name) alone: the same in every layout, and recomputable.

    Without `batch["key"]`, or with `p == 0`, it returns `x` itself: no key means evaluation.

    Args:
        x: any floating-point tensor.
        p: probability of setting an element to zero, in [0, 1).
        batch: the microbatch; its `"key"` is the microbatch's own key (int64, shape (2,)).
        name: what makes this call differ from any other in the model, usually a path such as `"h.3.mlp"`.
    """
    key = batch.get("key")
    if key is None or p == 0.0:
        return x
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout {name!r}: p={p} is not a probability in [0, 1)")
    threshold = round(p * 2.0**32)
    keep = (bits(fold_in(key, name), x.numel()) >= threshold).view(x.shape)
    return x * keep.to(x.dtype) * (1.0 / (1.0 - p))


@dataclass(frozen=True)
class InitKey:
    """What `Layer.init` receives: makes tensors whose values depend on (seed, path) alone.

    A path is the layer's name joined with the name given to the call; the same path gives the same values wherever and
    in whatever order it is asked for.

    Example:
        def init(key):
            return {"weight": key.normal("weight", (64, 32), std=0.02), "bias": key.zeros("bias", (64,))}
    """

    seed: int
    path: str = ""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32

    def at(self, name: str) -> InitKey:
        """The key of a sub-tree: `key.at("attn").normal("weight", ...)` equals `key.normal("attn.weight", ...)`."""
        return replace(self, path=join(self.path, name))

    def zeros(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor of zeros (`name` is taken so that every initialiser is called alike)."""
        return torch.zeros(tuple(shape), device=self.device, dtype=self.dtype)

    def ones(self, name: str, shape: Sequence[int]) -> Tensor:
        """A tensor of ones (`name` is taken so that every initialiser is called alike)."""
        return torch.ones(tuple(shape), device=self.device, dtype=self.dtype)

    def normal(self, name: str, shape: Sequence[int], std: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normal values by Box-Muller, computed in fp64 and rounded once."""

        def draw(key: Tensor, count: int, start: int) -> Tensor:
            radius = torch.sqrt(-2.0 * torch.log(_unit(bits(fold_in(key, 0), count, start))))
            return mean + std * radius * torch.cos(2.0 * math.pi * _unit(bits(fold_in(key, 1), count, start)))

        return self._fill(name, shape, draw)

    def uniform(self, name: str, shape: Sequence[int], low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform values in (low, high), computed in fp64 and rounded once."""
        return self._fill(name, shape, lambda key, count, start: low + (high - low) * _unit(bits(key, count, start)))

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator seeded from (seed, path), for initialisers that only know generators."""
        low, high = _words("init", self.seed, join(self.path, name))
        return torch.Generator().manual_seed(low | (high << 31))

    def _fill(self, name: str, shape: Sequence[int], draw: Any) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(tuple(shape), device=self.device, dtype=self.dtype)
        key = torch.tensor(_words("init", self.seed, join(self.path, name)), dtype=torch.int64, device=self.device)
        values = torch.empty(math.prod(shape), device=self.device, dtype=self.dtype)
        for start in range(0, values.numel(), _CHUNK):
            count = min(_CHUNK, values.numel() - start)
            values[start : start + count] = draw(key, count, start)
        return values.view(tuple(shape))


def _unit(hashed: Tensor) -> Tensor:
    """Map 32-bit integers to fp64 in (0, 1), ends excluded."""
    return (hashed.to(torch.float64) + 0.5) * 2.0**-32
