"""Unmodified `transformers` models, split by one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import autofunc as af
from autofunc import tree
from autofunc.errors import ModelError
from autofunc.splitting import infer_boundaries
from tests.captured.laws import check_layouts
from tests.captured.zoo import ZOO
from tests.cases import assert_same_tree, mesh_of, pp_mesh
from tests.pool import WorkerPool

LAYOUTS = [(3, "zb_h1")]
REST = [(2, "1f1b"), (4, "zb_h1")]
FULL = pytest.mark.full
LIKE_OTHERS = ("llama", "qwen3", "mistral")
"""Decoders whose parts gemma and mixtral also have; other tests here run them."""


def microbatch_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: leaf[: len(leaf) // 2] for name, leaf in batch.items()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=FULL if name in LIKE_OTHERS else []) for name in ZOO])
def test_equal_to_the_plain_loop(name: str) -> None:
    build, batch = ZOO[name]
    check_layouts(build(), batch(), LAYOUTS, example=microbatch_of(batch()))


@pytest.mark.full
@pytest.mark.parametrize("name", ZOO)
def test_equal_to_the_plain_loop_in_other_layouts(name: str) -> None:
    build, batch = ZOO[name]
    check_layouts(build().eval(), batch(), REST, example=microbatch_of(batch()))


@pytest.mark.parametrize("name", ["t5", *(pytest.param(name, marks=pytest.mark.full) for name in ("gpt2", "llama"))])
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
    """Attention gets `is_causal`, so that it may use its fast kernels; other masks stay."""
    build, batch = ZOO[name]
    model = af.from_module(build(), batch())
    segments = model.specialise(batch()).programs(list(model.layers))[1:]
    calls = [
        instruction.args
        for segment in segments for instruction in segment.instructions
        if "scaled_dot_product_attention" in str(instruction.target)
    ]  # fmt: skip
    assert len(calls) == 4
    plain = name == "llama"
    assert all((args[3] is None and args[5] is True) == plain for args in calls)


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=FULL)])
def test_other_dtypes(name: str) -> None:
    """In bf16, by dtype or by policy: equal to the plain module in bf16."""
    build, batch = ZOO[name]
    module, mb = build(), batch()
    model = af.from_module(module, mb)
    stages = af.split(model, 2)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    half = model.init(dtype=torch.bfloat16)
    loss, grads = af.value_and_grad(af.pipeline(stages, s))(half, mb)
    expected_loss, expected = af.reference_value_and_grad(model, None, 2)(half, mb)
    assert torch.equal(loss, expected_loss)
    assert_same_tree(expected, grads)
    policy = torch.distributed.fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mixed = af.pipeline(stages, s, sharding=af.Sharding(mp_policy=policy))
    mixed_loss, mixed_grads = af.value_and_grad(mixed)(model.init(), mb)
    assert torch.equal(mixed_loss, loss)
    assert next(iter(mixed_grads.values(include_nested=True, leaves_only=True))).dtype == torch.float32
    plain = build().to(torch.bfloat16)(**mb).loss
    assert abs(plain - model(half, mb).loss) <= 2e-2 * abs(plain)
    some = next(path for path in half.keys(include_nested=True, leaves_only=True))
    half[some] = half[some].double()
    with pytest.raises(ModelError, match=r"its parameters are torch.bfloat16, torch.float64; give all the same dtype"):
        model(half, mb)


@pytest.mark.parametrize(
    ("engine", "remat"),
    [
        ("eager", None),
        ("graph", "layer"),
        pytest.param("eager", "layer", marks=FULL),
        pytest.param("graph", None, marks=FULL),
    ],
)
def test_engines(engine: str, remat: str | None) -> None:
    build, batch = ZOO["qwen3"]
    model = af.from_module(build(), batch())
    params, s = model.init(), af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2)
    expected_loss, expected = af.reference_value_and_grad(model, None, 2)(params, batch())
    loss, grads = af.value_and_grad(af.pipeline(af.split(model, 2), s, engine=engine, remat=remat))(params, batch())
    assert torch.equal(loss, expected_loss)
    assert_same_tree(expected, grads)


@pytest.mark.full
def test_compiled() -> None:
    build, batch = ZOO["gpt2"]
    model = af.from_module(build(), batch())
    params, s = model.init(), af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2)
    expected_loss, expected = af.reference_value_and_grad(model, None, 2)(params, batch())
    loss, grads = af.value_and_grad(af.pipeline(af.split(model, 2), s, compile=True))(params, batch())
    assert torch.allclose(loss, expected_loss, rtol=1e-5)
    found = tree.flatten(grads)
    for path, leaf in tree.flatten(expected).items():
        assert torch.allclose(found[path], leaf, rtol=1e-4, atol=1e-5), path


def test_sharded_over_data_parallel_ranks(workers: WorkerPool) -> None:
    """pp 2 x dp_shard 2: FSDP2 holds the parameters of a captured module; four steps match one process."""
    alone = _trained(None)
    for losses in workers.run(_trained_on_a_mesh):
        assert torch.allclose(losses, alone, rtol=1e-5)


def _trained_on_a_mesh() -> torch.Tensor:
    return _trained(mesh_of(pp=2, dp_shard=2))


def _trained(mesh: DeviceMesh | None) -> torch.Tensor:
    build, batch = ZOO["llama"]
    with torch.device("meta"):
        module = build()
    data = batch()
    model = af.from_module(module, data)
    place, places = af.data_coordinate(mesh)
    mine = {name: leaf.chunk(places)[place] for name, leaf in data.items()}
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=4 // (2 * places))
    pipe = af.pipeline(af.split(model, 2), s, mesh=mesh)
    params = pipe.init(seed=3)
    optimizer = af.optimizer(torch.optim.AdamW, lr=1e-3)
    state, losses = optimizer.init(params), []
    for _ in range(4):
        loss, grads = af.value_and_grad(pipe)(params, mine)
        params, state = optimizer.update(grads, state, params)
        losses.append(loss)
    return torch.stack(losses)


class _Mixed(nn.Module):
    """A layer in bf16 between others in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8, dtype=torch.bfloat16), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.last(self.norm(self.first(x.bfloat16()).float()))
        return h


def test_a_module_with_two_dtypes() -> None:
    data = {"x": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))}
    model = af.from_module(_Mixed(), data)
    params = model.init()
    assert {leaf.dtype for leaf in tree.flatten(params).values()} == {torch.bfloat16, torch.float32}
    stages = af.split(model, ["last"])
    assert infer_boundaries(stages, {}, data, with_loss=False).stages[0].values[0].dtype == torch.float32

    def loss(outputs: torch.Tensor, microbatch: Any) -> torch.Tensor:
        return outputs.square().mean()

    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    found_loss, found = af.value_and_grad(af.pipeline(stages, s, loss=loss))(params, data)
    expected_loss, expected = af.reference_value_and_grad(model, loss, 2)(params, data)
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found)


class _Cast(nn.Module):
    """A layer that converts its input to its own dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h: torch.Tensor = self.linear(x.to(self.linear.weight.dtype))
        return h


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("last", ["no parameters", "fp32"])
def test_ranks_agree_on_dtypes(dtype: torch.dtype, last: str, workers: WorkerPool) -> None:
    """Even if a rank has no parameters, or its own already have the wanted dtype."""
    expected = _cast_loss(dtype, last, None)
    for loss in workers.run(_cast_on_gloo, dtype, last):
        assert torch.equal(loss, expected)


def _cast_on_gloo(dtype: torch.dtype, last: str) -> torch.Tensor:
    return _cast_loss(dtype, last, pp_mesh(2))


def _cast_loss(dtype: torch.dtype, last: str, mesh: DeviceMesh | None) -> torch.Tensor:
    torch.manual_seed(0)
    second = nn.Tanh() if last == "no parameters" else _Cast(torch.float32)
    x = torch.randn(4, 8)
    first = _Cast(torch.bfloat16 if last == "fp32" else torch.float32)
    model = af.from_module(nn.Sequential(first, second), {"input": x})
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(af.split(model, ["1"]), s, loss=_squared, mesh=mesh)
    loss: torch.Tensor = af.value_and_grad(pipe)(pipe.init(dtype=dtype), {"input": x})[0]
    return loss


def _squared(outputs: torch.Tensor, microbatch: Any) -> torch.Tensor:
    return outputs.float().square().mean()
