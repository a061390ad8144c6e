"""The decisions of a forward on the example batch, found by running it, without its weights if it can decide without them.

At first parameters are fake tensors, and so is everything that depends on them; all other values are real. That takes next
to no time or memory, and no weights. The forward runs for real only if a decision needs weights.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autofunc import tree
from autofunc.captured.conversions import Conversions, Decision, Kind, here
from autofunc.captured.ctc import LENGTHS_AS_TENSORS
from autofunc.captured.host_draws import restored_host_generators
from autofunc.captured.replacing import Replacing
from autofunc.captured.side_effects import restored
from autofunc.captured.snapshot import Snapshot
from autofunc.captured.source import Source
from autofunc.captured.torch_cond import python_control_flow
from autofunc.captured.without_dropout import WithoutDropout
from autofunc.errors import ModelError, in_brief
from autofunc.fake import fake_mode, is_fake, user_line


def decisions_of(
    source: Source, entries: Mapping[str, Any], device: torch.device, modes: Mapping[nn.Module, bool]
) -> list[Decision]:
    """Return the values that forward reads from tensors, in order. Module, batch and random generators stay unchanged.

    Args:
        source: the module or function to capture.
        entries: those of the example batch, with values.
        device: the module's device.
        modes: whether each part is in train mode.

    Raises:
        ModelError: if the example has no values, or a decision depends on weights on the meta device.
    """
    for name, entry in entries.items():
        if any(isinstance(leaf, Tensor) and (leaf.is_meta or is_fake(leaf)) for leaf in tree.leaves_and_spec(entry)[0]):
            raise ModelError(
                f"{source.what} decides by data, and the example's {name!r} has no values: give an example batch with "
                "real ones"
            )
    with _put_back(), restored(source.module):
        for part, mode in modes.items():
            part.training = mode
        without = _run(source, entries, device, _without_weights)
        if without.stopped is None:
            return without.found
        on_meta = [name for name, leaf in source.module.named_parameters() if leaf.is_meta]
        if on_meta:
            raise ModelError(
                f"{source.what} decides by values that depend on weights ({without.stopped}), and {on_meta[0]!r} is on the "
                "meta device, so its path is unknown; build it with real weights, or decide on tensors: torch.where"
            )
        found = _run(source, entries, device, _with_weights)
    if found.stopped is not None:
        raise ModelError(f"{source.what} does not run on the example batch: {found.stopped}")
    return found.found


class _Noting(Conversions):
    """Notes values that are read, until one is read that has no value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Decision] = []
        self.stopped: str | None = None

    def value(self, kind: Kind, found: Tensor) -> Any:
        if is_fake(found):
            self.stopped = self.stopped or here().line
            raise _NoValue
        value = _PLAIN[kind](found.detach())
        self.found.append(Decision(here(), kind, value))
        return value

    def places(self, mask: Tensor) -> tuple[Tensor, ...]:
        if is_fake(mask):
            self.stopped = self.stopped or here().line
            raise _NoValue
        counts = mask.sum(tuple(range(1, mask.dim()))) if mask.dim() > 1 else mask.long()
        self.found.append(Decision(here(), "rows", tuple(counts.tolist()), mask.dim()))
        return mask.nonzero(as_tuple=True)


class _NoValue(Exception):
    """Ends a run that cannot go on."""


_PLAIN: Mapping[str, Callable[[Any], Any]] = {"bool": bool, "int": int, "float": float}


def _run(
    source: Source, entries: Mapping[str, Any], device: torch.device, prepared: Callable[[Source], Any]
) -> _Noting:  # fmt: skip
    noting = _Noting()
    given = tree.map_leaves(
        lambda leaf: leaf.detach().to(device, copy=True) if isinstance(leaf, Tensor) else leaf, dict(entries)
    )
    args, kwargs = source.arguments(given)
    instead, still = Replacing(LENGTHS_AS_TENSORS), WithoutDropout()
    with prepared(source), torch.no_grad(), torch.device(device), still, noting, instead, python_control_flow():
        try:
            source.module(*args, **kwargs)
        except Exception as error:  # raised by user code, which may also have caught what ended the run
            line = user_line(traceback.extract_tb(error.__traceback__))
            noting.stopped = noting.stopped or f"{in_brief(error)} ({line})"
    return noting


@contextmanager
def _without_weights(source: Source) -> Iterator[None]:
    """Put fake tensors in place of parameters; buffers on the meta device get their value, or are fake too."""
    module, mode = source.module, fake_mode()
    parameters = {part: dict(part._parameters) for part in module.modules()}
    for part in module.modules():
        part._parameters.update(dict.fromkeys(part._parameters))
    known = Snapshot(module, values=True)  # of all but the parameters
    stand_ins: dict[Tensor, nn.Parameter] = {}
    for part, owned in parameters.items():
        for name, leaf in owned.items():
            if leaf is not None and leaf not in stand_ins:
                with mode:
                    fake = torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu" if leaf.is_meta else leaf.device)
                stand_ins[leaf] = nn.Parameter(fake, leaf.requires_grad)
            part._parameters[name] = None if leaf is None else stand_ins[leaf]
    for path, buffer in module.named_buffers():
        if buffer.is_meta:
            owner, _, name = path.rpartition(".")
            module.get_submodule(owner)._buffers[name] = _buffer(source, path, buffer, mode)
    try:
        yield
    finally:
        known.restore()
        for part, owned in parameters.items():
            part._parameters.update(owned)


def _buffer(source: Source, path: str, buffer: Tensor, mode: Any) -> Tensor:
    try:
        return source.buffer(path)
    except ModelError:  # no initialiser makes it, so nothing that depends on it has a value
        with mode:
            return torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _with_weights(source: Source) -> Iterator[None]:
    known = Snapshot(source.module, values=True)
    try:
        yield
    finally:
        known.restore()


@contextmanager
def _put_back() -> Iterator[None]:
    """Restore the global random generators afterwards."""
    with restored_host_generators(), torch.random.fork_rng(devices=list(range(torch.accelerator.device_count()))):
        yield
