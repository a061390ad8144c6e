"""Which kernel runs a matrix product in compiled pieces. Choices are by shape alone, so every run makes the same.

- A weight's gradient of at least `MEDIUM` multiplications is added by the product itself (`addmm_` into the accumulator):
  1.02 to 1.6 times as fast as a product and an addition; below, calling the operator costs more than that saves. The bits
  are not those of the addition, so only compiled pieces do it.
- On the CPU, products of at least `LARGE` multiplications go to oneDNN, which torch 2.13 uses for inference only: 1.03 to
  1.25 times as fast as MKL from there on, slower below (`bench/matmul_kernels.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

Node = fx.Node

MEDIUM = 1 << 21
"""Multiplications of a product from which adding inside it is faster."""
LARGE = 1 << 24
"""Multiplications of a product from which oneDNN is faster."""

_aten = torch.ops.aten

# Inductor takes oneDNN's own operator for constant weights only, so it is called under another name. A plain library
# definition costs less per call than `torch.library.custom_op`.
_library = torch.library.Library("autofunc", "DEF")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias, fp32 on the CPU."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


_library.impl("linear", _linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("autofunc::linear", lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]))


def choose_matmuls(graph: fx.Graph) -> None:
    """Change a graph of decomposed operators in place."""
    for node in list(graph.nodes):
        if node.target is _aten.copy_.default:
            _fuse_accumulation(graph, node)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        for node in list(graph.nodes):
            _use_onednn(graph, node)
    graph.eliminate_dead_code()
    graph.lint()


def _fuse_accumulation(graph: fx.Graph, copy: Node) -> None:
    """`total.copy_(total + a @ b)` -> `total.addmm_(a, b)`."""
    total, added = copy.args
    if not isinstance(added, Node) or added.target is not _aten.add.Tensor or added.args[0] is not total:
        return
    product = added.args[1]
    if not isinstance(product, Node) or product.target is not _aten.mm.default or len(product.users) != 1:
        return
    if _value(product).dtype != _value(total).dtype or _work(product) < MEDIUM:
        return
    with graph.inserting_before(copy):
        fused = graph.call_function(_aten.addmm_.default, (total, *product.args))
    fused.meta["val"] = copy.meta["val"]
    copy.replace_all_uses_with(fused)
    graph.erase_node(copy)


def _use_onednn(graph: fx.Graph, node: Node) -> None:
    """`x @ w` and `b + x @ w` -> oneDNN's linear, which takes w transposed."""
    if node.target is _aten.mm.default:
        bias, (x, w) = None, node.args
    elif node.target is _aten.addmm.default and not node.kwargs:
        bias, x, w = node.args
    else:
        return
    left, right, out = (_value(part) for part in (x, w, node))
    if out.device.type != "cpu" or out.dtype != torch.float32 or (bias is not None and _value(bias).dim() != 1):
        return
    if _work(node) < LARGE or not left.is_contiguous():
        return
    with graph.inserting_before(node):
        if isinstance(w, Node) and w.target is _aten.permute.default and _value(w.args[0]).is_contiguous():
            transposed = w.args[0]
        else:
            transposed = graph.call_function(_aten.permute.default, (w, [1, 0]))
            transposed.meta["val"] = right.t()
        linear = graph.call_function(torch.ops.autofunc.linear.default, (x, transposed, bias))
    linear.meta["val"] = out
    node.replace_all_uses_with(linear)
    graph.erase_node(node)


def _work(product: Node) -> int:
    """Multiplications of a product."""
    left, right = (_value(part) for part in product.args[-2:])
    return int(left.shape[0] * left.shape[1] * right.shape[1])


def _value(node: Any) -> Any:
    return node.meta["val"]
