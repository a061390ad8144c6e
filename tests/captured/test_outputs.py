"""Outputs of a forward: containers of any kind, caches, and losses whose shapes torch thinks depend on data."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree
from transformers import LlamaConfig, LlamaForCausalLM

import autofunc as af
from autofunc.errors import ModelError, SplitError
from tests.captured.laws import close, plain_loop


class Result:
    """A plain object."""

    def __init__(self, hidden: Tensor, y: Tensor) -> None:
        self.hidden, self.parts, self.note = hidden, {"y": y}, "a result"

    @property
    def y(self) -> Tensor:
        return self.parts["y"]


class Keyless(OrderedDict[str, Tensor]):
    """Registered with torch, without names for its children."""

    @property
    def y(self) -> Tensor:
        return self["y"]


_pytree.register_pytree_node(
    Keyless,
    lambda made: (list(made.values()), list(made)),
    lambda values, names: Keyless(zip(names, values, strict=True)),
)

OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "namespace": lambda h, y: SimpleNamespace(hidden=[h], y=y),
    "object": Result,
    "without keys": lambda h, y: Keyless(hidden=h, y=y),
    "object in a dict": lambda h, y: {"inner": SimpleNamespace(y=y), "hidden": h},
}


class Returning(nn.Module):
    def __init__(self, returned: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layers, self.returned = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)]), returned

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.layers[0](x))
        return self.returned(h, self.layers[2](torch.tanh(self.layers[1](h))))


def of_y(outputs: Any, microbatch: Mapping[str, Any]) -> Tensor:
    inner = outputs["inner"] if type(outputs) is dict else outputs
    return inner.y.square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", OUTPUTS)
def test_containers(name: str) -> None:
    torch.manual_seed(0)
    module, batch = Returning(OUTPUTS[name]), {"x": torch.randn(4, 6)}
    model = af.from_module(module, batch, verify=True)
    stages = af.split(model, ["layers.1", "layers.2"])
    pipe = af.pipeline(stages, af.schedule.build("1f1b", num_ranks=3, num_microbatches=2), loss=of_y)
    params = pipe.init()
    loss, grads = af.value_and_grad(pipe)(params, batch)
    expected_loss, expected = plain_loop(module, lambda module, each: module(**each), batch, 2, of_y)
    torch.testing.assert_close(loss, expected_loss)
    close(grads, expected)


def test_caches_are_dropped() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
            self.lm = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))

        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return self.lm(input_ids=input_ids, labels=labels)

    torch.manual_seed(0)
    module, ids = Wrapper(), torch.randint(3, 32, (4, 6))
    batch = {"input_ids": ids, "labels": ids}
    model = af.from_module(module, batch)
    assert len(model.notes) == 1 and "cache of keys and values" in model.notes[0]
    pipe = af.pipeline(af.split(model, 2), af.schedule.build("1f1b", num_ranks=2, num_microbatches=2))
    loss, _ = af.value_and_grad(pipe)(pipe.init(), batch)
    torch.testing.assert_close(loss, module(**batch).loss.detach())


def test_ctc() -> None:
    """Its shapes depend on the longest target, which is known."""

    def ctc(outputs: Any, microbatch: Mapping[str, Any]) -> tuple[Tensor, int]:
        log_probs = outputs["inner"].y.log_softmax(-1).transpose(0, 1)
        steps, rows = log_probs.shape[:2]
        lengths = [int(3 - row % 2) for row in range(rows)]
        return nn.functional.ctc_loss(log_probs, microbatch["text"], (steps,) * rows, lengths, reduction="sum"), rows

    torch.manual_seed(0)
    module = Returning(OUTPUTS["object in a dict"])
    batch = {"x": torch.randn(4, 9, 6), "text": torch.randint(1, 6, (4, 3))}
    expected_loss, expected = plain_loop(module, lambda module, each: module(each["x"]), batch, 2, ctc)
    for engine in ("eager", "graph"):
        stages = af.split(af.from_module(module, batch, inputs=["x"]), ["layers.1"])
        s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2)
        pipe = af.pipeline(stages, s, loss=ctc, engine=engine)
        loss, grads = af.value_and_grad(pipe)(pipe.init(), batch)
        torch.testing.assert_close(loss, expected_loss)
        close(grads, expected)


# --- what the data decides --------------------------------------------------------------------------------------------

CHOSEN: dict[str, Callable[[Tensor], Tensor]] = {
    "a mask": lambda h: h[h[:, 0] > 0],
    "nonzero": lambda h: h[(h[:, 0] > 0).nonzero()[:, 0]],
    "where": lambda h: h[torch.where(h[:, 0] > 0)[0]],
    "masked_select": lambda h: h.masked_select(h[:, :1] > 0),
    "unique": lambda h: h.round().unique(dim=0),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_shapes_that_depend_on_data(name: str) -> None:
    module = Returning(lambda h, y: CHOSEN[name](y).sum())
    for layer in module.layers:
        nn.init.zeros_(layer.bias)
    x = torch.randn(1, 6) * torch.tensor([[-1.0], [1.0], [1.0], [1.0]])  # so that what is chosen differs from row to row
    with pytest.raises(ModelError, match=r"the data decides how many rows (aten\.\w+.*|a mask) makes .*test_outputs.py"):
        af.from_module(module, {"x": x})


def test_transforms_inside() -> None:
    module = Returning(lambda h, y: torch.autograd.grad(y.sum(), h, create_graph=True)[0])
    with pytest.raises(ModelError, match=r"differentiates inside its forward .*test_outputs.py"):
        af.from_module(module, {"x": torch.randn(4, 6)})


def test_data_is_detached() -> None:
    module = Returning(lambda h, y: SimpleNamespace(y=y / h.data.norm()))
    af.from_module(module, {"x": torch.randn(4, 6)}, verify=True)


# --- where to cut -----------------------------------------------------------------------------------------------------


class Again(nn.Module):
    """One block that runs several times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(6):
            x = x + torch.tanh(self.block(x))
        return self.head(x)  # type: ignore[no-any-return]


def test_a_block_that_runs_several_times() -> None:
    torch.manual_seed(0)
    module, batch = Again(), {"x": torch.randn(4, 6)}
    model = af.from_module(module, batch)
    expected_loss, expected = plain_loop(
        module, lambda module, each: module(**each), batch, 2, lambda out, mb: out.square().mean()
    )
    for points in (["block@3"], ["block@1", "block@4", "head"], 4):
        stages = af.split(model, points)
        s = af.schedule.build("zb_h1", num_ranks=len(stages), num_microbatches=2)
        pipe = af.pipeline(stages, s, loss=lambda out, mb: out.square().mean())
        loss, grads = af.value_and_grad(pipe)(pipe.init(), batch)
        torch.testing.assert_close(loss, expected_loss)
        close(grads, expected)
    with pytest.raises(SplitError, match=r"'block' runs 6 times.*block@1 to block@6"):
        af.split(model, ["block"])
    with pytest.raises(SplitError, match=r"at most, not 12; they may begin at .*block@6.* Refused: .*runs 6 times"):
        af.split(model, 12)
