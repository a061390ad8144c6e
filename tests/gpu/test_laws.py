"""On one accelerator a pipeline is the plain microbatch loop, bit for bit; compiled, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc.tree import flatten
from tests.cases import assert_same_tree, make_case
from tests.engine.test_compile import assert_close

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SCHEDULES = af.schedule.names()


def on_device(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.to(DEVICE) for name, leaf in batch.items()}


def pipe_of(model_name: str, name: str, **options: Any) -> tuple[Any, Any, dict[str, Tensor], tuple[Tensor, Any]]:
    """(pipeline, parameters, batch, what the plain loop gives with the key (3, 5))."""
    s = af.schedule.build(name, num_ranks=2, num_microbatches=4)
    model, stages, loss, batch = make_case(model_name, s.num_stages, 8)
    batch, full = on_device(batch), model.init(seed=7, device=DEVICE)
    expected = af.reference_value_and_grad(model, loss, 4)(full, batch, (3, 5))
    return af.pipeline(stages, s, loss=loss, **options), full, batch, expected


@pytest.mark.parametrize("engine", ["eager", "graph"])
@pytest.mark.parametrize("model_name", ["mlp", "gpt2"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_bit_for_bit(name: str, model_name: str, engine: str) -> None:
    pipe, full, batch, (expected_loss, expected) = pipe_of(model_name, name, engine=engine)
    for _ in range(2):
        loss, grads = af.value_and_grad(pipe)(pipe.place(full), batch, (3, 5))
        assert loss.device.type == "cuda"
        assert torch.equal(loss, expected_loss)
        assert_same_tree(expected, grads)


@pytest.mark.parametrize("remat", ["layer", "stage"])
@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_recomputed(name: str, remat: str) -> None:
    pipe, full, batch, (expected_loss, expected) = pipe_of("gpt2", name, remat=remat)
    loss, grads = af.value_and_grad(pipe)(full, batch, (3, 5))
    assert torch.equal(loss, expected_loss)
    assert_same_tree(expected, grads)


@pytest.mark.parametrize("model_name", ["mlp", "gpt2"])
@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "zbv"])
def test_compiled(name: str, model_name: str) -> None:
    pipe, full, batch, (expected_loss, expected) = pipe_of(model_name, name, compile=True)
    for _ in range(2):
        loss, grads = af.value_and_grad(pipe)(full, batch, (3, 5))
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert_close(expected, grads)


@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_bf16_parameters(name: str) -> None:
    """Gradients are added up in fp32, as in the loop."""
    s = af.schedule.build(name, num_ranks=2, num_microbatches=4)
    model, stages, loss, batch = make_case("gpt2", 2, 8)
    batch, full = on_device(batch), model.init(seed=7, device=DEVICE, dtype=torch.bfloat16)
    expected_loss, expected = af.reference_value_and_grad(model, loss, 4)(full, batch, (3, 5))
    found_loss, found = af.value_and_grad(af.pipeline(stages, s, loss=loss))(full, batch, (3, 5))
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)


def test_the_same_weights_and_dropout_as_on_the_cpu() -> None:
    """They depend on seed, step and name alone. Sums are in another order, so the rest is equal to rounding."""
    model, _, loss, batch = make_case("gpt2", 2, 8)
    here, there = model.init(seed=7), model.init(seed=7, device=DEVICE)
    for path, leaf in flatten(here).items():
        torch.testing.assert_close(leaf, flatten(there)[path].cpu(), rtol=1e-6, atol=1e-7, msg=path)
    step = af.reference_value_and_grad(model, loss, 4)
    on_cpu, on_gpu = step(here, batch, (3, 5)), step(there, on_device(batch), (3, 5))
    torch.testing.assert_close(on_cpu[0], on_gpu[0].cpu(), rtol=1e-5, atol=0)
    assert_close(on_cpu[1], on_gpu[1].cpu())


def test_a_batch_on_the_cpu_is_refused() -> None:
    pipe, full, batch, _ = pipe_of("gpt2", "1f1b")
    with pytest.raises(af.errors.BatchError, match="'input_ids' is on cpu, but the parameters are on cuda:0"):
        af.value_and_grad(pipe)(full, {name: leaf.cpu() for name, leaf in batch.items()})


def test_outputs_forward_only() -> None:
    pipe, full, batch, (expected_loss, _) = pipe_of("mlp", "interleaved_1f1b")
    assert torch.equal(pipe(full, batch, (3, 5)), expected_loss)
    assert pipe.forward(full, batch).shape == (8, 3)


def test_optimizer_step() -> None:
    pipe, full, batch, _ = pipe_of("gpt2", "1f1b")
    opt = af.optimizer(torch.optim.AdamW, lr=1e-2)
    state, losses = opt.init(full), []
    for step in range(5):
        loss, grads = af.value_and_grad(pipe)(full, batch, (0, step))
        grads, norm = pipe.clip(grads, 1.0)
        assert norm.device.type == "cuda"
        full, state = opt.update(grads, state, full)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_low_precision_is_added_by_the_product() -> None:
    """Of compiled pieces: not rounded to bf16 first, so nearer to what exact products give."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator, device=DEVICE).bfloat16() for _ in range(2))
    total = torch.randn(512, 512, generator=generator, device=DEVICE)
    exact, rounded, found = total.double() + left.double() @ right.double(), total + left @ right, total.clone()
    torch.ops.autofunc.add_product_(found, left, right)
    assert (found - exact).abs().max() < 0.05 * (rounded - exact).abs().max()


@pytest.mark.parametrize("compiled", [True, "inductor+graphs"])
def test_compiled_bf16_gradients(compiled: Any) -> None:
    from tests.gpu.test_measured import pipe_of_size

    pipe, params, batch = pipe_of_size("zb_h1", 2, 4)
    _, exact = af.value_and_grad(pipe)(params, batch)
    low = af.tree.to_tensordict({path: leaf.bfloat16() for path, leaf in flatten(params).items()})
    errors = []
    for choice in (False, compiled):
        step = af.value_and_grad(pipe_of_size("zb_h1", 2, 4, compile=choice)[0])
        for _ in range(3):
            _, found = step(low, batch)
        pairs = zip(flatten(exact).values(), flatten(found).values(), strict=True)
        errors.append(sum(float((left - right).square().sum()) for left, right in pairs) ** 0.5)
    assert errors[1] < 1.02 * errors[0], "compiled pieces are no worse than the loop"
