"""The checked module, or model of pure layers, with a batch: how to run it, and its parts."""

from __future__ import annotations

import inspect
import pickle
import random
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autofunc import tree
from autofunc.batch import split_batch
from autofunc.captured import CapturedModel, capture_module
from autofunc.captured.cut_points import default_layers
from autofunc.captured.module_source import ModuleSource
from autofunc.captured.snapshot import Change, Snapshot
from autofunc.captured.without_dropout import WithoutDropout, still
from autofunc.checks.seeds import seeded
from autofunc.checks.verdict import Where, is_torch, where
from autofunc.checks.watch import Watched, watching
from autofunc.errors import AutofuncError, BatchError, ModelError, in_brief
from autofunc.fake import user_line
from autofunc.losses import Loss, LossTerms, evaluate
from autofunc.model import CutPoints, Model
from autofunc.row_dims import BatchDims


class ForwardError(ModelError):
    """The checked forward raised an error."""


@dataclass
class First:
    """Observations of the first forward."""

    error: str = ""  # why it does not run
    outputs: Any = None
    watched: Watched = field(default_factory=Watched)
    changes: list[Change] = field(default_factory=list)
    draws: list[str] = field(default_factory=list)  # generators, other than torch's, that it drew from


@dataclass(frozen=True)
class Run:
    """Results of a forward without dropout, detached."""

    batch: Mapping[str, Any]
    outputs: Any
    terms: LossTerms | None

    @property
    def loss(self) -> Tensor | None:
        """The mean loss, 0-dim."""
        return None if self.terms is None else self.terms.sum / self.terms.weight


class Subject:
    """The checked module or model.

    Args:
        checked: a module with real weights, or a model.
        batch: an example. It is copied for each run.
        loss: see `af.pipeline`.
        inputs: see `af.from_module`.
        rows: the number of rows of the batch; by default the size of dim 0 that most of its tensors share.
        batch_dims: see `af.pipeline`.

    Raises:
        ModelError: for other objects, or weights on the meta device.
        BatchError: if the batch has no rows, or their number cannot be told.
    """

    def __init__(
        self,
        checked: nn.Module | Model,
        batch: Mapping[str, Any],
        loss: Loss | None,
        inputs: Sequence[str] | Mapping[str, str] | None,
        rows: int | None,
        batch_dims: BatchDims = None,
    ) -> None:
        if not isinstance(checked, (nn.Module, Model)):
            raise ModelError(f"expected an nn.Module or an af.Model, got {type(checked).__name__}")
        self.batch, self.loss, self.inputs, self.batch_dims = dict(batch), loss, inputs, batch_dims
        self.checked = checked
        self.module = checked if isinstance(checked, nn.Module) else None
        self.name = type(checked).__name__
        if self.module is not None:
            self._source = ModuleSource(self.module, inputs)
            on_meta = [name for name, leaf in self._source.parameters.items() if leaf.is_meta]
            if on_meta:
                raise ModelError(f"{self.name}: {on_meta[0]!r} is on the meta device; a check runs it, so give it weights")
        self.rows = _rows(self.batch, self.key_name) if rows is None else rows

    @cached_property
    def model(self) -> Model:
        """The checked model, if it is not a module."""
        assert isinstance(self.checked, Model)
        return self.checked

    @property
    def key_name(self) -> str:
        """The entry of the batch that holds its random key."""
        return self._source.key_name if self.module is not None else self.model.key_name

    @cached_property
    def params(self) -> dict[str, Tensor]:
        """All parameters by canonical path: the module's own, or the model's initial ones."""
        if self.module is not None:
            return dict(self.module.named_parameters())
        made = self.model.init_paths(self.model.spec, 0, "cpu")
        return {path: leaf.requires_grad_(self.model.is_trainable(path)) for path, leaf in made.items()}

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The parameters that get gradients."""
        return {path: leaf for path, leaf in self.params.items() if leaf.requires_grad}

    @property
    def where(self) -> Where | None:
        """The module's class; None for a model."""
        return where(type(self.module)) if self.module is not None else None

    def where_of(self, module: str) -> Where:
        """Return the class of a submodule, by path."""
        assert self.module is not None
        return where(type(self.module.get_submodule(module)), module)

    def where_above(self, module: str) -> Where:
        """Return the class of the nearest module, from this path up, that is not torch's own."""
        assert self.module is not None
        while module and is_torch(type(self.module.get_submodule(module))):
            module = module.rpartition(".")[0]
        return self.where_of(module)

    @property
    def arguments(self) -> list[str]:
        """Names of forward's arguments; empty for a model, which takes the batch."""
        return list(inspect.signature(self.module.forward).parameters) if self.module is not None else []

    @cached_property
    def layers(self) -> list[str]:
        """Names of the module's layers: the items of its outermost lists, and the modules beside them."""
        if self.module is None:
            return list(self.model.layers)
        names = {name: number for number, (name, _) in enumerate(self.module.named_modules()) if name}
        return default_layers(self.module, CutPoints(names), ())

    def run(self, batch: Mapping[str, Any], *, seed: int = 0, mode: AbstractContextManager[Any] | None = None) -> Any:
        """Run the forward once, with gradients.

        Args:
            batch: whole or a part.
            seed: of the global random generators, which are restored.
            mode: entered around the call.

        Raises:
            ForwardError: naming the user's line.
        """
        batch = {name: tree.map_leaves(_copied, value) for name, value in batch.items()}
        try:
            with seeded(seed), torch.enable_grad():
                if self.module is None:
                    return self.model(self.params, batch, self.model.init_state())
                args, kwargs = self._source.arguments(self._source.select(batch))
                with mode or nullcontext():
                    return tree.with_known_classes(self.module(*args, **kwargs))
        except AutofuncError as error:
            raise ForwardError(str(error)) from error
        except Exception as error:  # whatever the user's code raises
            line = user_line(traceback.extract_tb(error.__traceback__))
            raise ForwardError(f"forward raises {in_brief(error)} ({line})") from error

    def run_still(self, batch: Mapping[str, Any]) -> Run:
        """Run the forward once without dropout, so that its values can be compared with those of other runs.

        Raises:
            ForwardError: see `run`.
        """
        try:
            outputs = self.run(batch, mode=self.stillness())
            terms = self.terms(outputs, batch)
        finally:
            self.restore()
        detached = tree.map_leaves(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)
        return Run(batch, detached, None if terms is None else terms._replace(sum=terms.sum.detach()))

    def stillness(self) -> AbstractContextManager[None]:
        """Return a context without dropout; modules that draw other random numbers are in eval mode if that stops it."""
        model, _ = self.captured
        if self.module is None or not isinstance(model, CapturedModel):
            return WithoutDropout()
        return still(self.module, model.without_key(self.batch).parts)

    @cached_property
    def still(self) -> list[Run]:
        """Runs of the batch, and then of each of its microbatches, without dropout.

        Raises:
            ForwardError: see `run`.
        """
        return [self.run_still(each) for each in (self.batch, *self.parts())]

    def terms(self, outputs: Any, batch: Mapping[str, Any]) -> LossTerms | None:
        """Return the loss of a run's outputs; None if there is none."""
        try:
            return evaluate(self.loss, outputs, batch)
        except Exception:  # C3 reports why
            return None

    def gradients(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return gradients of the loss, or else of the sum of all outputs, for the parameters that have one."""
        terms = self.terms(outputs, batch)
        leaves = [terms.sum] if terms is not None else tree.leaves_and_spec(outputs)[0]
        roots = [leaf.sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if not roots or not self.trainable:
            return {}
        total = sum(root.real.double() for root in roots)
        found = torch.autograd.grad(total, list(self.trainable.values()), allow_unused=True)  # type: ignore[arg-type]
        return {name: grad for name, grad in zip(self.trainable, found, strict=True) if grad is not None}

    @cached_property
    def snapshot(self) -> Snapshot | None:
        """The module's contents before any check; None for a model, which keeps nothing."""
        return Snapshot(self.module, values=True) if self.module is not None else None

    def restore(self) -> None:
        """Undo what the last runs left behind."""
        if self.snapshot is not None:
            self.snapshot.restore()

    @cached_property
    def first(self) -> First:
        """The first forward on the whole batch."""
        first = First()
        try:
            first.outputs = self.run(self.batch, mode=self._observing(first))
            if self.snapshot is not None:
                first.changes = self.snapshot.changes()
        except ForwardError as error:
            first.error = str(error)
        finally:
            self.restore()
        return first

    @contextmanager
    def _observing(self, first: First) -> Iterator[None]:
        before = _drawn_so_far()
        with watching(self.module) if self.module is not None else nullcontext(Watched()) as first.watched:
            yield
        first.draws += [name for name, state in _drawn_so_far().items() if state != before[name]]

    @cached_property
    def captured(self) -> tuple[Model | None, str]:
        """The model captured from the module, or why it cannot be captured."""
        if self.module is None:
            return self.model, ""
        try:
            return capture_module(self.module, self.batch, inputs=self.inputs), ""
        except AutofuncError as error:
            return None, str(error)
        except Exception as error:  # failures that capture has no message for
            return None, f"{self.name} cannot be captured: {in_brief(error)}"
        finally:
            self.restore()

    def parts(self, batch: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Cut the batch, or one like it, into two microbatches, or into a few more if two do not divide its rows.

        Returns one piece if it has one row, or its rows cannot be cut.
        """
        batch = self.batch if batch is None else batch
        count = next((count for count in range(2, self.rows + 1) if self.rows % count == 0), 1)
        dims: BatchDims = self.batch_dims
        if not isinstance(dims, int):
            others = (name for name in batch if name != self.key_name)
            dims = {name: 0 if self.has_rows(batch[name]) else None for name in others} | dict(dims or {})
        try:
            return list(split_batch(batch, count, batch_dims=dims, key_name=self.key_name))
        except BatchError:
            return [dict(batch)]

    def has_rows(self, entry: Any) -> bool:
        """Return whether any tensor of an entry has the batch's rows in dim 0."""
        leaves = tree.leaves_and_spec(entry)[0]
        return any(isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.rows for leaf in leaves)


def _drawn_so_far() -> dict[str, Any]:
    """Return the states of the generators that no captured graph could draw from."""
    return {"Python's random": random.getstate(), "numpy.random": pickle.dumps(np.random.get_state())}


def _rows(batch: Mapping[str, Any], key_name: str) -> int:
    sizes: dict[int, int] = {}
    for name, value in batch.items():
        for leaf in tree.leaves_and_spec(value)[0] if name != key_name else ():
            if isinstance(leaf, Tensor) and leaf.dim() > 0:
                sizes[leaf.shape[0]] = sizes.get(leaf.shape[0], 0) + 1
    if not sizes:
        raise BatchError(
            f"no tensor in the batch has rows: {', '.join(map(str, batch)) or 'it is empty'}; expected a mapping"
        )
    most = [size for size, count in sizes.items() if count == max(sizes.values())]
    if len(most) > 1:
        raise BatchError(
            f"cannot tell the batch size: tensors have {most[0]} rows and {most[1]}; say which: rows={most[0]}"
        )
    return most[0]


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
