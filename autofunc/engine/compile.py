"""From a piece of a graph to compiled code, with the least overhead per call.

Inductor compiles the piece for exactly the shapes it was captured with, so a call checks nothing: its code
takes a list of tensors, empties it, frees what it no longer needs and returns the outputs. That takes 278 us for a forward
and 348 us for a backward of two small blocks (GPT-2, d=64, T=32); a call through `torch.compile` would add its guards, and
`torch._inductor.standalone_compile` its wrappers, 20 to 60 us (`bench/engine_pieces.py`).

Equal pieces, in one process or several, are compiled once: a lock per piece lets the first compile and the others
load the result from inductor's cache (`TORCHINDUCTOR_CACHE_DIR`, which outlives the run).

Private parts of torch used, tried with 2.13.0: `torch._inductor.compile_fx.compile_fx_inner`, `torch._inductor.config`,
`torch._inductor.decomposition.select_decomp_table`, `torch._inductor.cpp_builder.get_cpp_compiler`,
`torch._inductor.runtime.cache_dir_utils.cache_dir`, `torch._inductor.lowering`, `torch._guards`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, fx

from autofunc import cache
from autofunc.engine.emit import Runnable
from autofunc.engine.gelu import with_sigmoids
from autofunc.engine.matmul import choose_matmuls
from autofunc.engine.partition import Piece, in_order
from autofunc.errors import AutofuncError, ModelError, in_brief
from autofunc.fake import fake_mode
from autofunc.graph.trace import trace
from autofunc.splitting import accumulator_dtype

Node = fx.Node

_OPTIONS = {
    "size_asserts": False,  # the runtime guarantees the captured shapes; asserting them costs 14 %
    "alignment_asserts": False,
    "nan_asserts": False,
    "compile_threads": 1,  # pieces are small, and ranks compile side by side
}


LOG = logging.getLogger("autofunc.compile")
"""Logs each piece and how long it took to compile: minutes for a large model."""


def require_compiler() -> None:
    """Refuse to compile for the CPU without a C++ compiler. With an accelerator, code is not compiled for the CPU.

    Raises:
        AutofuncError: if there is none.
    """
    if torch.accelerator.is_available():
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise AutofuncError(
            "compile=True needs a C++ compiler, and none was found; install g++ or name one in CXX, or use compile=False"
        ) from error


def compile_piece(piece: Piece, order: list[Node], attributes: Mapping[str, Any], name: str) -> Runnable:
    """Compile a piece.

    Args:
        piece: what to compute.
        order: all nodes of the joint graph, in order.
        attributes: values of its `get_attr` nodes.
        name: of the piece, for messages.

    Raises:
        ModelError: if the piece cannot be compiled.
    """
    graph, constants = _graph_of(piece, order, attributes)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    key = _key(graph, inputs)

    def make() -> Any:
        began = time.perf_counter()
        LOG.info("compiling %s", name)
        made = _compile(graph, inputs, key)
        LOG.info("compiled %s in %.1f s", name, time.perf_counter() - began)
        return made

    try:
        call = cache.shared.get(("compiled", key), make)
    except Exception as error:
        raise ModelError(f"{name} cannot be compiled: {in_brief(error)}; use compile=False") from error
    if not constants:
        return call  # type: ignore[no-any-return]

    def with_constants(given: list[Tensor]) -> list[Tensor]:
        given += constants
        return call(given)  # type: ignore[no-any-return]

    return with_constants


def _graph_of(piece: Piece, order: list[Node], attributes: Mapping[str, Any]) -> tuple[fx.Graph, list[Tensor]]:
    """Copy the piece into a graph that takes inputs, accumulators and constants; return the constants too."""
    nodes = in_order(piece, order)
    graph, copies, constants = fx.Graph(), {}, []

    def placeholder(value: Tensor) -> Node:
        made = graph.placeholder(f"in{len(graph.nodes)}")
        made.meta["val"] = value
        return made

    for node in piece.inputs:
        copies[node] = placeholder(node.meta["val"])
    sums = []
    for _, node in piece.adds:
        value = node.meta["val"]
        sums.append(placeholder(value.new_empty(value.shape, dtype=accumulator_dtype(value.dtype))))
    for node in nodes:
        if node.op == "get_attr":
            copies[node] = placeholder(node.meta["val"])
            constants.append(attributes[str(node.target)])
    for node in nodes:
        if node.op != "get_attr":
            copies[node] = graph.node_copy(node, lambda read: copies[read])
    for total, (_, node) in zip(sums, piece.adds, strict=True):
        graph.call_function(
            torch.ops.aten.copy_.default,
            (total, graph.call_function(torch.ops.aten.add.Tensor, (total, copies[node]))),
        )
    graph.output(tuple(copies[node] for node in piece.outputs))
    return graph, constants


def _key(graph: fx.Graph, inputs: list[Node]) -> str:
    """Return a key, equal for pieces that can share code. It names the device, whose index inductor writes into code."""
    described = [
        (tuple(value.shape), tuple(value.stride()), value.dtype, str(value.device))
        for value in (node.meta["val"] for node in inputs)
    ]
    text = "\0".join((torch.__version__, str(graph), repr(described), repr(_OPTIONS)))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _compile(graph: fx.Graph, inputs: list[Node], key: str) -> Any:
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    with fake_mode() as mode, torch.no_grad():
        values = [node.meta["val"] for node in inputs]
        fakes = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in values]
        module = trace(fx.GraphModule({}, graph), *fakes, decompositions=with_sigmoids(select_decomp_table()))
    choose_matmuls(module.graph)
    _call_as_is(torch.ops.aten.addmm_.default)
    _call_as_is(torch.ops.autofunc.add_product_.default)
    module.recompile()
    output = module.graph.output_node()
    (returned,) = output.args
    # the next piece relies on the strides of the outputs
    output.meta["user_visible_output_idxs"] = list(range(len(returned)))  # type: ignore[arg-type]
    folder = Path(cache_dir()) / "autofunc"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"), config.patch(_OPTIONS), tracing(TracingContext(mode)), torch.no_grad():
        return compile_fx_inner(module, fakes).current_callable  # type: ignore[attr-defined]


def _call_as_is(operator: Any) -> None:
    """Make inductor call an operator as it is. It would anyway, but raises if `CI` is set and a decomposition exists."""
    from torch._inductor.lowering import lowerings, make_fallback

    if operator not in lowerings:
        make_fallback(operator, warn=False)  # type: ignore[no-untyped-call]
