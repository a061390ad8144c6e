"""Watch one forward: which parameters are read and written, by which operator, while which module runs."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from autofunc import tree
from autofunc.captured.snapshot import same_bits, storage_of
from autofunc.fake import user_line

_HARMLESS = {"requires_grad_", "detach_", "rename_", "share_memory_", "retain_grad"}  # end in _ but write no values


@dataclass(frozen=True)
class Write:
    """A write to a parameter."""

    parameter: str
    operator: str
    module: str  # whose forward was running
    line: str


@dataclass
class Watched:
    """Reads and writes of parameters."""

    reads: dict[str, set[tuple[str, ...]]] = field(default_factory=dict)  # parameter -> modules that ran, outermost first
    writes: dict[str, Write] = field(default_factory=dict)  # parameter -> the first that wrote to it


@contextmanager
def watching(module: nn.Module, *, thorough: bool = False) -> Iterator[Watched]:
    """Watch the parameters during the block.

    Args:
        module: the module that owns them.
        thorough: compare a parameter's values before and after every operator that reads it, to find operators that write
            without saying so too.
    """
    running: list[str] = [""]
    names = {id(part): name for name, part in module.named_modules()}
    watch = _Watch(module, running, thorough)

    def enter(part: nn.Module, args: Any) -> None:
        running.append(names.get(id(part), running[-1]))

    def leave(part: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        with watch:
            yield watch.seen
    finally:
        for hook in hooks:
            hook.remove()


class _Watch(TorchFunctionMode):
    def __init__(self, module: nn.Module, running: Sequence[str], thorough: bool) -> None:
        super().__init__()
        self.seen = Watched()
        self._running, self._thorough = running, thorough
        self._params = dict(module.named_parameters())
        self._names = {id(leaf): name for name, leaf in self._params.items()}
        self._by_storage = {storage_of(leaf): name for name, leaf in self._params.items()}
        self._by_storage.pop(None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree.leaves_and_spec((args, kwargs))[0] if isinstance(leaf, Tensor)]
        read = {self._names[id(leaf)] for leaf in leaves if id(leaf) in self._names}
        touched = read | {self._by_storage[at] for at in map(storage_of, leaves) if at in self._by_storage}
        if not touched:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name not in ("__get__", "__set__"):  # of an attribute such as shape or data
            for parameter in read:
                self.seen.reads.setdefault(parameter, set()).add(tuple(self._running))
        before = {parameter: self._values(parameter) for parameter in touched} if self._thorough else {}
        result = func(*args, **kwargs)
        for parameter in touched & self._written(func, name, args, kwargs):
            self._note(parameter, name)
        for parameter, values in before.items():
            if not same_bits(values, self._values(parameter)):
                self._note(parameter, name)
        return result

    def _values(self, parameter: str) -> Tensor:
        return self._params[parameter].detach().clone()

    def _written(self, func: Any, name: str, args: Any, kwargs: Mapping[str, Any]) -> set[str]:
        """Return the parameters an operator declares it writes to, by its name or with `out`."""
        targets: list[Any] = [kwargs.get("out")]
        is_data = func is torch.Tensor.data.__set__  # type: ignore[attr-defined]
        in_place = name.endswith("_") and not name.startswith("__") and name not in _HARMLESS
        if args and (is_data or in_place or name == "__setitem__"):
            targets.append(args[0])
        leaves = tree.leaves_and_spec(targets)[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        names = {self._names.get(id(leaf)) or self._by_storage.get(storage_of(leaf)) for leaf in tensors}
        return {each for each in names if each is not None}

    def _note(self, parameter: str, operator: str) -> None:
        line = user_line(traceback.extract_stack())
        shown = "data" if operator == "__set__" else operator
        self.seen.writes.setdefault(parameter, Write(parameter, shown, self._running[-1], line))
