"""Which kernel runs a matrix product in compiled pieces. Shapes alone decide, so every run chooses the same.

- For a weight gradient of at least `MEDIUM` multiplications the product itself adds (`addmm_` into the accumulator):
  1.02 to 1.6 times as fast as a product and an addition; below that, calling the operator costs more than it saves. The
  bits differ from those of a separate addition, so only compiled pieces do it.
- On a GPU the product also adds a 16-bit gradient into the fp32 sum: it is not rounded to 16 bits on the way, so
  the sum is more exact than that of rounded products, and the gradient is never written to memory.
- On the CPU, products of at least `LARGE` multiplications go to oneDNN, which torch 2.13 uses for inference only: 1.03 to
  1.25 times as fast as MKL above that size, slower below (`bench/matmul_kernels.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

Node = fx.Node

MEDIUM = 1 << 21
"""Least multiplications of a product for which adding inside it is faster."""
LARGE = 1 << 24
"""Least multiplications of a product for which oneDNN is faster."""

_aten = torch.ops.aten

# Inductor accepts oneDNN's own operator for constant weights only, so it is wrapped under another name. A plain library
# definition costs less per call than `torch.library.custom_op`.
_library = torch.library.Library("autofunc", "DEF")  # type: ignore[no-untyped-call]
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x @ weight.T + bias: fp32, on the CPU, of shapes (n, k), (m, k) and (m,)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


_library.impl("linear", _linear, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("autofunc::linear", lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]))

# Inductor calls a third-party operator that writes to an argument only if it returns nothing; `addmm.dtype_out` returns
# the argument.
_library.define("add_product_(Tensor(a!) total, Tensor left, Tensor right) -> ()")  # type: ignore[no-untyped-call]


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Compute total += left @ right without rounding the product: fp32 (n, m), 16-bit (n, k) and (k, m)."""
    _aten.addmm.dtype_out(total, left, right, total.dtype, out=total)


def _add_product_on_cpu(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Do the same on the CPU, where torch has no such kernel; for tests."""
    total.addmm_(left.to(total.dtype), right.to(total.dtype))


_library.impl("add_product_", _add_product, "CUDA")  # type: ignore[no-untyped-call]
_library.impl("add_product_", _add_product_on_cpu, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("autofunc::add_product_", lambda total, left, right: None)
fx.has_side_effect(torch.ops.autofunc.add_product_.default)

WIDENING = ("cuda",) if torch.version.hip is None else ()
"""Types of devices with products of 16-bit factors and 32-bit results."""


def choose_matmuls(graph: fx.Graph) -> None:
    """Replace products in a graph of decomposed operators, in place."""
    for node in list(graph.nodes):
        if node.target is _aten.copy_.default:
            _fuse_accumulation(graph, node)
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        for node in list(graph.nodes):
            _use_onednn(graph, node)
    graph.eliminate_dead_code()
    graph.lint()


def _fuse_accumulation(graph: fx.Graph, copy: Node) -> None:
    """`total.copy_(total + a @ b)` -> `total.addmm_(a, b)`, or `add_product_` if the dtypes differ."""
    total, added = copy.args
    if not isinstance(added, Node) or added.target is not _aten.add.Tensor or added.args[0] is not total:
        return
    assert isinstance(total, Node), "an accumulator is an argument"
    product, is_transposed = _product_of(added.args[1])
    if product is None or _work(product) < MEDIUM:
        return
    widens = _widens(_value(product), _value(total))
    if not widens and (_value(product).dtype != _value(total).dtype or product is not added.args[1]):
        return
    with graph.inserting_before(copy):
        if widens:
            factors = [_transposed(graph, part) for part in reversed(product.args)] if is_transposed else product.args
            graph.call_function(torch.ops.autofunc.add_product_.default, (total, *factors))
            copy.replace_all_uses_with(total)
        else:
            fused = graph.call_function(_aten.addmm_.default, (total, *product.args))
            fused.meta["val"] = copy.meta["val"]
            copy.replace_all_uses_with(fused)
    graph.erase_node(copy)


def _product_of(value: Any) -> tuple[Node | None, bool]:
    """Return the product behind a value, if nothing else reads it, and whether it is transposed on the way."""
    is_transposed = False
    while isinstance(value, Node) and len(value.users) == 1:
        if value.target is _aten.mm.default:
            return value, is_transposed
        if value.target is not _aten.permute.default:
            break
        is_transposed ^= value.args[1] == [1, 0]
        value = value.args[0]
    return None, False


def _widens(product: Any, total: Any) -> bool:
    """Return whether a 16-bit product can be computed and added in 32 bits."""
    narrow = product.dtype in (torch.bfloat16, torch.float16) and total.dtype == torch.float32
    return narrow and total.device.type in WIDENING and bool(total.is_contiguous())


def _transposed(graph: fx.Graph, factor: Any) -> Node:
    if factor.target is _aten.permute.default:
        return factor.args[0]  # type: ignore[no-any-return]
    made = graph.call_function(_aten.permute.default, (factor, [1, 0]))
    made.meta["val"] = _value(factor).t()
    return made


def _use_onednn(graph: fx.Graph, node: Node) -> None:
    """Replace `x @ w` and `b + x @ w` by oneDNN's linear, which takes w transposed."""
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
    """Count the multiplications of a product."""
    left, right = (_value(part) for part in product.args[-2:])
    return int(left.shape[0] * left.shape[1] * right.shape[1])


def _value(node: Any) -> Any:
    return node.meta["val"]
