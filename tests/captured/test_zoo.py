"""Unmodified models of `transformers`, split by one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import autofunc as af
from tests.captured.laws import check_layouts
from tests.captured.zoo import ZOO
from tests.cases import assert_same_tree, pp_mesh
from tests.pool import WorkerPool

LAYOUTS = [(2, "1f1b"), (3, "zb_h1"), (4, "1f1b")]
REST = [(2, "zb_h1"), (3, "1f1b"), (4, "zb_h1")]


@pytest.mark.parametrize("name", ZOO)
def test_equal_to_the_plain_loop(name: str) -> None:
    build, batch = ZOO[name]
    check_layouts(build(), batch(), LAYOUTS)


@pytest.mark.full
@pytest.mark.parametrize("name", ZOO)
def test_equal_to_the_plain_loop_in_other_layouts(name: str) -> None:
    build, batch = ZOO[name]
    check_layouts(build().eval(), batch(), REST)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_on_two_processes(name: str, workers: WorkerPool) -> None:
    expected_loss, expected = _gradients(name, None)
    for loss, grads in workers.run(_on_gloo, name):
        assert torch.equal(loss, expected_loss)
        assert_same_tree(expected, grads)


def _on_gloo(name: str) -> tuple[torch.Tensor, Any]:
    return _gradients(name, pp_mesh(2))


def _gradients(name: str, mesh: DeviceMesh | None) -> tuple[torch.Tensor, Any]:
    build, batch = ZOO[name]
    model = af.from_module(build(), batch())
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(af.split(model, 2), s, mesh=mesh)
    loss, grads = af.value_and_grad(pipe)(pipe.init(), batch())
    return loss, pipe.gather(grads)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_plain_causal_mask_is_not_built(name: str) -> None:
    """Attention is asked to be causal, so that it may use its fast kernels; other masks stay."""
    build, batch = ZOO[name]
    model = af.from_module(build(), batch())
    segments = model.program(list(model.layers), batch())[1:]
    calls = [
        instruction.args
        for segment in segments for instruction in segment.instructions
        if "scaled_dot_product_attention" in str(instruction.target)
    ]  # fmt: skip
    assert len(calls) == 4
    plain = name == "llama"
    assert all((args[3] is None and args[5] is True) == plain for args in calls)
