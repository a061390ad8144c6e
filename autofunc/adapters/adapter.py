"""What an adapter is, as plain data, and under what names its factors are held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from autofunc.errors import ModelError
from autofunc.random import InitKey
from autofunc.tree import join

A, B = "lora_A", "lora_B"
"""What PEFT calls the factors: the change of a weight (out, in) is scale * B @ A, with A (rank, in) and B (out, rank)."""

HELD = {A: f"@{A}", B: f"@{B}"}
"""Where a layer holds them in its own nested dicts: under a name that no parameter of its own has."""


@dataclass(frozen=True)
class Rank:
    """How large a change is, and how strong.

    Args:
        rank: columns of B, rows of A.
        alpha: the change is multiplied by alpha / rank.
        dropout: probability with which an element of what the change is multiplied by is zero.
        use_rslora: divide by the root of the rank instead (Kalajdzievski, arXiv 2312.03732).

    Raises:
        ModelError: for what is none of that.
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
        """What the product of the factors is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


@dataclass(frozen=True)
class Adapter:
    """The adapter of one weight.

    Args:
        size: how large it is.
        shape: of the weight.
        is_in_out: whether the weight is stored as (in, out), as transformers' Conv1D does; else as (out, in).
    """

    size: Rank
    shape: tuple[int, int]
    is_in_out: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the factors."""
        out, features = self.shape[::-1] if self.is_in_out else self.shape
        return {A: (self.size.rank, features), B: (out, self.size.rank)}

    def initial(self, name: str, key: InitKey) -> Tensor:
        """A factor: A as PEFT has it, uniform up to 1 / sqrt(in) (Kaiming's with a = sqrt(5)), and B zero."""
        shape = self.shapes[name]
        if name == B:
            return key.zeros("", shape)
        bound = 1 / math.sqrt(shape[1])
        return key.uniform("", shape, -bound, bound)

    def factors(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices whose product has the shape of the weight, as it is stored."""
        return (a.t(), b.t()) if self.is_in_out else (b, a)

    def change(self, a: Tensor, b: Tensor) -> Tensor:
        """The change of the weight, made in fp32 or better."""
        left, right = (part if part.dtype.itemsize >= 4 else part.float() for part in self.factors(a, b))
        return (left @ right) * self.size.scale

    def placements(self, cut_dim: int | None) -> dict[str, str]:
        """How the factors lie over tp ranks where the weight is cut along a dim: what multiplies a part is a part."""
        if cut_dim is None:
            return {A: "replicate", B: "replicate"}
        of_out = (cut_dim == 0) != self.is_in_out
        return {A: "replicate" if of_out else "shard(1)", B: "shard(0)" if of_out else "replicate"}


def _is_number(given: object) -> bool:
    return isinstance(given, (int, float)) and not isinstance(given, bool)


def factor_path(weight: str, name: str) -> str:
    """`q_proj.lora_A.weight` of `q_proj.weight`."""
    part, _, leaf = weight.rpartition(".")
    return join(part, name, leaf)


def part_of(weight: str) -> str:
    """What a weight is named by: `h.0.q` of `h.0.q.weight`, and itself where it has another name."""
    return weight.removesuffix(".weight")


@dataclass(frozen=True)
class Held:
    """An adapter as a layer holds it."""

    weight: str  # its path inside the layer
    adapter: Adapter


Plan = Mapping[str, Adapter]
"""By the path of a weight: its adapter."""
