"""Cross-entropy without whole logits: the numbers of the plain loss, in every engine and with I and W apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

import autofunc as af
from autofunc.errors import BatchError, ModelError
from autofunc.losses import IGNORED, causal_lm, chunked_causal_lm, lazy_logits
from autofunc.spread import spreading
from autofunc.tree import flatten
from stages.gpt2 import build_gpt2_model
from tests.cases import cut_evenly

VOCABULARY, TOKENS, ROWS = 2048, 16, 8
CHUNKED = partial(chunked_causal_lm, num_chunks=4)


@cache
def model(*, chunked: bool) -> af.Model:
    return build_gpt2_model(
        vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=8, n_layer=2, n_head=2, chunked_loss=chunked
    )  # fmt: skip


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[::3, -5:] = IGNORED
    return {"input_ids": ids[:, :-1], "labels": labels}


def pipe_of(name: str, loss: Any, *, chunked: bool, **how: Any) -> af.Pipeline:
    schedule = af.schedule.build(name, num_ranks=2, num_microbatches=4)
    return af.pipeline(cut_evenly(model(chunked=chunked), 2), schedule, loss=loss, **how)


@pytest.mark.parametrize(("name", "engine"), [("1f1b", "graph"), ("zb_h1", "graph"), ("zb_h1", "eager")])
def test_loss_and_gradients_are_those_of_whole_logits(name: str, engine: str) -> None:
    params = model(chunked=False).init(seed=1)
    loss, grads = af.reference_value_and_grad(model(chunked=False), causal_lm, 4)(params, batch())
    pipe = pipe_of(name, CHUNKED, chunked=True, engine=engine)
    found, chunked_grads = af.value_and_grad(pipe)(params, batch())
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    for path, grad in flatten(grads).items():
        torch.testing.assert_close(flatten(chunked_grads)[path], grad, rtol=1e-5, atol=1e-7, msg=path)
    torch.testing.assert_close(pipe(params, batch()), loss, rtol=1e-6, atol=0)


def test_the_plain_loop_gives_the_same_bits() -> None:
    params = model(chunked=True).init(seed=1)
    expected = af.reference_value_and_grad(model(chunked=True), CHUNKED, 4)(params, batch())
    found = af.value_and_grad(pipe_of("zb_h1", CHUNKED, chunked=True))(params, batch())
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(leaf, flatten(found[1])[path]) for path, leaf in flatten(expected[1]).items())


def test_a_forward_without_labels_gives_logits() -> None:
    params, ids = model(chunked=True).init(seed=1), {"input_ids": batch()["input_ids"]}
    found = pipe_of("1f1b", CHUNKED, chunked=True).forward(params, ids)
    assert torch.equal(found, pipe_of("1f1b", causal_lm, chunked=False).forward(params, ids))


def peak_bytes(function: Callable[[], Any]) -> int:
    """Return the most bytes allocated while it runs."""
    function()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    alive = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def test_no_logits_are_ever_whole() -> None:
    params = model(chunked=True).init(seed=1)
    logits = 4 * VOCABULARY * TOKENS * ROWS // 4  # bytes of a microbatch
    peaks, kept = [], []
    for chunked, loss in ((False, causal_lm), (True, partial(chunked_causal_lm, num_chunks=8))):
        pipe = pipe_of("zb_h1", loss, chunked=chunked)
        peaks.append(peak_bytes(lambda pipe=pipe: af.value_and_grad(pipe)(params, batch())))
        kept.append(max(pipe.measure_bytes(params, batch())[1]))
    assert peaks[0] - peaks[1] > 1.5 * logits, (peaks, logits)
    assert kept[0] - kept[1] > 0.9 * logits, (kept, logits)


def test_of_bf16_and_with_a_bias() -> None:
    generator = torch.Generator().manual_seed(2)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        leaves = [torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 5, 4), (7, 4), (7,))]
        for frozen in (None, 0, 1, 2):
            given = [leaf.clone().requires_grad_(number != frozen) for number, leaf in enumerate(leaves)]
            plain = [leaf.clone().requires_grad_(number != frozen) for number, leaf in enumerate(leaves)]
            mb = {"labels": torch.tensor([[0, 6, IGNORED, 2, 3], [1, 1, 5, IGNORED, 4]])}
            loss, weight = chunked_causal_lm(lazy_logits(given[0], given[1], mb, given[2]), mb, num_chunks=3)
            expected, count = causal_lm(functional.linear(*plain), mb)
            (2 * loss).backward()
            (2 * expected).backward()
            assert weight == count == 8 and loss.dtype == expected.dtype
            torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
            for one, other in zip(given, plain, strict=True):
                torch.testing.assert_close(one.grad, other.grad, rtol=tolerance, atol=tolerance)


def test_a_module_that_returns_them() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.block = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8)

        def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
            hidden = self.block(self.embedding(input_ids)).relu()
            return {"hidden": hidden, "weight": self.embedding.weight}

    torch.manual_seed(0)
    module = Tied()
    ids = torch.randint(0, 50, (4, 7))
    mb = {"input_ids": ids[:, :-1], "labels": ids[:, 1:].contiguous()}
    schedule = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(af.split(af.from_module(module, mb), ["block"]), schedule, loss=CHUNKED)
    loss, grads = af.value_and_grad(pipe)(pipe.init(), mb)
    outputs = module(**mb)
    expected = functional.cross_entropy((outputs["hidden"] @ outputs["weight"].t()).flatten(0, 1), mb["labels"].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for path, leaf in module.named_parameters():
        torch.testing.assert_close(flatten(grads)[path], leaf.grad)


def test_a_mask_of_the_batch() -> None:
    outputs, labels = torch.randn(2, 5, 7), torch.arange(10).view(2, 5) % 7
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 1, 0]])
    expected = causal_lm(outputs, {"labels": labels.where(mask != 0, IGNORED)})
    for given in (mask, mask.bool(), mask.float()):
        found = causal_lm(outputs, {"labels": labels, "loss_mask": given}, mask="loss_mask")
        assert found[1] == 6 and torch.equal(found[0], expected[0])
    hidden, weight = torch.randn(2, 5, 3), torch.randn(7, 3)
    mb = {"labels": labels, "loss_mask": mask}
    total, count = chunked_causal_lm({"hidden": hidden, "weight": weight}, mb, mask="loss_mask")
    assert count == 6
    torch.testing.assert_close(total, causal_lm(hidden @ weight.t(), mb, mask="loss_mask")[0])
    with pytest.raises(BatchError, match="no such entry; did you mean loss_mask"):
        causal_lm(outputs, mb, mask="los_mask")
    with pytest.raises(BatchError, match=r"has shape \(2,\), and labels \(2, 5\)"):
        causal_lm(outputs, {"labels": labels, "loss_mask": mask[:, 0]}, mask="loss_mask")
    with pytest.raises(BatchError, match=r"no .hidden. and .weight.; let its last layer return af"):
        chunked_causal_lm(outputs, mb)
    with pytest.raises(
        BatchError, match=r"causal_lm takes logits, .* has no 'logits'; af.losses.chunked_causal_lm takes what"
    ):
        causal_lm({"hidden": hidden, "weight": weight}, mb)


def test_tensor_parallel_ranks_take_the_plain_loss() -> None:
    outputs = {"hidden": torch.randn(2, 3), "weight": torch.randn(5, 3)}
    with (
        spreading(Mock()),
        pytest.raises(ModelError, match=r"cut the weight and the logits along the vocabulary.*use causal_lm"),
    ):
        chunked_causal_lm(outputs, {"labels": torch.tensor([1, 2])})
