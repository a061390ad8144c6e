"""Adapters as plain data, and the names of their factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from autofunc.errors import ModelError
from autofunc.random import InitKey
from autofunc.tree import join

A, B = "lora_A", "lora_B"
"""PEFT's names of the factors: a weight (out, in) changes by scale * B @ A, with A (rank, in) and B (out, rank)."""

HELD = {A: f"@{A}", B: f"@{B}"}
"""The keys of the factors in a layer's nested dicts; no parameter of the layer has such a name."""


@dataclass(frozen=True)
class Rank:
    """Size and strength of an adapter.

    Args:
        rank: columns of B, rows of A.
        alpha: the change is multiplied by alpha / rank.
        dropout: probability of zeroing an element of the adapter's input.
        use_rslora: divide by the square root of the rank instead (Kalajdzievski, arXiv 2312.03732).

    Raises:
        ModelError: for values out of range.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ModelError(f"lora: rank={self.rank!r}; expected a whole number of at least 1, such as 8")
        if not _is_number(self.alpha) or not 0 < self.alpha < math.inf:
            raise ModelError(f"lora: alpha={self.alpha!r}; expected a number above 0, such as 16")
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ModelError(f"lora: dropout={self.dropout!r}; expected a probability in [0, 1), such as 0.05")

    @property
    def scale(self) -> float:
        """The multiplier of the product of the factors."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class Adapter:
    """The adapter of one weight.

    Args:
        size: its rank and strength.
        shape: of the weight.
        is_in_out: True if the weight is stored as (in, out), as in transformers' Conv1D; else as (out, in).
    """

    size: Rank
    shape: tuple[int, int]
    is_in_out: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes of the factors, by name."""
        out, features = self.shape[::-1] if self.is_in_out else self.shape
        return {A: (self.size.rank, features), B: (out, self.size.rank)}

    def initial(self, name: str, key: InitKey) -> Tensor:
        """Return an initial factor as in PEFT: A uniform within 1 / sqrt(in) (Kaiming's with a = sqrt(5)), B zero."""
        shape = self.shapes[name]
        if name == B:
            return key.zeros("", shape)
        bound = 1 / math.sqrt(shape[1])
        return key.uniform("", shape, -bound, bound)

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Return (left, right), whose product has the shape of the weight as stored."""
        return (a.t(), b.t()) if self.is_in_out else (b, a)

    def change(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the change of the weight, of its stored shape, computed in fp32 or better."""
        left, right = (part if part.dtype.itemsize >= 4 else part.float() for part in self.factors(a, b))
        return (left @ right) * self.size.scale

    def placements(self, cut_dim: int | None) -> dict[str, str]:
        """Return the factors' tp placements if the weight is cut along a dim; a factor that multiplies a part is cut."""
        if cut_dim is None:
            return {A: "replicate", B: "replicate"}
        of_out = (cut_dim == 0) != self.is_in_out
        return {A: "replicate" if of_out else "shard(1)", B: "shard(0)" if of_out else "replicate"}


def _is_number(given: object) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool)


def factor_path(weight: str, name: str) -> str:
    """Return the path of a factor: `q_proj.lora_A.weight` for `q_proj.weight`."""
    part, _, leaf = weight.rpartition(".")
    return join(part, name, leaf)


def part_of(weight: str) -> str:
    """Return the part a weight belongs to: `h.0.q` for `h.0.q.weight`; other names are returned unchanged."""
    return weight.removesuffix(".weight")


@dataclass(frozen=True)
class Held:
    """An adapter as a layer holds it."""

    weight: str  # its path inside the layer
    adapter: Adapter


Plan = Mapping[str, Adapter]
"""Adapters by the path of their weight."""
