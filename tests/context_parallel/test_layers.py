"""Layers and losses on cut tokens: sums over ranks equal the whole. Ranks are threads of one process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autofunc as af
from autofunc.context_parallel.axis import ContextAxis
from autofunc.context_parallel.specialised import over_tokens
from autofunc.errors import BatchError, ModelError
from autofunc.losses import evaluate
from autofunc.tree import flatten
from stages.gpt2 import build_gpt2_model
from stages.llama import build_llama_model
from tests.context_parallel.threads import Threads, on_ranks

TOKENS, WIDTH = 8, 6
_tracing = threading.Lock()  # fake tensors are a mode of the whole process


def batch_of(rows: int = 3, key: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 11, (rows, TOKENS + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[::2, -3:] = -100
    batch: dict[str, Any] = {"input_ids": ids[:, :-1], "labels": labels}
    batch["y"] = torch.randn(rows, TOKENS, WIDTH, generator=generator)
    batch["mask"] = torch.arange(TOKENS) < torch.tensor([5, 8, 6])[:rows, None]
    return {**batch, "key": af.random.make_key(0, 1)} if key else batch


def gradients(model: af.Model, loss: Any, batch: Mapping[str, Any], over: Callable[[Any], Any] | None) -> Any:
    """Sum, weight and aux of the loss, and gradients of its sum; over the ranks of the axis that `over` returns."""
    flat = {path: leaf.detach().clone().double().requires_grad_() for path, leaf in flatten(model.init()).items()}
    leaves = {path: model.lookup(flat, path) for path in model.spec}
    with _tracing:
        made: Any = model.specialise(batch, {path: leaf.dtype for path, leaf in flat.items()})
        if over is not None:
            made = over_tokens(made, model, leaves, batch, over("axis")).with_loss(loss, batch, lambda x: x)
    x, _ = made.run(list(model.layers), model.layer_trees(leaves), None, batch)
    terms = evaluate(loss, x, batch) if over is None else made.loss_terms(x, batch)
    grads = torch.autograd.grad(terms.sum, list(flat.values()), allow_unused=True)
    return terms, [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(flat.values(), grads, strict=True)]


def check(
    model: af.Model, loss: Any, batch: Mapping[str, Any], size: int = 2, method: str = "allgather", exact: float = 1e-12
) -> Counter[str]:  # fmt: skip
    """Compare with the whole; return the counts of one rank's exchanges."""
    whole, expected = gradients(model, loss, batch, None)

    def run(ranks: Threads, name: str) -> Any:
        return gradients(model, loss, batch, lambda _: ContextAxis(name, size, method))

    found, counts = on_ranks(size, run)
    torch.testing.assert_close(sum(terms.sum for terms, _ in found), whole.sum, rtol=exact, atol=exact)
    assert sum(terms.weight.item() for terms, _ in found) == whole.weight.item()
    for place, each in enumerate(expected):
        torch.testing.assert_close(sum(grads[place] for _, grads in found), each, rtol=100 * exact, atol=exact)
    for terms, _ in found:
        torch.testing.assert_close(terms.aux, whole.aux)
    return counts[0]


# --- models of stages/


@pytest.mark.parametrize("method", ["allgather", "ring"])
@pytest.mark.parametrize("size", [2, 4])
def test_llama(size: int, method: str) -> None:
    model = build_llama_model(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    counts = check(model, af.losses.causal_lm, batch_of(), size, method)
    if method == "allgather":  # per layer: one in the forward; one in the backward, and one for gradients
        assert counts == {"gather": 4, "reduce_scatter": 2}
    else:
        assert counts == {"rotate": 2 * (3 * size - 2)}


def test_a_sliding_window() -> None:
    model = build_llama_model(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, sliding_window=3
    )
    assert check(model, af.losses.causal_lm, batch_of(), method="ring") == {"rotate": 4}


def test_dropout_everywhere() -> None:
    """Attention with dropout on its weights is written out, and its products gather."""
    model = build_gpt2_model(
        vocab_size=11, n_positions=TOKENS, n_embd=8, n_layer=1, n_head=2, embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.1
    )
    assert check(model, af.losses.causal_lm, batch_of(key=True)) == {"gather": 2, "reduce_scatter": 2}


def test_a_loss_that_keeps_no_logits() -> None:
    model = build_gpt2_model(vocab_size=11, n_positions=TOKENS, n_embd=8, n_layer=1, n_head=2, chunked_loss=True)
    check(model, af.losses.chunked_causal_lm, batch_of())


# --- toys


def toy(middle: Callable[[Mapping[str, Tensor], Tensor, Mapping[str, Any]], Any]) -> af.Model:
    """An embedding, followed by a function of (rows, tokens, width) with parameters."""

    def embed(key: af.random.InitKey) -> dict[str, Tensor]:
        return {"weight": key.normal("weight", (11, WIDTH))}

    def init(key: af.random.InitKey) -> dict[str, Tensor]:
        return {
            "weight": key.normal("weight", (WIDTH, WIDTH)),
            "bias": key.normal("bias", (WIDTH,)),
            "table": key.normal("table", (2 * TOKENS, 2)),
        }

    layers = {
        "embed": af.Layer(embed, lambda p, x, batch: functional.embedding(batch["input_ids"], p["weight"])),
        "middle": af.Layer(init, middle),
    }
    return af.Model(layers)


def linear(p: Mapping[str, Tensor], x: Tensor, batch: Any = None) -> Tensor:
    return functional.linear(x, p["weight"], p["bias"])


def heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 2, WIDTH // 2).transpose(1, 2)


def distances() -> Tensor:
    place = torch.arange(TOKENS)
    return place[:, None] - place + TOKENS


def biased_attention(p: Mapping[str, Tensor], x: Tensor, batch: Any) -> Tensor:
    """Attention with a trained bias by distance, as in T5, and padded keys."""
    bias = functional.embedding(distances(), p["table"]).permute(2, 0, 1)[None]
    bias = bias.masked_fill(~batch["mask"][:, None, None, :], -1e9)
    q = heads(linear(p, x))
    return functional.scaled_dot_product_attention(q, q * 0.5, heads(x), bias.to(q.dtype)).transpose(1, 2).flatten(2)


def written_out_attention(p: Mapping[str, Tensor], x: Tensor, batch: Any) -> Tensor:
    q = heads(linear(p, x))
    scores = torch.einsum("bnth,bnsh->bnts", q, q * 0.5)
    scores = scores.masked_fill(distances() < TOKENS, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ heads(x)).transpose(1, 2).reshape(x.shape)


def pooled(p: Mapping[str, Tensor], x: Tensor, batch: Any) -> Tensor:
    """Pool by the first token, the last, and the mean of those that are not padding."""
    counts = batch["mask"].unsqueeze(-1).to(x.dtype)
    mean = (linear(p, x) * counts).sum(1) / counts.sum(1)
    return linear(p, x[:, 0] + mean * torch.tanh(x[:, -1]))


def extremes(p: Mapping[str, Tensor], x: Tensor, batch: Any) -> Tensor:
    spread = x.amax(1) - x.amin(1, keepdim=True)[:, 0]
    return linear(p, x.logsumexp(1)) + spread * x.max() * (x > 2).any(1)


def squared_error(outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
    return functional.mse_loss(outputs, batch["y"].to(outputs.dtype))


def of_rows(outputs: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, float]:
    return (outputs * batch["y"][:, 0].to(outputs.dtype)).sum(), 3.0


def shifted(outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Shift labels as transformers does: padded at the end, then cut off at the start."""
    labels = functional.pad(batch["input_ids"] % WIDTH, (0, 1), value=-100)[..., 1:]
    return functional.cross_entropy(outputs.flatten(0, 1), labels.reshape(-1), weight=torch.arange(1.0, 7.0).double())


def smoothed(outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Classes in dim 1, as in segmentation."""
    return functional.cross_entropy(outputs.transpose(1, 2), batch["input_ids"] % WIDTH, label_smoothing=0.1)


def with_aux(outputs: Tensor, batch: Mapping[str, Any]) -> Any:
    right = outputs.detach().argmax(-1) == batch["input_ids"]
    total = (outputs * batch["mask"].unsqueeze(-1)).square().sum()
    return total, batch["mask"].sum(), {"right": right, "share": right.double().mean(), "number": 3}


@pytest.mark.parametrize(
    ("middle", "loss"),
    [
        (biased_attention, squared_error), (written_out_attention, squared_error), (pooled, of_rows), (linear, shifted),
        (linear, smoothed), (linear, with_aux), (extremes, of_rows),
    ],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_toys(middle: Any, loss: Any) -> None:
    check(toy(middle), loss, batch_of())


class Encoder(nn.Module):
    """A captured module with torch's own attention and a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, WIDTH)
        self.places = nn.Embedding(TOKENS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        q = heads(self.norm(x))
        y = functional.scaled_dot_product_attention(q, q, q, mask[:, None, None, :])
        made: Tensor = self.out(x + y.transpose(1, 2).flatten(2))
        return made


def test_a_captured_module() -> None:
    torch.manual_seed(0)
    model = af.from_module(Encoder(), batch_of())
    assert check(model, squared_error, batch_of(), method="ring") == {"rotate": 4}


class Decoder(Encoder):
    """Looks up the labels written one place further, and a bias by distance."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(2 * TOKENS, 2)

    def forward(self, labels: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        ids = labels.new_zeros(labels.shape)
        ids[:, 1:] = labels[:, :-1].clamp(min=0)
        ids[:, 0] = 1
        x = self.words(ids)
        place = torch.arange(labels.shape[1])
        bias = self.bias(place[:, None] - place + TOKENS).permute(2, 0, 1)[None]
        bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)
        q = heads(self.norm(x))
        y = functional.scaled_dot_product_attention(q, q, q, bias)
        made: Tensor = self.out(x + y.transpose(1, 2).flatten(2))
        return made


def test_as_many_rows_as_tokens() -> None:
    """A table of distances then has the batch's shape; only what depends on the batch counts as tokens."""
    torch.manual_seed(0)
    batch = {name: entry.repeat(3, *[1] * (entry.dim() - 1))[:TOKENS] for name, entry in batch_of().items()}
    assert check(af.from_module(Decoder(), batch), squared_error, batch, method="ring") == {"rotate": 4}


# --- refusals


def refused(middle: Any, loss: Any = squared_error, batch: Mapping[str, Any] | None = None) -> str:
    def run(ranks: Threads, name: str) -> Any:
        return gradients(toy(middle), loss, batch or batch_of(), lambda _: ContextAxis(name, 2, "ring"))

    with pytest.raises((ModelError, BatchError)) as error:
        on_ranks(2, run)
    return str(error.value)


def convolved(p: Mapping[str, Tensor], x: Tensor, batch: Any) -> Tensor:
    return functional.conv1d(x.transpose(1, 2), p["weight"].unsqueeze(-1)).transpose(1, 2)


def cumulated(p: Mapping[str, Tensor], x: Tensor, batch: Any) -> Tensor:
    return x.cumsum(1)


def windowed(p: Mapping[str, Tensor], x: Tensor, batch: Any) -> Tensor:
    return linear(p, x.view(x.shape[0], 2, TOKENS // 2, WIDTH)).flatten(1, 2)


def reversed_tokens(p: Mapping[str, Tensor], x: Tensor, batch: Any) -> Tensor:
    return x.flip(1)


@pytest.mark.parametrize(
    ("middle", "operator"),
    [(convolved, "aten.conv1d"), (cumulated, "aten.cumsum"), (windowed, "aten.view"), (reversed_tokens, "aten.flip")],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_mixing_tokens_is_refused(middle: Any, operator: str) -> None:
    message = refused(middle)
    assert message.startswith(f"layer 'middle' runs {operator}"), message
    assert "test_layers.py, line" in message and "cut over cp=2 ranks" in message and "use cp=1" in message


def test_a_loss_that_shifts_outputs_is_refused() -> None:
    def loss(outputs: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return functional.cross_entropy(outputs[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten() % WIDTH)

    assert refused(linear, loss).startswith("the loss runs aten.slice")


def test_a_length_that_does_not_divide_is_refused() -> None:
    short = {name: entry[:, :6] if entry.dim() > 1 else entry for name, entry in batch_of().items()}
    assert "its sequence has 6 tokens, which cp=2 ranks cannot cut" in refused(linear, squared_error, short)


def test_a_model_without_tokens_is_refused() -> None:
    layer = af.Layer(lambda key: {"w": key.normal("w", (4, 4))}, lambda p, x, batch: batch["x"] @ p["w"])

    def run(ranks: Threads, name: str) -> Any:
        batch, loss = {"x": torch.randn(3, 4)}, lambda outputs, batch: outputs.mean()
        return gradients(af.Model({"one": layer}), loss, batch, lambda _: ContextAxis(name, 2, "ring"))

    with pytest.raises(ModelError, match="no layer looks up or projects an entry of the batch with tokens in dim 1"):
        on_ranks(2, run)
