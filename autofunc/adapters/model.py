"""A model with adapters: a frozen base, with trainable low-rank factors beside some of its weights."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from autofunc import tree
from autofunc.adapters.adapter import HELD, A, B, Held, Plan, factor_path
from autofunc.adapters.layer_function import with_adapters
from autofunc.adapters.targets import home_of
from autofunc.captured.model import Shared
from autofunc.errors import ModelError
from autofunc.model import Model, Specialised, TensorParallel
from autofunc.model.stored import Stored
from autofunc.random import InitKey
from autofunc.spread import sharded_dim


class AdaptedModel(Model):
    """A model whose layers run with adapters; made by `af.lora`.

    Args:
        base: the plain model; not modified.
        plan: adapters by the path of their weight in `base`.
        saved: canonical paths of the parameters of `base` to train in full.
        stored: initial values of the factors and of `saved`; with None, A comes from the seed, B is zero, and `saved`
            starts from the base's values.

    Raises:
        ModelError: if the base already has a parameter with the path of a factor.
    """

    def __init__(self, base: Model, plan: Plan, saved: Sequence[str] = (), stored: Stored | None = None) -> None:
        self.base, self.plan, self.saved = base, dict(plan), tuple(saved)
        homes = {path: home_of(base, path) for path in base.spec}
        self.adapted = {path: home for path, home in homes.items() if home in self.plan}  # holder -> weight
        self._of_factor: dict[str, tuple[str, str]] = {}  # path of a factor -> name of the factor, holder
        ties = dict(base.ties)
        for holder, home in self.adapted.items():
            for name in (A, B):
                path = _factor_of(holder, home, name)
                if path in base.spec:
                    raise ModelError(
                        f"{base.title} already has a parameter {path!r}, the path that an adapter of {home!r} needs"
                    )
                self._of_factor[path] = name, holder
                if holder != home:
                    ties[path] = factor_path(home, name)
        trained = [path for path in self._of_factor if path not in ties]
        super().__init__(
            base.layers, ties=ties, config=base.config, trainable=[glob.escape(path) for path in (*trained, *self.saved)],
            tensor_parallel=base.tensor_parallel,
        )  # fmt: skip
        self.stored = stored
        self.notes, self.frozen, self.state_spec = base.notes, base.frozen, base.state_spec
        self.uncut = base.uncut or base.uncut_with_adapters

    def _check_names(self, layers: Iterable[str]) -> None:
        """Do nothing: the base has checked them."""

    def cut_before(self, names: Sequence[str]) -> AdaptedModel:
        """See `Model.cut_before`."""
        base = self.base.cut_before(names)
        return self if base is self.base else AdaptedModel(base, self.plan, self.saved, self.stored)

    # --- the properties of `Model`, for the base and the factors

    @property
    def key_name(self) -> str:  # type: ignore[override]
        """See `Model.key_name`."""
        return self.base.key_name

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """See `Model.device`."""
        return self.base.device

    @property
    def title(self) -> str:
        """See `Model.title`."""
        return self.base.title

    @cached_property
    def spec(self) -> dict[str, Tensor]:
        """See `Model.spec`: the base's parameters and the factors."""
        made = dict(self.base.spec)
        for path, (name, holder) in self._of_factor.items():
            shape, like = self.plan[self.adapted[holder]].shapes[name], made[holder]
            made[path] = torch.empty(shape, dtype=like.dtype, device="meta")
        self._check_trainable(made)
        return {path: made[path] for path in sorted(made, key=tree.split_path)}

    @property
    def expert_paths(self) -> frozenset[str]:
        """See `Model.expert_paths`: those of the base."""
        return self.base.expert_paths

    def layer_of(self, path: str) -> str | None:
        """See `Model.layer_of`."""
        return self.base.layer_of(self._of_factor[path][1] if path in self._of_factor else path)

    def inner_path(self, path: str) -> str:
        """See `Model.inner_path`."""
        if path not in self._of_factor:
            return self.base.inner_path(path)
        name, holder = self._of_factor[path]
        return tree.join(HELD[name], self.base.inner_path(holder))

    def has_own_value(self, path: str) -> bool:
        """See `Model.has_own_value`."""
        if self.stored is not None and path in self.stored.shapes:
            return True
        return path not in self._of_factor and self.base.has_own_value(path)

    def with_needed_key(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See `Model.with_needed_key`."""
        return self.base.with_needed_key(batch)

    # --- values

    def init_paths(
        self, paths: Iterable[str], seed: int, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        """See `Model.init_paths`: the base's values, and the factors from `stored` or (seed, path)."""
        wanted = sorted({self.canonical(path) for path in paths}, key=tree.split_path)
        is_real = torch.device(device).type != "meta"
        stored = [path for path in wanted if is_real and self.stored is not None and path in self.stored.shapes]
        own = [path for path in wanted if path in self._of_factor and path not in stored]
        made = self.base.init_paths(set(wanted).difference(stored, own), seed, device, dtype)
        if self.stored is not None:
            read = self.stored.read(stored)
            made |= {path: leaf.to(device, dtype or self.spec[path].dtype, copy=True) for path, leaf in read.items()}
        for path in own:
            name, holder = self._of_factor[path]
            key = InitKey(seed, path, torch.device(device), dtype or self.spec[path].dtype)
            made[path] = self.plan[self.adapted[holder]].initial(name, key)
        return {path: made[path] for path in wanted}

    def init_state_paths(self, paths: Iterable[str] | None, device: torch.device | str) -> dict[str, Tensor]:
        """See `Model.init_state_paths`."""
        return self.base.init_state_paths(paths, device)

    def merged(self, params: tree.Nested) -> dict[str, Tensor]:
        """Return the base's parameters with the changes added, by canonical path.

        Raises:
            ModelError: if a weight is missing, or is tied to one that its adapter does not change.
        """
        flat = tree.flatten(params)
        made = {self.base.canonical(path): self.lookup(flat, path) for path in self.base.spec}
        for home in dict.fromkeys(self.adapted.values()):
            canonical = self.base.canonical(home)
            others = [
                path
                for path in self.base.spec
                if self.base.canonical(path) == canonical and home_of(self.base, path) != home
            ]
            if others:
                raise ModelError(
                    f"{home!r} is tied to {others[0]!r}, which its adapter does not change, so merging would untie them; "
                    "save the adapter separately (af.save_adapter)"
                )
            a, b = (flat[factor_path(home, name)].detach() for name in (A, B))
            weight = made[canonical]
            made[canonical] = weight.detach() + self.plan[home].change(a, b).to(weight.dtype)
        return made

    def to_module(self, params: tree.Nested, state: tree.Nested | None = None) -> nn.Module:
        """See `Model.to_module`: the captured module, with the changes added to its weights."""
        return self.base.to_module(self.merged(params), state)

    # --- execution

    def specialise(
        self,
        microbatch: Mapping[str, Any] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        *,
        training: bool = True,
        over: Any = None,
    ) -> Specialised:
        """See `Model.specialise`: the base's functions, with changed products."""
        own = None if dtypes is None else {path: dtype for path, dtype in dtypes.items() if path not in self._of_factor}
        made, held = self.base.specialise(microbatch, own, training=training), self._held

        def programs(layers: Sequence[str]) -> list[Any]:
            shared, *each = made.programs(layers)
            return [shared, *((program, held.get(name)) for name, program in zip(layers, each, strict=True))]

        def adapted(functions: Mapping[str, Any]) -> dict[str, Any]:
            return {
                name: with_adapters(name, function, held[name], self._key) if name in held else function
                for name, function in functions.items()
            }

        return Specialised(adapted(made.functions), made.share, programs, made.cut_points, adapted(made.stateful))

    def _key(self, entries: Any) -> Tensor | None:
        return entries.key if isinstance(entries, Shared) else entries.get(self.key_name)

    @cached_property
    def _held(self) -> dict[str, tuple[Held, ...]]:
        """Adapters by layer, for the layers that have any."""
        found: dict[str, list[Held]] = {}
        for holder, home in self.adapted.items():
            found.setdefault(self.base.layer_of(holder) or "", []).append(
                Held(self.base.inner_path(holder), self.plan[home])
            )
        return {name: tuple(held) for name, held in found.items()}

    def spread_by(self, table: TensorParallel) -> TensorParallel:
        """See `Model.spread_by`: each factor's placement follows its weight's."""
        first: dict[str, str] = {}
        for home in self.adapted.values():
            cut_dim = sharded_dim(table.placement(self.base.canonical(home)))
            for name, placement in self.plan[home].placements(cut_dim).items():
                first[glob.escape(factor_path(home, name))] = placement
        return TensorParallel({**first, **table.params}, table.divisible)


def _factor_of(holder: str, home: str, name: str) -> str:
    """Return the path of a factor, given the path of a holder of its weight."""
    path = factor_path(home, name)
    return path if holder == home else f"{path}@{holder}"


def require_adapted(model: Model, what: str) -> AdaptedModel:
    """Return the model itself if it has adapters.

    Raises:
        ModelError: if it has none.
    """
    if not isinstance(model, AdaptedModel):
        raise ModelError(f"{what} takes a model returned by af.lora; {model.title} has no adapters")
    return model
