"""Modules that each break one rule, and the finding expected of each."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(seed))


class Sound(nn.Module):
    """Breaks no rule: two blocks and a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.build()

    def build(self) -> None:
        """Faults override this."""

    def hidden(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x

    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return {"loss": h.square().mean(), "h": h}


class Unregistered(Sound):
    def build(self) -> None:
        self.extra = [torch.ones(6, requires_grad=True)]

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x) * self.extra[0]


class PlainList(Sound):
    def build(self) -> None:
        self.more = [nn.Linear(6, 6)]

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(self.more[0](x))


class NoDim(Sound):
    def build(self) -> None:
        self.scale = nn.Parameter(torch.tensor(2.0))

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x) * self.scale


class Strided(Sound):
    def build(self) -> None:
        self.weight = nn.Parameter(torch.randn(6, 6).t())

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x) @ self.weight


class Mixed(Sound):
    def build(self) -> None:
        self.blocks[0].weight.data = self.blocks[0].weight.data.double()

    def hidden(self, x: Tensor) -> Tensor:
        first, second = self.blocks
        return torch.tanh(second(functional.linear(x.double(), first.weight).float() + first.bias))


class Elsewhere(Sound):
    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x) @ self.blocks[0].weight


class UnderNoGrad(Sound):
    def hidden(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.blocks[1].weight.mul_(0.5)
        return super().hidden(x)


class Clamp(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class ThroughData(Sound):
    def build(self) -> None:
        self.blocks[1] = Clamp(6, 6)


class Aliased(Sound):
    """Also keeps registered modules in a list."""

    def build(self) -> None:
        self.kept = [self.blocks[1].bias, self.blocks[0]]

    def hidden(self, x: Tensor) -> Tensor:
        for leaf in (self.kept[0], self.kept[1].weight):
            leaf.data.add_(1)
        return super().hidden(x)


class Undone(Sound):
    """Writes to a parameter, and undoes it before it ends."""

    def hidden(self, x: Tensor) -> Tensor:
        weight = self.blocks[0].weight
        kept = weight.data.clone()
        weight.data.add_(1)
        h = super().hidden(x)
        weight.data.copy_(kept)
        return h


class MaxNorm(Sound):
    """Uses an operator that writes without declaring it."""

    def build(self) -> None:
        self.table = nn.Embedding(5, 6, max_norm=0.1)

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x + self.table(torch.tensor([1])))


class ThroughNumpy(Sound):
    def hidden(self, x: Tensor) -> Tensor:
        self.blocks[0].bias.detach().numpy()[0] += 1
        return super().hidden(x)


class Replaced(Sound):
    def hidden(self, x: Tensor) -> Tensor:
        self.blocks[0].bias = nn.Parameter(torch.zeros(6))
        return super().hidden(x)


class NoLoss(Sound):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return self.hidden(x), None


class LossPerRow(Sound):
    def forward(self, x: Tensor) -> Any:
        return {"loss": self.hidden(x).mean(-1)}


class Detached(Sound):
    def forward(self, x: Tensor) -> Any:
        return {"loss": self.hidden(x).detach().mean()}


class NotFinite(Sound):
    def forward(self, x: Tensor) -> Any:
        return {"loss": (self.hidden(x) / 0).mean()}


class Summed(Sound):
    def forward(self, x: Tensor) -> Any:
        return {"loss": self.hidden(x).square().sum()}


class Tokens(Sound):
    """A mean over all labels that are not -100."""

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.hidden(x)
        return {"loss": functional.cross_entropy(logits.flatten(0, -2), labels.flatten()), "logits": logits}


class Shifting(Sound):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.hidden(x)
        return {"loss": functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}


class Breaks(Sound):
    def forward(self, x: Tensor) -> Any:
        return self.hidden(x.view(-1, 7))


class Stores(Sound):
    def hidden(self, x: Tensor) -> Tensor:
        x, before = super().hidden(x), getattr(self, "last", None)
        self.last = x.detach()
        return x if before is None else x + before.mean()  # type: ignore[no-any-return]


class GrowsInside(Sound):
    """A list grows inside an object that is an attribute."""

    def build(self) -> None:
        self.cache = SimpleNamespace(seen=[])

    def hidden(self, x: Tensor) -> Tensor:
        self.cache.seen.append(x.shape)
        return super().hidden(x) * len(self.cache.seen)


class WritesInPlace(Sound):
    """A tensor that is neither parameter nor buffer."""

    def build(self) -> None:
        self.mean = [torch.zeros(6)]

    def hidden(self, x: Tensor) -> Tensor:
        h = super().hidden(x)
        self.mean[0].mul_(0.9).add_(h.mean(0))
        return h


class NotesInConfig(Sound):
    def build(self) -> None:
        self.config = SimpleNamespace(width=None)

    def hidden(self, x: Tensor) -> Tensor:
        self.config.width = x.shape[1]
        return super().hidden(x)


CALLS: list[int] = []
STASH: dict[str, Tensor] = {}


class CountsOutside(Sound):
    def hidden(self, x: Tensor) -> Tensor:
        CALLS.append(1)
        return super().hidden(x) * len(CALLS)


class FromStash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        STASH["x"] = x.detach()
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * STASH["x"] * grad


class Stashes(Sound):
    """Its backward uses what the last forward left outside the module."""

    def hidden(self, x: Tensor) -> Tensor:
        return FromStash.apply(super().hidden(x))  # type: ignore[no-any-return, no-untyped-call]


class Alternating(nn.Module):
    """Its result depends on how many layers ran before it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(1)
        return torch.sin(self.inner(x) * (1.0 + len(CALLS) % 2))


class Alternates(Sound):
    def build(self) -> None:
        CALLS.clear()
        self.blocks = nn.ModuleList([Alternating(), Alternating()])


class PlainFloat(Sound):
    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x) * float(x.abs().mean())


class Skips(Sound):
    """Skips layers at random, with Python's generator."""

    def hidden(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if random.random() < 0.8:
                x = torch.tanh(block(x))
        return x


class OnePlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return {"loss": self.only(x).square().mean()}


class SharedMemory(Sound):
    def build(self) -> None:
        self.blocks[1].weight = nn.Parameter(self.blocks[0].weight.data)


class Centring(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Centred(Sound):
    def build(self) -> None:
        self.centre = Centring()

    def hidden(self, x: Tensor) -> Tensor:
        return self.centre(super().hidden(x))


class Contrastive(Sound):
    def forward(self, x: Tensor) -> Any:
        h = self.hidden(x)
        return {"loss": functional.cross_entropy(h @ x.T, torch.arange(len(x)))}


class FixedRows(Sound):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.view(4, 6))


class Positions(Sound):
    def forward(self, x: Tensor, positions: Tensor) -> Any:
        return super().forward(x + positions)


class Scaled(nn.Module):
    """A module without an initialiser."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class NoInitialiser(Sound):
    def build(self) -> None:
        self.blocks.append(Scaled())


@dataclass(frozen=True)
class Fault:
    """A module, and the finding that a check must report."""

    build: Callable[[], nn.Module]
    code: str
    status: str
    cls: type | None
    message: str
    batch: Mapping[str, Any] = field(default_factory=lambda: {"x": rows(6)})
    options: Mapping[str, Any] = field(default_factory=dict)


LABELS = torch.randint(0, 6, (4, 5), generator=torch.Generator().manual_seed(0))
TOKENS = {"x": rows(5, 6), "labels": LABELS}


def _with_config(config: Any) -> nn.Module:
    module = Sound()
    module.config = config
    return module


FAULTS = {
    "unregistered": Fault(Unregistered, "C1", "fail", Unregistered, "'extra' holds a tensor that requires a gradient"),
    "plain list": Fault(PlainList, "C1", "fail", PlainList, "nn.ModuleList"),
    "no dim": Fault(NoDim, "C1", "warn", NoDim, "'scale' is 0-dim"),
    "strided": Fault(Strided, "C1", "fail", Strided, "'weight' is not contiguous"),
    "mixed": Fault(Mixed, "C1", "fail", None, "several dtypes"),
    "elsewhere": Fault(Elsewhere, "C1", "warn", Elsewhere, "reads 'blocks.0.weight' while 'blocks.0'"),
    "under no_grad": Fault(UnderNoGrad, "C2", "fail", UnderNoGrad, "'blocks.1.weight' (mul_; "),
    "through data": Fault(ThroughData, "C2", "fail", Clamp, "'blocks.1.weight' (clamp_; "),
    "aliased": Fault(Aliased, "C2", "fail", Aliased, "'blocks.1.bias' (add_; "),
    "undone": Fault(Undone, "C2", "fail", Undone, "'blocks.0.weight' (add_; "),
    "max norm": Fault(MaxNorm, "C2", "fail", None, "'table.weight' (embedding; "),
    "through numpy": Fault(ThroughNumpy, "C2", "fail", ThroughNumpy, "outside of torch's operators writes"),
    "replaced": Fault(Replaced, "C2", "fail", Replaced, "replaces the parameter 'blocks.0.bias'"),
    "no loss": Fault(NoLoss, "C3", "fail", NoLoss, "Forward takes 'labels', which the batch does not have"),
    "loss per row": Fault(LossPerRow, "C3", "fail", LossPerRow, "floating-point scalar"),
    "detached": Fault(Detached, "C3", "fail", Detached, "no gradient"),
    "not finite": Fault(NotFinite, "C3", "fail", NotFinite, "the loss is "),
    "summed": Fault(Summed, "C3", "warn", Summed, "is a sum over rows"),
    "tokens": Fault(Tokens, "C3", "warn", Tokens, "is a mean over labels", TOKENS),
    "shifting": Fault(Shifting, "C3", "warn", Shifting, "shifts 'labels' itself", TOKENS),
    "breaks": Fault(Breaks, "C3", "fail", Breaks, "does not run on this batch: forward raises RuntimeError"),
    "stores": Fault(Stores, "C4", "fail", Stores, "stores last"),
    "grows inside": Fault(GrowsInside, "C4", "fail", GrowsInside, "stores cache"),
    "writes in place": Fault(WritesInPlace, "C4", "fail", WritesInPlace, "stores mean"),
    "notes in config": Fault(NotesInConfig, "C4", "pass", NotesInConfig, "plain value inside config, which is put back"),
    "counts outside": Fault(CountsOutside, "C4", "fail", CountsOutside, "two forwards in a row"),
    "stashes": Fault(Stashes, "C4", "fail", Stashes, "if the next microbatch's forward runs before the backward"),
    "alternates": Fault(Alternates, "C4", "fail", Alternating, "if layers are rerun for them"),
    "no config": Fault(Sound, "C5", "fail", Sound, "no attribute 'config'", options={"registry": True}),
    "odd config": Fault(lambda: _with_config({"a": object()}), "C5", "fail", Sound, "written", options={"registry": True}),
    "plain float": Fault(PlainFloat, "P1", "fail", PlainFloat, "makes a plain float from data"),
    "skips": Fault(Skips, "P1", "fail", Skips, "draws from Python's random"),
    "one place": Fault(OnePlace, "P1", "fail", OnePlace, "no second stage can begin anywhere"),
    "shared memory": Fault(SharedMemory, "P2", "warn", SharedMemory, "are different parameters in the same memory"),
    "centred": Fault(Centred, "P3", "fail", Centring, "output.h"),
    "contrastive": Fault(Contrastive, "P3", "fail", Contrastive, "the loss of the batch"),
    "fixed rows": Fault(FixedRows, "P3", "fail", FixedRows, "but not on a part of it"),
    "positions": Fault(
        Positions, "P4", "warn", None, "'positions' of shape (6,) goes whole", {"x": rows(6), "positions": torch.ones(6)},
        {"rows": 4},
    ),
    "no tensor": Fault(Sound, "P4", "fail", None, "expected a tensor", {"x": rows(6), "ids": rows(1).numpy()}),
    "no initialiser": Fault(NoInitialiser, "P5", "warn", Scaled, "Scaled has no reset_parameters"),
}  # fmt: skip
"""Faults by name."""
