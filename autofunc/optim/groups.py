"""Parameter groups: optimizer options overridden for some parameters, by patterns of their paths."""

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
"""The parameters with weight decay: all, or those with two or more dims, which excludes biases and norms."""

_OWN_KEYS = ("pattern", "lr_mult", "wd_mult")


@dataclass(frozen=True)
class Groups:
    """The options of each parameter.

    Args:
        overrides: mappings with a "pattern" of paths, and the options those parameters override, or "lr_mult" and
            "wd_mult", factors of learning rate and weight decay. The first pattern a path matches applies.
        decay: one of `DECAYS`; a group with its own weight decay keeps it.

    Raises:
        ModelError: for a group without a pattern, an invalid factor, and an unknown decay.
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
        """Return (parameter groups for an optimizer, learning rate factor of each group).

        The number of groups does not depend on the parameters, so that an optimizer's state of a group finds it again.

        Args:
            leaves: parameters by path.
            factory: of the optimizer.
            options: of parameters in no group.

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
        """Return the key of a parameter's group, (number of the override or None, whether weight decay applies)."""
        matching = (number for number, group in enumerate(self.overrides) if tree.matches(path, [group["pattern"]]))
        return next(matching, None), self.decay == ALL or leaf.dim() >= 2

    def _keys(self) -> list[tuple[int | None, bool]]:
        numbers = [*range(len(self.overrides)), None]
        return [(number, decays) for number in numbers for decays in ((True,) if self.decay == ALL else (True, False))]

    def option_names(self) -> set[str]:
        """Return the names of the options that groups override."""
        return {name for group in self.overrides for name in group if name not in _OWN_KEYS}


def check_patterns(patterns: Sequence[str], paths: Iterable[str], what: str) -> None:
    """Refuse a pattern that matches nothing.

    Raises:
        ModelError: naming the nearest path.
    """
    known = list(paths)
    unused = [pattern for pattern in patterns if not any(tree.matches(path, [pattern]) for path in known)]
    if unused:
        raise ModelError(f"{what} {unused[0]!r} matches none of its parameters; {one_of(unused[0], known)}")


def option_of(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """Return an optimizer's option, given or default; None if it has no such option."""
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
            f"{asked_by} needs the {name} of {getattr(factory, '__name__', factory)}, which "
            + ("is 0" if value is not None else "has none")
            + f"; give {name}=..."
        )
    return value
