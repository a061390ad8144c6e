"""The capture of a module's forward as a graph of operators. The only file that uses `torch.export` (tried with 2.13.0).

Nothing runs on real data, and the module keeps its weights: they may be on the meta device.
"""

from __future__ import annotations

import gc
import io
import logging
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn

from autofunc import tree
from autofunc.captured.all_places import ROWS_OF_DATA
from autofunc.captured.assertions import leave_out_assertions
from autofunc.captured.autograd_functions import apply_for_real, recorded
from autofunc.captured.balance import over_expert_ranks
from autofunc.captured.compiled_parts import call_inside
from autofunc.captured.converted_parts import without_conversions
from autofunc.captured.ctc import LENGTHS_AS_TENSORS
from autofunc.captured.decided_draws import refuse_decided_draws
from autofunc.captured.dense import SPARSE, make_dense
from autofunc.captured.draws import unvalidated
from autofunc.captured.experts import routed
from autofunc.captured.gradients import refuse_module_hooks, refuse_own_backward, replaced_functions
from autofunc.captured.host_draws import HostDraws, refuse_host_draws
from autofunc.captured.inlined import PREFIX, Inliner
from autofunc.captured.keyed import replace_random
from autofunc.captured.loop_effects import Outline, outline
from autofunc.captured.outputs import CACHE, FIRST_IS_LOSS, without_caches
from autofunc.captured.plain_numbers import keep_tensors
from autofunc.captured.recurrent import unfuse
from autofunc.captured.replacing import Replacing
from autofunc.captured.rows_back import leave_out_rows
from autofunc.captured.side_effects import LeftBehind, restored, written_back
from autofunc.captured.torch_cond import PYTHON_CONTROL_FLOW
from autofunc.captured.vmapped import unmap
from autofunc.errors import ModelError, in_brief
from autofunc.experts import run_for_real
from autofunc.fake import fake_mode, naming_errors
from autofunc.graph.lazy_code import lazy_code
from autofunc.graph.lines import line_of
from autofunc.losses import begins_with_scalar

Node = fx.Node


@dataclass(eq=False)
class Exported:
    """A forward as operators. Each node's `meta` has the module calls it was made in, and the modes it ran under."""

    graph: fx.Graph
    output: Any  # pytree spec of its outputs
    params: dict[Node, str] = field(default_factory=dict)  # name in the module
    buffers: dict[Node, str] = field(default_factory=dict)
    states: dict[Node, Node] = field(default_factory=dict)  # buffer that forward writes to -> the value it leaves there
    constants: dict[Node, Tensor] = field(default_factory=dict)  # at the end, also the values of the buffers in use
    inputs: dict[Node, int] = field(default_factory=dict)  # position among the tensors of the batch
    markers: dict[str, Node] = field(default_factory=dict)  # by name: the first operator after an `af.split_point`
    evaluated: frozenset[str] = frozenset()  # names of parts captured in eval mode
    notes: list[str] = field(default_factory=list)  # for the user: what was dropped or changed
    outline: Outline = ()  # only for a forward that loops over all places of masks

    @property
    def state_names(self) -> frozenset[str]:
        """Names of the buffers that are state."""
        return frozenset(self.buffers[node] for node in self.states)

    @property
    def returned(self) -> list[Any]:
        """The nodes or constants it returns, in leaf order."""
        return list(self.graph.output_node().args[0])  # type: ignore[arg-type]


Arguments = Callable[[Mapping[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""From a batch's entries to the arguments of a module."""


Reading = AbstractContextManager[Any]
"""A context that decides, while forward runs, about the values it reads."""


@dataclass
class Told:
    """A call's notes for the user; a separate object, since torch resets the attributes of a module it exports."""

    notes: list[str] = field(default_factory=list)


class Call(nn.Module):
    """The module that is exported: one call of a module, on the entries of a batch that it takes."""

    def __init__(self, module: nn.Module, arguments: Arguments, what: str, reading: Callable[[], Reading]) -> None:
        super().__init__()
        self.module, self._arguments, self._what, self._reading = module, arguments, what, reading
        self.told = Told()
        self.left, self.drawn = LeftBehind(module), HostDraws()

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Call the module."""
        args, kwargs = self._arguments(batch)
        what = self._what
        refuse_module_hooks(self.module, what)
        with (
            self.left.undone(),
            written_back(self.module),
            self.drawn.undone(),
            without_conversions(what),
            recorded(),
            routed(),
            over_expert_ranks(self.module),
        ):
            outputs, cached = without_caches(self._called(args, kwargs, batch))
            outputs = tree.with_known_classes(outputs)
            self.told.notes = [CACHE] * cached + [FIRST_IS_LOSS] * begins_with_scalar(outputs)
        refuse_own_backward(outputs, what)
        return outputs

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Mapping[str, Any]) -> Any:
        try:
            with (
                self._reading(),
                Replacing({**replaced_functions(self._what), **PYTHON_CONTROL_FLOW, **LENGTHS_AS_TENSORS}),
            ):
                return self.module(*args, **kwargs)
        except TypeError as error:
            refused = next((name for name in kwargs if f"unexpected keyword argument '{name}'" in str(error)), None)
            if refused is None or refused not in batch:
                raise
            others = [name for name in batch if name != refused]
            raise ModelError(
                f"{self._what} passes on all entries of the batch, and {error}; name the entries it takes: inputs={others}"
            ) from error


def export(
    module: nn.Module,
    arguments: Arguments,
    batch: Mapping[str, Any],
    what: str,
    dtype: torch.dtype | None,
    modes: Mapping[nn.Module, bool],
    reading: Callable[[], Reading],
) -> Exported:
    """Capture a forward for a batch of these shapes.

    Args:
        module: the module to capture.
        arguments: from the batch to the module's arguments.
        batch: an example, on the module's device, or on the CPU if the module is on the meta device.
        what: a name for messages.
        dtype: the dtype its floating-point parameters are captured with; None: their own.
        modes: whether each part is captured in train mode.
        reading: makes the context for the values that forward reads; called for each run.

    Raises:
        ModelError: for a forward that cannot be captured, naming the user's line.
    """
    call = Call(module, arguments, what, reading)

    def exported_program() -> Any:
        with restored(module), naming_errors(what), _quiet():
            _prepare(module, dtype, modes)
            return _traced(call, batch)

    program = exported_program()
    as_exported = str(program.graph) if call.left.changes else ""
    refuse_host_draws(call.drawn, program, exported_program, what)
    _refuse_shapes_of_data(program.graph, what)
    checks = leave_out_assertions(program.graph_module)
    unmap(program.graph_module)
    flattening = Inliner(program.graph_module, module)
    exported = Exported(flattening.graph, program.call_spec.out_spec, notes=[*call.told.notes, *checks])
    leaves = tree.leaves_and_spec(dict(batch))[0]
    tensors = iter(range(sum(isinstance(leaf, Tensor) for leaf in leaves)))
    given = iter(leaves)
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, spec in zip(nodes, program.graph_signature.input_specs, strict=True):
        kind = spec.kind.name
        if kind == "USER_INPUT":
            leaf = next(given)
            if isinstance(leaf, Tensor):
                exported.inputs[flattening.placeholder(node)] = next(tensors)
            else:
                flattening.values[node] = leaf
            continue
        if kind not in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
            raise ModelError(
                f"{what} holds a {kind.lower()} ({spec.target}), which cannot be split; keep it out of forward. A random "
                "generator is not needed: draws without one are functions of the key"
            )
        new, name = flattening.placeholder(node), str(spec.target)
        if kind == "CONSTANT_TENSOR":
            exported.constants[new] = program.constants[name]
        else:
            (exported.params if kind == "PARAMETER" else exported.buffers)[new] = name.removeprefix(PREFIX)
    exported.graph.output(tuple(flattening.run(program.graph)))
    apply_for_real(exported.graph)
    run_for_real(exported.graph)
    exported.outline = outline(exported.graph, exported.constants)
    exported.notes += leave_out_rows(exported.graph, what)
    refuse_decided_draws(exported.graph, what)
    keep_tensors(exported.graph)
    replace_random(exported.graph, what)
    unfuse(exported.graph)
    if make_dense(exported.graph):
        exported.notes.append(SPARSE)
    _take_out_markers(exported)
    exported.graph.lint()
    if call.left.changes:
        with restored(module), naming_errors(what), _quiet():
            _prepare(module, dtype, modes)
            _refuse_state(call, batch, as_exported, what)
    return exported


def _refuse_state(call: Call, batch: Mapping[str, Any], first: str, what: str) -> None:
    """Refuse a forward that runs differently after it has run once; what it stores but never reads is its own affair."""
    stored = call.left.words
    try:
        again = str(_traced(call, batch).graph)
    except Exception as error:  # raised by user code that finds what the first run left
        again = in_brief(error)
    if again != first:
        raise ModelError(
            f"{what} keeps state from one forward to the next: {stored}. Microbatches overlap in a pipeline, and a "
            "captured forward would store it only once; return it, or compute it in __init__"
        )


def _refuse_shapes_of_data(graph: fx.Graph, what: str) -> None:
    """Refuse shapes that depend on data: stages exchange tensors of fixed shapes."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and any(isinstance(size, torch.SymInt) for size in value.shape):
            maker = node.args[0] if node.target is operator.getitem else node
            raise ModelError(ROWS_OF_DATA.format(what=what, maker=maker.target, line=line_of(node)))


def _traced(call: Call, batch: Mapping[str, Any]) -> Any:
    """Export, with the garbage collector paused: it took a tenth of the time, and frees little."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with lazy_code():
            return torch.export.export(call, (dict(batch),), strict=False)
    finally:
        if collects:
            gc.enable()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what torch logs and prints about a failed export: our error says it better. Compile nothing."""
    log, printed = logging.getLogger("torch.fx.experimental.symbolic_shapes"), io.StringIO()
    disabled, log.disabled = log.disabled, True
    try:
        stance = torch.compiler.set_stance("force_eager")
        with redirect_stderr(printed), warnings.catch_warnings(), stance, unvalidated():
            warnings.simplefilter("ignore")
            yield
        sys.stderr.write(printed.getvalue())  # what forward itself printed
    finally:
        log.disabled = disabled


def _prepare(module: nn.Module, dtype: torch.dtype | None, modes: Mapping[nn.Module, bool]) -> None:
    """Prepare a module for export; inside `restored`."""
    _stand_in(module, dtype)
    call_inside(module)
    for part, mode in modes.items():
        part.training = mode
        if isinstance(part, nn.SyncBatchNorm):  # its collectives cannot be exported; see `state.py`
            vars(part)["forward"] = MethodType(nn.BatchNorm1d.forward, part)


def _stand_in(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace tensors on the meta device or of another dtype by fake ones; inside `restored`."""
    mode: Any = fake_mode()
    known: dict[Tensor, Tensor] = {}
    for part in module.modules():
        for space in (part._parameters, part._buffers):
            for name, leaf in space.items():
                if leaf is None:
                    continue
                recast = dtype is not None and isinstance(leaf, nn.Parameter) and leaf.is_floating_point()
                if not leaf.is_meta and (not recast or leaf.dtype == dtype):
                    continue
                if leaf not in known:
                    device = "cpu" if leaf.is_meta else leaf.device
                    with mode:
                        fake = torch.empty(leaf.shape, dtype=dtype if recast else leaf.dtype, device=device)
                    known[leaf] = nn.Parameter(fake, leaf.requires_grad) if isinstance(leaf, nn.Parameter) else fake
                space[name] = known[leaf]  # type: ignore[assignment]


def _take_out_markers(exported: Exported) -> None:
    """Remove the operators of `af.split_point`, and note where they were."""
    for node in list(exported.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.autofunc.split_point.default:
            name, after = str(node.args[1]), node.next
            if name in exported.markers:
                raise ModelError(
                    f"af.split_point(x, {name!r}) is passed twice ({line_of(node)}); give each marker its own name"
                )
            exported.markers[name] = after
            node.replace_all_uses_with(node.args[0])
            exported.markers = {known: after if at is node else at for known, at in exported.markers.items()}
            exported.graph.erase_node(node)
