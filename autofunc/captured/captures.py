"""The forward of a module or function, captured once per signature of a batch and dtype of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx

from autofunc import cache, tree
from autofunc.batch import signature
from autofunc.cache import Identity
from autofunc.captured.all_places import ROWS_OF_DATA, is_rows_of_data
from autofunc.captured.attribute_reads import Reads
from autofunc.captured.branches import Noticing, Replaying, chooses_rows, settle
from autofunc.captured.causal_masks import use_is_causal
from autofunc.captured.conversions import Decision
from autofunc.captured.evaluation import drawing_parts, with_eval_mode
from autofunc.captured.export import Exported, Reading, export
from autofunc.captured.flow import Flow
from autofunc.captured.functional import make_functional
from autofunc.captured.gradients import refuse_parameter_hooks
from autofunc.captured.kept_buffers import KeptBuffers, content_of
from autofunc.captured.rehearsal import decisions_of
from autofunc.captured.rows_back import ALL_ROWS
from autofunc.captured.source import Source, device_of
from autofunc.captured.state import take_states
from autofunc.errors import ModelError, one_of
from autofunc.markers import marking
from autofunc.outside import Outside
from autofunc.surroundings import surroundings

Node = fx.Node

Branches = Literal["example", "refuse"]
"""How to treat a forward that decides by data: follow the example, or refuse it."""


class Captures:
    """Captured forwards of a source. They are kept in the process's cache, and keep nothing of the source alive."""

    def __init__(self, source: Source, branches: Branches = "example", *, in_eval_mode: bool = False) -> None:
        if branches not in get_args(Branches):
            raise ModelError(f"branches={branches!r}; {one_of(branches, get_args(Branches))}")
        self.source, self._branches = source, branches
        self._decisions: list[Decision] | None = None  # made on the example; None if it makes none
        self._all_places = False  # whether all places of masks are taken, since data decides how many are true
        self._is_known = False  # whether a first batch was captured
        # copied, whatever becomes of them later
        self._modes = {part: part.training and not in_eval_mode for part in source.module.modules()}
        self._constants: WeakValueDictionary[Any, Tensor] = WeakValueDictionary()
        self.reads = Reads({id(part): name for name, part in source.module.named_modules()})
        self.kept = KeptBuffers(source.module)
        self._outside = Outside(lambda: [self.reads, self.kept])

    def flow(
        self, batch: Mapping[str, Any], recast: torch.dtype | None, states: frozenset[str] = frozenset(),
        *, training: bool = True, evaluates: bool = False,
    ) -> tuple[Hashable, Flow]:  # fmt: skip
        """Return the captured forward for a batch, and the signature it was captured for.

        Args:
            batch: a microbatch.
            recast: dtype of the floating-point parameters; None: their dtype in the module.
            states: names of buffers known to be state.
            training: False leaves states unchanged: the parts that hold them are captured in eval mode.
            evaluates: capture parts that draw random numbers, other than by dropout, in eval mode, if nothing is drawn
                then.

        Raises:
            ModelError: for a forward that cannot be captured.
        """
        refuse_parameter_hooks(self.source.module, self.source.what)
        entries = self.source.select(batch)
        spec, leaves = signature(entries)
        shapes = (recast, spec, tuple(leaf[:3] for leaf in leaves))  # regardless of the device

        def captured(still: frozenset[str], kept: frozenset[str]) -> tuple[Hashable, Flow]:
            def signed() -> tuple[Hashable, Hashable]:
                signature_ = (*shapes, still, kept, training, surroundings(), self._outside.key())
                return signature_, ("flow", Identity(self), signature_)

            known = len(self.reads) + len(self.kept)
            signature_, key = signed()
            flow = cache.shared.get(key, lambda: self._capture(entries, recast, still, kept, training), _weight)
            if len(self.reads) + len(self.kept) > known:  # the capture found that forward depends on more
                self._outside.renew()
                signature_, key = signed()
                cache.shared.get(key, lambda: flow, _weight)
            return signature_, flow

        def with_states(still: frozenset[str]) -> tuple[Hashable, Flow]:
            found = captured(still, frozenset() if training else states)
            # a batch for which a part does not run leaves its state as it is
            return found if states <= found[1].exported.state_names else captured(still, states)

        resting = frozenset() if training else frozenset(name.rpartition(".")[0] for name in states)
        as_it_is = with_states(resting)
        drawing = drawing_parts(as_it_is[1]) if evaluates else None
        if not drawing:
            return as_it_is
        evaluated = with_states(resting | drawing)
        return as_it_is if drawing_parts(evaluated[1]) else evaluated

    def _constant(self, node: Node, exported: Exported) -> Tensor:
        """Return the real value of a buffer or constant; equal ones are one tensor, so that equal layers compare equal."""
        name = exported.buffers.get(node)
        if name is None:
            value = exported.constants[node].detach()
            key = content_of(value)
        else:
            self.kept.add(name)
            value = self.source.buffer(name).detach()
            key = self.kept.key(name, value)
        if key not in self._constants:
            self._constants[key] = value = value.resolve_conj().resolve_neg().clone()  # the module's own may change later
        return self._constants[key]

    def _flow(
        self, entries: Mapping[str, Any], device: torch.device, exported: Callable[[Callable[[], Reading]], Flow]
    ) -> Flow:  # fmt: skip
        """Capture the forward; if it decides by data, as it goes on the first batch that is captured."""
        if self._decisions is None:
            noticing = Noticing()
            try:
                return exported(lambda: noticing)
            except ModelError:
                if self._is_known or self._branches == "refuse" or not noticing.seen:
                    raise
            finally:
                self._is_known = True
            return self._first_flow(entries, device, exported)
        return self._replayed(exported, self._decisions)

    def _first_flow(
        self, entries: Mapping[str, Any], device: torch.device, exported: Callable[[Callable[[], Reading]], Flow]
    ) -> Flow:  # fmt: skip
        """Capture the forward of the first batch by the decisions made on it, with all places of masks if possible."""
        unknown: ModelError | None = None
        try:
            decisions = decisions_of(self.source, entries, device, self._modes)
        except ModelError as error:  # weights on the meta device decide; with all places they may decide nothing
            unknown, decisions = error, []
        flow: Flow | None = None
        if unknown is not None or chooses_rows(decisions):
            try:
                flow = self._replayed(exported, decisions, all_places=True)
            except ModelError as seen:
                if unknown is not None:
                    raise unknown from seen
                try:
                    flow = self._replayed(exported, decisions)
                except ModelError as error:
                    raise (seen if is_rows_of_data(error) and is_rows_of_data(seen) else error) from seen
            else:
                self._all_places = True
        self._decisions = decisions
        return flow or self._replayed(exported, decisions)

    def _replayed(
        self, exported: Callable[[Callable[[], Reading]], Flow], decisions: list[Decision], *, all_places: bool = False
    ) -> Flow:  # fmt: skip
        what, places = self.source.what, all_places or self._all_places
        reading = partial(Replaying, what, decisions, all_places=places)
        flow = exported(reading)
        if flow.exported.outline and exported(partial(reading, shortened=True)).exported.outline != flow.exported.outline:
            lines = next(note for note in flow.exported.notes if note.startswith(ALL_ROWS)).removeprefix(f"{ALL_ROWS}: ")
            reason = ROWS_OF_DATA.format(what=what, maker="a mask", line=lines)
            raise ModelError(f"{reason}; a loop over them changes a number or a list that something else depends on")
        return settle(flow, what)

    def _capture(
        self,
        entries: Mapping[str, Any],
        recast: torch.dtype | None,
        still: frozenset[str],
        states: frozenset[str],
        training: bool,
    ) -> Flow:
        source = self.source
        device = device_of(source.module)
        example = tree.map_leaves(
            lambda leaf: torch.zeros_like(leaf, device=device) if isinstance(leaf, Tensor) else leaf, dict(entries)
        )
        modes = with_eval_mode(source.module, self._modes, still)

        def exported_flow(reading: Callable[[], Reading]) -> Flow:
            @contextmanager
            def noticed() -> Iterator[None]:  # while forward runs, not while torch inspects the module
                with self.reads.noticing(), reading():
                    yield

            exported = export(source.module, source.arguments, example, source.what, recast, modes, noticed)
            exported.evaluated = still
            exported.params = {node: source.canonical(name) for node, name in exported.params.items()}
            take_states(exported, source.module, source.what)
            for node, name in exported.buffers.items():
                if name in states:
                    exported.states[node] = exported.states.get(node, node) if training else node
            flow = Flow(exported, source.what)
            return Flow(exported, source.what) if make_functional(flow) else flow

        # independent of the caller's defaults
        with torch.inference_mode(False), torch.device(device), torch.enable_grad(), marking():
            flow = self._flow(entries, device, exported_flow)
            exported = flow.exported
            fixed = {*exported.buffers, *exported.constants}.difference(exported.states)
            if use_is_causal(flow, lambda node: self._constant(node, exported).cpu() if node in fixed else None):
                flow = Flow(exported, source.what)  # without the operators that made the mask
            exported.constants = {node: self._constant(node, exported) for node in fixed if node in flow.alive}
        return flow


def _weight(flow: Flow) -> int:
    return len(flow.exported.graph.nodes)
