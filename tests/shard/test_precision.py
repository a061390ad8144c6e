"""Mixed precision: compute in bf16, accumulate in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy

import autofunc as af
from autofunc.errors import AutofuncError
from autofunc.mesh import data_coordinate
from autofunc.tree import flatten
from tests.cases import assert_same_tree, make_case, mesh_of
from tests.pool import WorkerPool

BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
SMALL = 2.0**-9
"""1 + SMALL is 1 in bf16, which has 8 bits."""


def scaling_model() -> af.Model:
    """Its gradient is the sum of the rows' x."""
    layer = af.Layer(lambda key: {"w": key.ones("w", (2,))}, lambda p, x, batch: batch["x"] * p["w"])
    return af.Model({"only": layer})


def total(outputs: Tensor, microbatch: Any) -> tuple[Tensor, Tensor]:
    return outputs.float().sum(), torch.ones(())


def gradient(x: Tensor, mesh: Any, engine: str) -> Tensor:
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=len(x))
    pipe = af.pipeline(
        af.split(scaling_model()), s, loss=total, mesh=mesh, engine=engine, sharding=af.Sharding(mp_policy=BF16)
    )
    params = pipe.init()
    _, grads = af.value_and_grad(pipe)(params, {"x": x})
    leaf = flatten(pipe.gather(grads))["only.w"]
    assert leaf.dtype == torch.float32
    weight = len(x) * data_coordinate(mesh)[1]
    return leaf * weight


def rows(count: int) -> Tensor:
    """Return a one, then values too small for bf16 to add to it."""
    return torch.tensor([1.0] + [SMALL] * (count - 1))[:, None].expand(count, 2).contiguous()


@pytest.mark.parametrize("engine", ["graph", "eager"])
def test_microbatches_add_up_in_fp32(engine: str) -> None:
    assert torch.tensor(1.0 + SMALL).bfloat16() == 1.0
    torch.testing.assert_close(gradient(rows(32), None, engine), torch.full((2,), 1.0 + 31 * SMALL), rtol=0, atol=1e-6)


def sum_over_ranks(sizes: dict[str, int], engine: str) -> Tensor:
    mesh = mesh_of(**sizes)
    place, places = data_coordinate(mesh)
    return gradient(rows(8 * places).chunk(places)[place], mesh, engine)


@pytest.mark.parametrize("sizes", [{"dp_shard": 4}, {"dp_replicate": 4}, {"dp_replicate": 2, "dp_shard": 2}], ids=str)
def test_ranks_add_up_in_fp32(workers: WorkerPool, sizes: dict[str, int]) -> None:
    for found in workers.run(sum_over_ranks, sizes, "graph"):
        torch.testing.assert_close(found, torch.full((2,), 1.0 + 31 * SMALL), rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ["graph", "eager"])
@pytest.mark.parametrize("model_name", ["mlp", "gpt2"])
def test_bf16_equals_the_model_in_bf16(model_name: str, engine: str) -> None:
    """The policy gives what parameters in bf16 would, before their gradients are rounded."""
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=4)
    model, stages, loss, batch = make_case(model_name, 2, 8)
    full = model.init(seed=1)
    low = full.apply(lambda leaf: leaf.bfloat16())
    lowered = {key: leaf.bfloat16() if key == "x" else leaf for key, leaf in batch.items()}
    expected_loss, expected = af.reference_value_and_grad(model, loss, 4)(low, lowered)
    pipe = af.pipeline(stages, s, loss=loss, engine=engine, sharding=af.Sharding(mp_policy=BF16))
    found_loss, found = af.value_and_grad(pipe)(full, batch)
    assert torch.equal(found_loss, expected_loss)
    assert_same_tree(expected, found.apply(lambda leaf: leaf.bfloat16()))
    assert all(leaf.dtype == torch.float32 for leaf in flatten(found).values())
    assert all(leaf.dtype == torch.float32 for leaf in flatten(full).values())


def test_the_loss_sees_output_dtype() -> None:
    seen: list[torch.dtype] = []

    def loss(outputs: Tensor, microbatch: Any) -> Tensor:
        seen.append(outputs.dtype)
        return outputs.sum()

    for output_dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=output_dtype)
        s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=1)
        pipe = af.pipeline(af.split(scaling_model()), s, loss=loss, engine="eager", sharding=af.Sharding(mp_policy=policy))
        seen.clear()
        pipe(pipe.init(), {"x": rows(2)})
        assert set(seen) == {expected}
        assert pipe.forward(pipe.init(), {"x": rows(2)}).dtype == expected


def test_float16_is_refused() -> None:
    with pytest.raises(AutofuncError, match="loss scaling, which is not supported; use bfloat16"):
        af.Sharding(mp_policy=MixedPrecisionPolicy(param_dtype=torch.float16))
