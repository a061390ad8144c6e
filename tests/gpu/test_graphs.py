"""Steps recorded as CUDA graphs are the same steps, bit for bit; with compiled pieces inside, to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.errors import AutofuncError, ModelError
from autofunc.tree import flatten
from tests.cases import assert_same_tree, make_case
from tests.engine.test_compile import assert_close
from tests.gpu.test_laws import DEVICE, on_device, pipe_of
from tests.gpu.test_measured import pipe_of_size
from tests.runtime.test_recording import Deciding, check_steps, cut_at_transfers

pytestmark = pytest.mark.gpu


def pair_of(model_name: str, name: str, rows: int = 8, *, cut: bool = False, **options: Any) -> tuple[Any, Any, Any, Any]:
    """(recorded pipeline, the same as it is, parameters, batch)."""
    s = af.schedule.build(name, num_ranks=2, num_microbatches=4)
    model, stages, loss, batch = make_case(model_name, s.num_stages, rows)
    pair = [af.pipeline(stages, s, loss=loss, compile=each, **options) for each in ("graphs", False)]
    if cut:
        cut_at_transfers(pair[0])
    return *pair, model.init(seed=7, device=DEVICE), on_device(batch)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", ["1f1b", "zb_h1", "interleaved_1f1b"])
def test_bit_for_bit(name: str, cut: bool) -> None:
    """Several microbatches are under way; as one graph, and with transfers between graphs, as between processes."""
    check_steps(*pair_of("gpt2", name, cut=cut), moves=(3,))


@pytest.mark.parametrize("name", ["zbv", "dualpipe_v", "gpipe"])
def test_other_schedules_bit_for_bit(name: str) -> None:
    check_steps(*pair_of("mlp", name, cut=True), moves=(3,))


@pytest.mark.parametrize("remat", ["layer", "stage"])
def test_recomputed(remat: str) -> None:
    check_steps(*pair_of("gpt2", "zb_h1", remat=remat), moves=(3,))


def test_low_precision() -> None:
    pipe, plain, params, batch = pair_of("gpt2", "zb_h1", cut=True)
    low = af.tree.to_tensordict({path: leaf.bfloat16() for path, leaf in flatten(params).items()})
    check_steps(pipe, plain, low, batch, moves=(3,))


def test_batches_of_alternating_shapes() -> None:
    """They share one pool of memory."""
    pipe, plain, params, small = pair_of("gpt2", "1f1b")
    large = on_device(make_case("gpt2", 2, 16)[3])
    for batch in (small, small, small, large, large, small, small, large, large):
        expected_loss, expected = af.value_and_grad(plain)(params, batch, (3, 5))
        assert torch.equal(pipe(params, batch, (3, 5)), expected_loss)
        loss, grads = af.value_and_grad(pipe)(params, batch, (3, 5))
        assert torch.equal(loss, expected_loss)
        assert_same_tree(expected, grads)


def test_outputs_and_other_pipelines_beside_it() -> None:
    """A pipeline that is gone takes its pool with it, and no other's."""
    pipe, plain, params, batch = pair_of("mlp", "1f1b")
    expected_loss, expected = af.value_and_grad(plain)(params, batch, (3, 5))
    for _ in range(3):
        assert torch.equal(pipe.forward(params, batch), plain.forward(params, batch))
        loss, grads = af.value_and_grad(pipe)(params, batch, (3, 5))
        assert torch.equal(loss, expected_loss)
        assert_same_tree(expected, grads)
        other = pair_of("mlp", "zb_h1")[0]
        for _ in range(2):
            af.value_and_grad(other)(params, batch, (3, 5))
        other.close()
        del other


@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_compiled_inside(name: str) -> None:
    pipe, full, batch, (expected_loss, expected) = pipe_of("gpt2", name, compile="inductor+graphs")
    for _ in range(3):
        loss, grads = af.value_and_grad(pipe)(full, batch, (3, 5))
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert_close(expected, grads)


def test_profile_and_costs() -> None:
    """Of graphs, one for each action: no slower than without, up to noise."""
    recorded, plain = (pipe_of_size("zb_h1", compile=each) for each in ("graphs", False))
    pipe, params, batch = recorded
    timeline, costs = pipe.profile(params, batch, steps=3), pipe.costs(params, batch, steps=3)
    assert timeline.makespan > 0 and all(cost > 0 for cost in costs.F)
    assert sum(costs.F) < 1.2 * sum(plain[0].costs(params, batch, steps=3).F)


@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_the_allocators_peak(name: str, record_property: Any) -> None:
    """What graphs reserve is about what a step has alive at its peak, whatever the number of microbatches under way."""
    peaks = []
    for compiled in (False, "graphs"):
        pipe, params, batch = pipe_of_size(name, compile=compiled)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for _ in range(3):
            loss, grads = af.value_and_grad(pipe)(params, batch)
            del loss, grads
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if compiled:
            peaks.append(torch.cuda.memory_reserved() - before)  # pool and sums; the step left nothing else
        else:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            af.value_and_grad(pipe)(params, batch)
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - held)
        pipe.close()
        del pipe
    eager, reserved = peaks
    record_property("bytes", f"{name}: {eager:,} at the peak of a step, {reserved:,} kept by graphs")
    assert reserved <= 1.35 * eager + 64 * 2**20, f"{eager:,} at the peak of a step, {reserved:,} kept by graphs"


def test_what_is_refused() -> None:
    """Before anything is recorded, with the reason."""
    pipe, params, batch, _ = pipe_of("gpt2", "1f1b", compile="graphs")
    on_cpu = af.tree.to_tensordict({path: leaf.cpu() for path, leaf in flatten(params).items()})
    with pytest.raises(AutofuncError, match="the parameters are on cpu"):
        af.value_and_grad(pipe)(on_cpu, {name: leaf.cpu() for name, leaf in batch.items()})
    rows = {"x": torch.randn(4, 4).cuda()}
    model = af.from_module(Deciding().cuda(), rows)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    with pytest.raises(ModelError, match="branches on the data"):
        af.value_and_grad(af.pipeline(af.split(model, 2), s, compile="graphs"))(model.init(device="cuda"), rows)
