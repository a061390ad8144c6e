"""What to keep between the pieces of a stage, and what to recompute: two cuts, F -> I and I -> W.

F -> I: keep everything, or only what is expensive ("cheap" values are recomputed), or only what goes from layer to layer,
or only what the stage received. Values that depend on the batch alone, such as rotary tables, are recomputed: they cost no
product. The exception is a boolean mask that takes dozens of operators to make, such as dropout's hash of a key: if
operators run one by one and recomputation is not asked for, it is kept, one byte per element; compiled code recomputes it
in the kernel that reads it. Recomputation happens once, in B or `I`, so a microbatch has two forwards at most.

I -> W: the W of a matrix product needs its input and its output's gradient, which together take as much as F kept. No
choice of recomputation makes that small without running products again; but a weight gradient may be computed in `I`
already, where both are at hand. `early` is the fraction of W's work that moves there, most memory per work first.

Sources of the ideas: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174, section 3 (layers);
recomputing what is cheap, as the min-cut partitioner of functorch (`torch._functorch.partitioners`) does.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import getitem
from typing import NamedTuple

import torch
from torch import fx

from autofunc.engine.capture import Joint
from autofunc.engine.device_speed import multiplications_per_byte
from autofunc.experts import PRODUCTS, product_work
from autofunc.graph.memory import base_of, is_view, storage_bytes
from autofunc.graph.reach import ancestors_within, descendants, frontier, reachable
from autofunc.graph.schema import is_pointwise

Node = fx.Node


class Keep(NamedTuple):
    """What one stage keeps."""

    recompute: str | None = None  # what the backward recomputes: "cheap", "layer" or "stage"
    early: float = 0.0  # the fraction of W's work that is done in I


KEEP_ALL = Keep()

_aten = torch.ops.aten
_CHEAP = {
    _aten.native_layer_norm.default,
    _aten._fused_rms_norm.default,
    _aten.mean.dim,
    _aten.sum.dim_IntList,
    _aten.amax.default,
    _aten.var_mean.correction,
    _aten._softmax.default,
    _aten._log_softmax.default,
    _aten.logsumexp.default,
    _aten._to_copy.default,
    _aten.clone.default,
    _aten.cat.default,
}
_PRODUCTS = {
    _aten.mm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.bmm.default: (0, 1),
    _aten.baddbmm.default: (1, 2),
}


_EXPENSIVE = 64.0
"""Bytes read and written per byte of a mask from which keeping it pays. A hash takes 200, a causal mask less than 10."""


def recomputed(joint: Joint, keep: Keep, *, compiled: bool = False) -> set[Node]:
    """Return the nodes of the forward that the backward recomputes.

    Args:
        joint: the captured stage.
        keep: what the stage keeps.
        compiled: the pieces are compiled.
    """
    behind = descendants(joint.graph, joint.cotangents)
    seeds = set(joint.cotangents)
    forward = [node for node in joint.graph.nodes if node.op == "call_function" and node not in behind | seeds]
    given = descendants(joint.graph, [*joint.params, *joint.inputs])
    chosen = {node for node in forward if node not in given}
    if keep.recompute == "stage":
        return set(forward)
    if keep.recompute == "layer":
        return chosen | {node for node in forward if not _crosses(node, behind)}
    if keep.recompute == "cheap":
        return chosen | _cheap(joint, behind, chosen)
    return chosen if compiled else chosen - _expensive_masks(chosen)


def _expensive_masks(chosen: set[Node]) -> set[Node]:
    """Return the masks among values of the batch alone that take far longer to make than to keep."""
    masks = [node for node in chosen if _is_mask(node) and not is_view(node)]
    return {mask for mask in masks if cost_of(ancestors_within([mask], chosen)) >= _EXPENSIVE * (storage_bytes(mask) or 0)}


def _is_mask(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def _crosses(node: Node, behind: set[Node]) -> bool:
    """Return whether a later layer reads a value, directly or through views; views do not cross, their source does."""
    return not _is_proper_view(node) and _read_later(node, layer_of(node), behind)


def _read_later(value: Node, layer: int, behind: set[Node]) -> bool:
    return any(
        layer_of(user) > layer or (_is_proper_view(user) and _read_later(user, layer, behind))
        for user in value.users
        if user not in behind and user.op != "output"
    )


def _is_proper_view(node: Node) -> bool:
    return is_view(node) and node.target is not getitem


def layer_of(node: Node) -> int:
    """Return the position in the stage of the layer that made a node; -1 if none did."""
    return int((node.meta.get("custom") or {}).get("layer", -1))


def _cheap(joint: Joint, behind: set[Node], chosen: set[Node]) -> set[Node]:
    """Choose values that are cheap to recompute from what is kept anyway, if that frees memory; largest first."""
    targets = [node for node in (*joint.input_grads, *joint.weight_grads) if node is not None]
    constant = {*joint.params, *joint.batch, *joint.cotangents}
    found: set[Node] = set()

    def kept(again: set[Node]) -> list[Node]:
        return [node for node in frontier(targets, behind | chosen | again) if node not in constant]

    def total(again: set[Node]) -> int:
        return sum(storage_bytes(node) or 0 for node in {base_of(node) for node in kept(again)})

    best = total(found)
    for node in sorted(kept(found), key=lambda node: -(storage_bytes(node) or 0)):
        candidate = found | _cheap_chain(node)
        now = total(candidate)
        if now < best:
            found, best = candidate, now
    return found


def _cheap_chain(node: Node) -> set[Node]:
    """Return a node and its ancestors, as far as they are cheap."""
    return reachable(filter(is_cheap, [node]), lambda each: filter(is_cheap, each.all_input_nodes))


def is_cheap(node: Node) -> bool:
    """Return whether computing a node takes about as long as reading and writing it."""
    if node.op != "call_function":
        return False
    if node.target is getitem:
        return is_cheap(node.args[0])  # type: ignore[arg-type]
    return is_view(node) or node.target in _CHEAP or is_pointwise(node)


def early_gradients(joint: Joint, keep: Keep) -> set[int]:
    """Return indices of the trainable holders whose gradients are computed in `I`.

    Args:
        joint: the captured stage.
        keep: what the stage keeps.
    """
    if keep.early <= 0.0:
        return set()
    behind = descendants(joint.graph, joint.cotangents)
    input_grads = [node for node in joint.input_grads if node is not None]
    in_i = ancestors_within(input_grads, behind)
    constant = {*joint.params, *joint.batch}
    needs: dict[int, list[Node]] = {}
    work: dict[int, float] = {}
    for number, node in enumerate(joint.weight_grads):
        if node is None or node in in_i or node not in behind:
            continue
        own = ancestors_within([node], behind) - in_i
        needs[number] = [base_of(each) for each in frontier([node], own) if each not in constant]
        work[number] = cost_of(own)
    sharing: dict[Node, int] = {}
    for nodes in needs.values():
        for node in nodes:
            sharing[node] = sharing.get(node, 0) + 1
    freed = {number: sum((storage_bytes(n) or 0) / sharing[n] for n in nodes) for number, nodes in needs.items()}
    chosen: set[int] = set()
    done, wanted = 0.0, keep.early * sum(work.values())
    for number in sorted(needs, key=lambda number: (-freed[number] / max(work[number], 1.0), number)):
        if done >= wanted:
            break
        chosen.add(number)
        done += work[number]
    return chosen


def cost_of(nodes: Iterable[Node]) -> float:
    """Estimate how long operators take, in bytes read or written; a product's work is converted to bytes."""
    total = 0.0
    for node in nodes:
        if node.op != "call_function" or is_view(node) or node.target is getitem:
            continue
        if node.target in _PRODUCTS:
            left, right = (node.args[place].meta["val"] for place in _PRODUCTS[node.target])  # type: ignore[union-attr]
            total += left.numel() * right.shape[-1] / multiplications_per_byte(left.device, left.dtype)
        elif node.target in PRODUCTS:
            rows, other = (each.meta["val"] for each in node.args[:2])  # type: ignore[union-attr]
            total += product_work(rows.shape, other.shape) / multiplications_per_byte(rows.device, rows.dtype)
        else:
            value = node.meta["val"]
            made = value if isinstance(value, (tuple, list)) else (value,)
            read = [each.meta["val"] for each in node.all_input_nodes if isinstance(each.meta.get("val"), torch.Tensor)]
            tensors = [each for each in (*made, *read) if isinstance(each, torch.Tensor)]
            total += sum(float(each.numel() * each.element_size()) for each in tensors)
    return total
