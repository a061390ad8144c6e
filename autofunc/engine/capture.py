"""Capture a stage: its forward and its gradient as one graph of operators, on fake tensors.

Nothing runs on real data and nothing is allocated. `trace` records the operators that the stage's function and
`torch.autograd.grad` dispatch, so the graph computes what eager autograd would, with the same kernels, and runs without an
autograd engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.traceback import annotate, preserve_node_meta

from autofunc import tree
from autofunc.engine.purity import globals_unchanged, refuse_effects
from autofunc.engine.simplify import simplify
from autofunc.fake import fake_like, fake_mode, naming_errors
from autofunc.graph.memory import base_of, storage_bytes
from autofunc.graph.trace import trace
from autofunc.splitting import NothingTrainedOutside, Returned, StageContext, describe, outline

Node = fx.Node


@dataclass(frozen=True, eq=False)
class Joint:
    """A stage's forward and gradient in one graph. Fields hold its nodes, in the order the runtime uses."""

    module: fx.GraphModule
    params: list[Node]  # one per holder
    states: list[Node]  # what it carries from one microbatch to the next, before this one
    inputs: list[Node]  # values of the previous boundary
    batch: list[Node]  # tensors of the microbatch
    cotangents: list[Node]  # one per output that needs a gradient; for a loss, the seed
    outputs: list[Node]  # values of the stage's boundary; or the loss's sum, weight and aux tensors
    new_states: list[Node]  # one per state; empty if the stage keeps none
    input_grads: list[Node | None]  # one per input that needs a gradient; None means zero
    weight_grads: list[Node | None]  # one per trainable holder; None means zero
    returned: Returned  # the stage's boundary, and the form of the loss's aux
    terms: tuple[bool, ...]  # per trainable holder, see `StageFunctions.terms`

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return len(self.graph.nodes)

    @property
    def graph(self) -> fx.Graph:
        """All nodes, in topological order."""
        return self.module.graph


def capture(context: StageContext) -> Joint:
    """Trace a stage once; the trace also finds what it returns.

    Args:
        context: the stage; of its microbatch only shapes, dtypes and plain values matter.

    Raises:
        ModelError: if the stage cannot be captured, naming the user's line.
    """
    tracer, what = _Tracer(context), context.stage.title
    device, received = context.device, context.received.values if context.received is not None else ()
    with fake_mode() as mode:
        params, states = context.empty_parameters(), context.empty_state()
        inputs = [torch.empty(value.shape, dtype=value.dtype, device=device) for value in received]
        batch = [fake_like(mode, leaf) for leaf in tracer.batch_leaves if isinstance(leaf, Tensor)]
        given: tuple[list[Any], ...] = (params, states, inputs, batch)
        with naming_errors(what), preserve_node_meta(), globals_unchanged(context.stage.functions, what):
            module = trace(lambda *given: tracer.joint(*given), *given)
            module.graph.eliminate_dead_code()
            if refuse_effects(module.graph, what, lambda: tracer.joint(*given)):
                # make writes to its own temporaries (`mask[:, 0] = 1`) functional: no autograd is left to get in the way
                functional = torch.func.functionalize(lambda *given: fx.Interpreter(module).run(*given), remove="mutations")
                leaves = [leaf for part in given for leaf in part]
                module = trace(functional, *leaves)
    _make_cotangents_arguments(module.graph, tracer.num_cotangents)
    simplify(module.graph)
    context.setting.partitioning.refine(module.graph)
    _separate_outputs(module.graph)
    return tracer.joint_of(module, *map(len, given))


class _Tracer:
    """The traced function, and the layout of its outputs."""

    def __init__(self, context: StageContext) -> None:
        self.context, self.stage, self.partitioning = context, context.stage, context.setting.partitioning
        self.batch_leaves, self.batch_spec = tree.leaves_and_spec(dict(context.microbatch))
        self.returned: Returned | None = None
        self.num_outputs = self.num_states = self.num_input_grads = self.num_cotangents = 0
        self.terms: tuple[bool, ...] = ()

    def forward(
        self, params: Sequence[Tensor], states: Sequence[Tensor], inputs: Sequence[Tensor], batch: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the stage, and the loss if it ends in one; return tensors in the order of `Joint.outputs`, and new state."""
        remaining = iter(batch)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self.batch_leaves]
        microbatch = tree.from_leaves(leaves, self.batch_spec)
        context = self.context
        with NothingTrainedOutside(self.stage.title):
            x, after = context.run(
                self.stage.bind(list(params)), inputs, microbatch, states, around=lambda layer: annotate({"layer": layer})
            )
        if not context.with_loss:
            boundary, outputs = context.describe(x)
            self.returned = Returned(boundary)
            return outputs, after
        loss = NothingTrainedOutside("the loss")
        with annotate({"layer": len(self.stage.layers)}), naming_errors("the loss"), loss:
            terms = context.loss_terms(x, microbatch)
        aux, tensors = describe(terms.aux)
        self.returned = Returned(outline(x), aux if terms.aux is not None else None)
        return [terms.sum, terms.weight, *tensors], after

    def joint(
        self, params: list[Tensor], states: list[Tensor], inputs: list[Tensor], batch: list[Tensor]
    ) -> list[Tensor | None]:
        """Return outputs, new state, gradients of inputs and of trainable parameters, and cotangents, concatenated."""
        stage, wants = self.stage, self.context.input_wants
        with self.partitioning.running(), torch.enable_grad():
            own = [
                self.partitioning.parameter(path, leaf).requires_grad_(wanted)
                for path, leaf, wanted in zip(stage.holders, params, stage.trainable, strict=True)
            ]
            leaves = [leaf.detach().requires_grad_(wanted) for leaf, wanted in zip(inputs, wants, strict=True)]
            outputs, after = self.forward(own, states, leaves, batch)
            self.num_outputs = len(outputs)
            self.num_states = len(after) if self.context.keeps_state else 0
            if not self.context.with_grads:
                return [*outputs, *after[: self.num_states]]
            return self._differentiated(outputs, after, own, leaves)

    def _differentiated(
        self, outputs: list[Tensor], after: list[Tensor], params: list[Tensor], inputs: list[Tensor]
    ) -> list[Tensor | None]:
        needing = [leaf for leaf in inputs if leaf.requires_grad]
        trainable = [leaf for leaf in params if leaf.requires_grad]
        self.num_input_grads = count = len(needing)
        self.terms = (False,) * len(trainable)
        roots = [root for root in (outputs[:1] if self.context.with_loss else outputs) if root.requires_grad]
        # these become arguments of the graph later: their number is known only now
        cotangents = [torch.empty(root.shape, dtype=root.dtype, device=root.device) for root in roots]
        self.num_cotangents = len(cotangents)
        if not roots or not (needing or trainable):
            return [*outputs, *after, *[None] * (count + len(trainable)), *cotangents]
        grads: list[Tensor | None] = list(torch.autograd.grad(roots, [*needing, *trainable], cotangents, allow_unused=True))
        parts = [
            (None, False) if grad is None else self.partitioning.gradient(path, grad)
            for path, grad in zip(self.stage.trainable_holders, grads[count:], strict=True)
        ]
        self.terms = tuple(term for _, term in parts)
        return [*outputs, *after, *grads[:count], *(part for part, _ in parts), *cotangents]

    def joint_of(self, module: fx.GraphModule, *counts: int) -> Joint:
        """Name the nodes of the traced graph."""
        graph = module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        ends = [sum(counts[: index + 1]) for index in range(len(counts))]
        params, states, inputs, batch = (placeholders[end - count : end] for end, count in zip(ends, counts, strict=True))
        cotangents = placeholders[ends[-1] :]
        (returned,) = next(node for node in graph.nodes if node.op == "output").args
        left = iter(returned)
        outputs, after, input_grads = (
            list(islice(left, count)) for count in (self.num_outputs, self.num_states, self.num_input_grads)
        )
        assert self.returned is not None
        return Joint(
            module, params, states, inputs, batch, cotangents, outputs, after, input_grads, list(left),
            self.returned, self.terms,
        )  # fmt: skip


def _make_cotangents_arguments(graph: fx.Graph, count: int) -> None:
    """Turn the last `count` outputs, made in the graph as stand-ins for cotangents, into arguments."""
    output = next(node for node in graph.nodes if node.op == "output")
    kept = len(output.args[0]) - count
    last = [node for node in graph.nodes if node.op == "placeholder"][-1:]
    for number, node in enumerate(output.args[0][kept:]):
        with graph.inserting_after(last[0]) if last else graph.inserting_before(next(iter(graph.nodes))):
            placeholder = graph.placeholder(f"cotangent_{number}")
        placeholder.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
        last = [placeholder]
    output.args = (output.args[0][:kept],)


def _separate_outputs(graph: fx.Graph) -> None:
    """Give every output but the weight gradients its own memory: whole, contiguous, not shared with any argument.

    Received values lie in memory that is reused, and values passed on are counted and freed one by one.
    """
    output = next(node for node in graph.nodes if node.op == "output")
    (returned,) = output.args
    taken: set[Node] = set()
    separate: list[Node | None] = []
    for node in returned:
        if isinstance(node, Node):
            base, value = base_of(node), node.meta["val"]
            size = storage_bytes(base)
            whole = size is None or (size == value.numel() * value.element_size() and value.is_contiguous())
            if base in taken or not whole or base.op in ("placeholder", "get_attr"):
                with graph.inserting_before(output):
                    node = graph.call_function(
                        torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                    )
                node.meta["val"] = value.new_empty(value.shape)
                base = node
            taken.add(base)
        separate.append(node)
    output.args = (separate,)
