"""Compiled pieces: close to the oracle for every schedule, compiled once, with clear errors if they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc import cache
from autofunc.engine import compile as compile_module
from autofunc.engine import matmul
from autofunc.errors import AutofuncError, ModelError
from autofunc.tree import flatten
from tests.cases import make_case, pp_mesh
from tests.pool import WorkerPool


def assert_close(expected: Any, found: Any) -> None:
    """Check every gradient to 1e-5 of the largest: one that is zero by symmetry has no digits of its own."""
    left, right = flatten(expected), flatten(found)
    assert list(left) == list(right)
    largest = max(leaf.abs().max() for leaf in left.values())
    for path in left:
        assert (left[path] - right[path]).abs().max() <= 1e-5 * largest, path


FULL = [pytest.mark.full]  # a compiled kernel costs about a second


@pytest.mark.parametrize(
    ("model_name", "name", "remat", "key"),
    [
        *(pytest.param("gpt2", name, None, None, marks=[] if name == "zbv" else FULL) for name in af.schedule.names()),
        *(pytest.param("mlp", name, "layer", (3, 5), marks=FULL) for name in ("1f1b", "zb_h1")),
    ],
)
def test_close_to_the_oracle(model_name: str, name: str, remat: str | None, key: Any) -> None:
    s = af.schedule.build(name, num_ranks=2, num_microbatches=4)
    model, stages, loss, batch = make_case(model_name, s.num_stages, 8, num_blocks=2)
    full = model.init(seed=7)
    expected_loss, expected = af.reference_value_and_grad(model, loss, 4)(full, batch, key)
    step = af.value_and_grad(af.pipeline(stages, s, loss=loss, compile=True, remat=remat))
    for _ in range(2):
        found_loss, found = step(full, batch, key)
        torch.testing.assert_close(found_loss, expected_loss, rtol=1e-5, atol=0)
        assert_close(expected, found)


def compiled_on_gloo(name: str, num_ranks: int) -> None:
    s = af.schedule.build(name, num_ranks=num_ranks, num_microbatches=4)
    model, stages, loss, batch = make_case("gpt2", s.num_stages, 8, num_blocks=2)
    full = model.init(seed=7)
    expected_loss, expected = af.reference_value_and_grad(model, loss, 4)(full, batch)
    pipe = af.pipeline(stages, s, loss=loss, mesh=pp_mesh(num_ranks), compile=True)
    found_loss, found = af.value_and_grad(pipe)(pipe.place(full), batch)
    torch.testing.assert_close(found_loss, expected_loss, rtol=1e-5, atol=0)
    assert_close(expected, pipe.gather(found))


@pytest.mark.parametrize(("name", "num_ranks"), [("zbv", 2), pytest.param("1f1b", 4, marks=pytest.mark.full)])
def test_close_to_the_oracle_on_gloo(workers: WorkerPool, name: str, num_ranks: int) -> None:
    workers.run(compiled_on_gloo, name, num_ranks)


def compile_equal_stages(folder: str) -> tuple[int, int]:
    """(pieces compiled, pieces loaded) of this rank's stage of four, of which the second and the third are equal."""
    from torch._dynamo.utils import counters

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
        cache.shared.clear()
        counters.clear()
        layer = af.Layer(init=lambda key: {"w": key.normal("w", (7, 7))}, apply=lambda p, x, b: x.tanh() @ p["w"])
        first = af.Layer(init=layer.init, apply=lambda p, x, b: b["x"] @ p["w"])
        model = af.Model({"first": first, "b": layer, "c": layer, "last": layer})
        s = af.schedule.build("1f1b", num_ranks=4, num_microbatches=4)
        pipe = af.pipeline(af.split(model, 4), s, loss=lambda out, mb: out.sum(), mesh=pp_mesh(4), compile=True)
        pipe.build({"x": torch.randn(4, 7)})
        found = counters["inductor"]
        return found["fxgraph_cache_miss"], found["fxgraph_cache_hit"]


def test_one_rank_compiles_and_the_others_load(workers: WorkerPool, tmp_path: Path) -> None:
    first, *middle, last = workers.run(compile_equal_stages, str(tmp_path))
    assert first == (2, 0) and last == (2, 0), "F and B, which no other rank has"
    assert sum(compiled for compiled, _ in middle) == 2 and sum(loaded for _, loaded in middle) == 2


def test_equal_stages_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    compile_once = compile_module._compile

    def counted(graph: Any, inputs: Any, key: str) -> Any:
        calls.append(key)
        return compile_once(graph, inputs, key)

    monkeypatch.setattr(compile_module, "_compile", counted)
    monkeypatch.setattr(cache, "shared", cache.Cache(1024))
    layer = af.Layer(
        init=lambda key: {"w": key.normal("w", (5, 5))}, apply=lambda p, x, b: (b["x"] if x is None else x.tanh()) @ p["w"]
    )
    model = af.Model({f"l.{index}": layer for index in range(6)})
    s = af.schedule.build("zb_h1", num_ranks=6, num_microbatches=6)
    pipe = af.pipeline(af.split(model, 6), s, loss=lambda out, mb: out.square().mean(), compile=True)
    pipe.build({"x": torch.randn(6, 5)})
    assert len(calls) == len(set(calls)), "no piece twice"
    assert len(calls) <= 2 + 3 * 3, "a first, a middle and a last stage"
    pipe.build({"x": torch.randn(6, 5)})


def test_products_add_into_the_accumulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both rewrites, forced on small sizes, do not change the numbers."""
    monkeypatch.setenv("CI", "1")  # inductor is stricter there
    monkeypatch.setattr(matmul, "LARGE", 1)
    monkeypatch.setattr(matmul, "MEDIUM", 1)
    monkeypatch.setattr(cache, "shared", cache.Cache(1024))
    seen: list[str] = []
    choose = compile_module.choose_matmuls

    def look(graph: Any) -> None:
        choose(graph)
        seen.extend(str(node.target) for node in graph.nodes if node.op == "call_function")

    monkeypatch.setattr(compile_module, "choose_matmuls", look)
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=2)
    model, stages, loss, batch = make_case("mlp", 2, 6, num_blocks=2)
    full = model.init()
    expected_loss, expected = af.reference_value_and_grad(model, loss, 2)(full, batch)
    found_loss, found = af.value_and_grad(af.pipeline(stages, s, loss=loss, compile=True))(full, batch)
    torch.testing.assert_close(found_loss, expected_loss, rtol=1e-5, atol=0)
    assert_close(expected, found)
    assert "aten.addmm_.default" in seen and "autofunc.linear.default" in seen
    assert "aten.addmm.default" not in seen and "aten.mm.default" not in seen


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    _, stages, loss, _ = make_case("mlp", 2, 4)
    with pytest.raises(AutofuncError, match=r"needs a C\+\+ compiler.*install g\+\+"):
        af.pipeline(stages, s, loss=loss, compile=True)


def test_a_piece_that_cannot_be_compiled_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: Any, inputs: Any, key: str) -> Any:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(compile_module, "_compile", fails)
    monkeypatch.setattr(cache, "shared", cache.Cache(1024))
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    model, stages, loss, batch = make_case("mlp", 2, 4)
    pipe = af.pipeline(stages, s, loss=loss, compile=True)
    with pytest.raises(ModelError, match=r"forward of stage 0 .*cannot be compiled: .*no such operator.*compile=False"):
        af.value_and_grad(pipe)(model.init(), batch)


def test_low_precision_accumulates_in_fp32() -> None:
    """256 + 1 + 1 + 1 + 1 is 260, and in bfloat16 it is 256."""
    layer = af.Layer(
        init=lambda key: {"w": key.ones("w", (1, 1))}, apply=lambda p, x, b: (b["x"] if x is None else x) @ p["w"]
    )
    model = af.Model({"first": layer, "last": layer})
    batch = {"x": torch.tensor([[256.0], [1.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)}
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=5)
    pipe = af.pipeline(af.split(model, 2), s, loss=lambda out, mb: (out.float().sum(), 1.0), compile=True)
    _, found = af.value_and_grad(pipe)(model.init(dtype=torch.bfloat16), batch)
    for leaf in flatten(found).values():
        assert leaf.dtype == torch.bfloat16 and leaf.item() == 260 / 5


def constant_inside(p: Any, x: Tensor, b: Any) -> Tensor:
    return x @ p["w"] * torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_constants_are_not_part_of_the_code() -> None:
    def init(key: Any) -> dict[str, Tensor]:
        return {"w": key.normal("w", (4, 4))}

    first = af.Layer(init=init, apply=lambda p, x, b: b["x"] @ p["w"])
    model = af.Model({"first": first, "last": af.Layer(init=init, apply=constant_inside)})
    batch, params = {"x": torch.randn(4, 4)}, model.init()

    def loss(out: Tensor, mb: Any) -> Tensor:
        return out.square().mean()

    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    expected_loss, expected = af.reference_value_and_grad(model, loss, 2)(params, batch)
    found_loss, found = af.value_and_grad(af.pipeline(af.split(model, 2), s, loss=loss, compile=True))(params, batch)
    torch.testing.assert_close(found_loss, expected_loss, rtol=1e-5, atol=0)
    assert_close(expected, found)


def bf16_step(device: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return operators of the compiled backward of a linear layer with bf16 weights, on a device that need not exist."""
    from torch._inductor.decomposition import select_decomp_table

    from autofunc.fake import fake_mode
    from autofunc.graph.trace import trace

    def adds(total: Tensor, other: Tensor, x: Tensor, g: Tensor) -> list[Tensor]:
        aten = torch.ops.aten
        product, turned = aten.mm(aten.t(g), x), aten.t(aten.mm(aten.t(x), g))
        return [aten.copy_(total, aten.add(total, product)), aten.copy_(other, aten.add(other, turned))]

    monkeypatch.setattr(matmul, "MEDIUM", 1)
    with fake_mode(), torch.no_grad():
        sums = [torch.empty(8, 4, device=device) for _ in range(2)]
        given = [torch.empty(16, size, dtype=torch.bfloat16, device=device) for size in (4, 8)]
        graph = trace(adds, *sums, *given, decompositions=select_decomp_table()).graph
    matmul.choose_matmuls(graph)
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def test_products_add_low_precision_gradients_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU's fake tensors; on the CPU it stays a product and an addition."""
    on_gpu, on_cpu = (bf16_step(device, monkeypatch) for device in ("cuda:1", "cpu"))
    assert on_gpu.count("autofunc.add_product_.default") == 2 and "aten.mm.default" not in on_gpu
    assert on_cpu.count("aten.mm.default") == 2 and "autofunc.add_product_.default" not in on_cpu


def test_products_that_add_low_precision_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's stand-in for the kernel: inductor calls it, and sums are closer to fp32."""
    monkeypatch.setattr(cache, "shared", cache.Cache(1024))
    monkeypatch.setattr(matmul, "MEDIUM", 1)
    s = af.schedule.build("zb_h1", num_ranks=2, num_microbatches=4)
    layer = af.Layer(
        init=lambda key: {"w": key.normal("w", (24, 24))}, apply=lambda p, x, b: (b["x"] if x is None else x) @ p["w"]
    )
    model = af.Model({"a": layer, "b": layer})
    stages, params = af.split(model, 2), model.init(dtype=torch.bfloat16)
    batch = {"x": torch.randn(64, 24, generator=torch.Generator().manual_seed(0)).bfloat16()}
    wide = [{name: leaf.float() for name, leaf in flatten(params).items()}, {"x": batch["x"].float()}]

    def loss(out: Tensor, mb: Any) -> Tensor:
        return out.float().sum()

    _, exact = af.value_and_grad(af.pipeline(stages, s, loss=loss))(af.tree.to_tensordict(wide[0]), wide[1])
    errors = []
    for widening in ((), ("cpu",)):
        monkeypatch.setattr(matmul, "WIDENING", widening)
        cache.shared.clear()
        _, found = af.value_and_grad(af.pipeline(stages, s, loss=loss, compile=True))(params, batch)
        pairs = zip(flatten(exact).values(), flatten(found).values(), strict=True)
        errors.append(sum(float((left - right).square().sum()) for left, right in pairs))
    assert 0 < errors[1] < errors[0], errors


def test_code_belongs_to_a_device() -> None:
    """On fake GPUs: inductor writes the index into its code, so only equal devices share it."""
    from torch import fx

    from autofunc.fake import fake_mode

    def key(device: str) -> str:
        graph = fx.Graph()
        given = graph.placeholder("x")
        with fake_mode():
            given.meta["val"] = torch.empty(2, 3, device=device)
        graph.output((graph.call_function(torch.ops.aten.neg.default, (given,)),))
        return compile_module._key(graph, [given])

    assert key("cuda:1") == key("cuda:1") != key("cuda:0")
