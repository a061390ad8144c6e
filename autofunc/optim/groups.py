"""Parameter groups: options of an optimizer that some parameters have otherwise, by patterns of their paths."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from autofunc import tree
from autofunc.errors import ModelError, one_of

ALL, MATRICES = "all", "matrices"
DECAYS = (ALL, MATRICES)
"""Which parameters weight decay is of: all, or those with two dims or more, and so no biases and norms."""

_OWN_KEYS = ("pattern", "lr_mult", "wd_mult")


@dataclass(frozen=True)
class Groups:
    """The options of each parameter.

    Args:
        overrides: each a "pattern" of paths, and what those have otherwise: options of the optimizer, or "lr_mult" and
            "wd_mult", factors of its learning rate and weight decay. A parameter has those of the first that it matches.
        decay: one of `DECAYS`; a group with a weight decay of its own has that.

    Raises:
        ModelError: for a group without a pattern, a factor that is none, and a decay that is unknown.
    """

    overrides: tuple[Mapping[str, Any], ...] = ()
    decay: str = ALL

    def __post_init__(self) -> None:
        if self.decay not in DECAYS:
            raise ModelError(f"decay={self.decay!r}: {one_of(self.decay, DECAYS)}")
        for number, group in enumerate(self.overrides):
            where = f"param_groups[{number}]"
            if not isinstance(group, Mapping) or not isinstance(group.get("pattern"), str):
                raise ModelError(f"{where} is {group!r}; expected a mapping with a pattern of paths, such as '*.bias'")
            for short, option in (("lr_mult", "lr"), ("wd_mult", "weight_decay")):
                factor = group.get(short, 1.0)
                if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor >= 0:
                    raise ModelError(f"{where}.{short} is {factor!r}; expected a number of at least 0")
                if short in group and option in group:
                    raise ModelError(f"{where} has both {short} and {option}; give one of them")

    def of(
        self, leaves: Mapping[str, Tensor], factory: Callable[..., Any], options: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], list[float]]:
        """The groups of some parameters, for an optimizer, and the factor of the learning rate of each.

        There are as many for any parameters, so that what an optimizer keeps of a group finds it again.

        Args:
            leaves: by path.
            factory: of the optimizer.
            options: of those that are in no group.

        Raises:
            ModelError: for a factor of an option that the optimizer does not have.
        """
        groups: dict[tuple[int | None, bool], list[Tensor]] = {key: [] for key in self._keys()}
        for path, leaf in leaves.items():
            groups[self.key_of(path, leaf)].append(leaf)
        made, factors = [], []
        for (number, decays), members in groups.items():
            override = copy.deepcopy(dict(self.overrides[number])) if number is not None else {}
            given = {name: value for name, value in override.items() if name not in _OWN_KEYS}
            if "wd_mult" in override:
                given["weight_decay"] = override["wd_mult"] * _known("weight_decay", "wd_mult", factory, options)
            if not decays and "weight_decay" not in override:
                _known("weight_decay", f"decay={self.decay!r}", factory, options)
                given["weight_decay"] = 0.0
            factor = float(override.get("lr_mult", 1.0))
            if "lr" in override:
                factor = override["lr"] / _known("lr", "lr of a group", factory, options)
            elif "lr_mult" in override:
                given["lr"] = factor * _known("lr", "lr_mult", factory, options)
            made.append({"params": members, **given})
            factors.append(factor)
        return made, factors

    def key_of(self, path: str, leaf: Tensor) -> tuple[int | None, bool]:
        """Equal for parameters with the same options."""
        matching = (number for number, group in enumerate(self.overrides) if tree.matches(path, [group["pattern"]]))
        return next(matching, None), self.decay == ALL or leaf.dim() >= 2

    def _keys(self) -> list[tuple[int | None, bool]]:
        numbers = [*range(len(self.overrides)), None]
        return [(number, decays) for number in numbers for decays in ((True,) if self.decay == ALL else (True, False))]

    def option_names(self) -> set[str]:
        """Names of the options that groups have otherwise."""
        return {name for group in self.overrides for name in group if name not in _OWN_KEYS}


def check_patterns(patterns: Sequence[str], paths: Iterable[str], what: str) -> None:
    """Refuse a pattern that matches nothing.

    Raises:
        ModelError: naming the nearest path.
    """
    known = list(paths)
    unused = [pattern for pattern in patterns if not any(tree.matches(path, [pattern]) for path in known)]
    if unused:
        raise ModelError(f"{what} {unused[0]!r} matches none of the parameters that it takes; {one_of(unused[0], known)}")


def option_of(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """An option of an optimizer: given, or its default; None where it has none of that name."""
    if name in options:
        return options[name]
    try:
        parameter = inspect.signature(factory).parameters.get(name)
    except (TypeError, ValueError):
        return None
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _known(name: str, asked_by: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    value = option_of(name, factory, options)
    if value is None or (name == "lr" and not value):
        raise ModelError(
            f"{asked_by} needs a {name} of {getattr(factory, '__name__', factory)} to go by, which "
            + ("is 0" if value is not None else "has none")
            + f"; give {name}=..."
        )
    return value
