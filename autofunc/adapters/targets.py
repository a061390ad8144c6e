"""Which weights get an adapter: those whose parts are named, or all that a model multiplies by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from autofunc import tree
from autofunc.adapters.adapter import Adapter, Plan, Rank, part_of
from autofunc.adapters.reads import How, Reads
from autofunc.captured.model import CapturedModel
from autofunc.errors import ModelError, one_of, some_of
from autofunc.fake import fake_like, fake_mode, naming_errors
from autofunc.model import Model

ALL_LINEAR: Literal["all-linear"] = "all-linear"
"""PEFT's word for every weight that is multiplied by, but for the output layer's."""

_MULTIPLIED = {How.LINEAR, How.TIMES, How.BEFORE, How.EINSUM, How.EINSUM_OVER_ROWS}
_OVER_ROWS = {How.TIMES, How.EINSUM_OVER_ROWS}
_OF_TURNED = {
    How.LINEAR: How.TIMES, How.TIMES: How.LINEAR, How.EINSUM: How.EINSUM_OVER_ROWS, How.EINSUM_OVER_ROWS: How.EINSUM,
}  # fmt: skip

Seen = Mapping[str, set[How]]
"""By the home of a weight: how it is read."""


def home_of(base: Model, holder: str) -> str:
    """The name that one part's weight has, whichever layer uses it: the part's adapter is one wherever the part runs.

    Weights that are tied between parts, as an embedding and a head, are of two parts.
    """
    canonical = base.canonical(holder)
    if holder == canonical or not isinstance(base, CapturedModel):
        return holder
    if holder.partition("@")[0] == canonical:
        return canonical
    first, second = (path.rpartition(".")[0] for path in (canonical, holder))
    return canonical if base.module.get_submodule(first) is base.module.get_submodule(second) else holder


def homes_of(base: Model) -> dict[str, Tensor]:
    """The weights that may have an adapter, by the names of their homes."""
    found = {home_of(base, path): leaf for path, leaf in base.spec.items()}
    return {path: leaf for path, leaf in found.items() if leaf.dim() == 2 and leaf.is_floating_point()}


def plan_of(
    base: Model, targets: Sequence[str] | str, exclude: Sequence[str], size: Rank, example: Mapping[str, Any] | None
) -> Plan:
    """The adapters that are wanted.

    Args:
        base: the model.
        targets: names of parts or weights, or patterns, of which the end is enough; or `ALL_LINEAR`.
        exclude: those that get none.
        size: of each.
        example: a batch that the model can be followed on; a captured model has one.

    Raises:
        ModelError: for patterns that name nothing that an adapter fits.
    """
    found = {home_of(base, path): leaf for path, leaf in base.spec.items()}
    weights, reads = homes_of(base), reads_of(base, example)
    if isinstance(targets, str) and targets == ALL_LINEAR:
        wanted = _all_linear(base, weights, reads)
    else:
        wanted = _named("targets", [targets] if isinstance(targets, str) else targets, weights, found)
        _refuse_lookups(wanted, reads)
    left_out = set(_named("exclude", exclude, weights, found)) if exclude else set()
    wanted = [path for path in wanted if path not in left_out]
    if not wanted:
        raise ModelError(f"lora: targets={targets!r} without exclude={list(exclude)} leaves no weight to adapt")
    return {path: _adapter(path, weights[path], size, reads) for path in wanted}


def matching(path: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern, or what ends with it after a dot, is the name of a weight or of the part it is in."""
    names = {path, part_of(path)}
    return any(tree.matches(name, [pattern, f"*.{pattern}"]) for name in names for pattern in patterns)


def _named(what: str, patterns: Sequence[str], weights: Mapping[str, Tensor], all_: Mapping[str, Tensor]) -> list[str]:
    for pattern in patterns:
        if any(matching(path, [pattern]) for path in weights):
            continue
        other = next((path for path in all_ if matching(path, [pattern])), None)
        if other is not None:
            raise ModelError(
                f"lora: {what} {pattern!r} names {other!r} of shape {tuple(all_[other].shape)}; an adapter fits weights of "
                f"two dims, such as {some_of(map(part_of, weights), 3)}"
            )
        raise ModelError(f"lora: {what} {pattern!r} names no weight; {one_of(pattern, _endings(weights))}")
    return [path for path in weights if matching(path, patterns)]


def _endings(weights: Iterable[str]) -> list[str]:
    """What weights are named by, without what all blocks repeat: `q_proj`."""
    return list(dict.fromkeys(part_of(path).rpartition(".")[2] for path in weights))


def _all_linear(base: Model, weights: Mapping[str, Tensor], reads: Seen | None) -> list[str]:
    """Those that are multiplied by and nothing else, in layers that another comes after."""
    if reads is None:
        raise ModelError(
            f"lora: targets={ALL_LINEAR!r} has to follow {base.title} on a batch to see by what it multiplies: give "
            "example_batch=..., or name the targets"
        )
    return [path for path in weights if reads.get(path) and reads[path] <= _MULTIPLIED and not _is_output(base, path)]


def _is_output(base: Model, path: str) -> bool:
    """Whether a weight is that of the model's last layer, if this has no other: a head."""
    last = next(reversed(base.layers))
    own = {home_of(base, each) for each in base.spec if base.layer_of(each) == last and base.spec[each].dim() == 2}
    return own == {path}


def _refuse_lookups(wanted: Sequence[str], reads: Seen | None) -> None:
    looked_up = [path for path in wanted if How.LOOKED_UP in (reads or {}).get(path, set())]
    if looked_up:
        raise ModelError(
            f"lora: {part_of(looked_up[0])!r} is looked up, and adapters fit weights that something is multiplied by. "
            "Leave it out (exclude), and name it in modules_to_save to train it whole"
        )


def _adapter(path: str, weight: Tensor, size: Rank, reads: Seen | None) -> Adapter:
    rows, columns = weight.shape
    return Adapter(size, (rows, columns), is_in_out(path, reads))


def is_in_out(path: str, reads: Seen | None) -> bool:
    """Whether a weight is stored as (in, out): wherever it is read, something is multiplied by it as it is."""
    seen = (reads or {}).get(path, set())
    return bool(seen) and seen <= _OVER_ROWS


# --- how a model reads its weights


class _Noted(Reads):
    """Notes how weights are read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[How]] = {}

    def read(self, func: Callable[..., Any], how: How, args: Sequence[Any], kwargs: Mapping[str, Any], known: Any) -> Any:
        """See `Reads.read`; what is known of a tensor is its weight's path, and whether it is turned."""
        result = func(*args, **kwargs)
        path, is_turned = next(iter(known.values()))
        if how in (How.TURNED, How.CONVERTED):
            return self.know(result, (path, is_turned != (how is How.TURNED)))
        if how is How.LIKE or not any(isinstance(leaf, Tensor) for leaf in tree.leaves_and_spec(result)[0]):
            return result
        seen = _OF_TURNED.get(how, how) if is_turned else how
        for each, _ in known.values():
            self.found.setdefault(each, set()).add(seen)
        return result


def reads_of(base: Model, example: Mapping[str, Any] | None) -> Seen | None:
    """How each weight is read, by its home; None without a batch to follow the model on."""
    batch = base.example if isinstance(base, CapturedModel) else example
    if batch is None:
        return None
    batch = base.with_needed_key(batch)
    specialised = base.specialise(batch)
    noted = _Noted()
    with fake_mode() as mode, torch.no_grad(), naming_errors(f"lora: {base.title}"):
        leaves = {path: torch.empty(leaf.shape, dtype=leaf.dtype, device=base.device) for path, leaf in base.spec.items()}
        states = {path: torch.empty_like(leaf, device=base.device) for path, leaf in base.state_spec.items()}
        microbatch = tree.map_leaves(lambda leaf: fake_like(mode, leaf) if isinstance(leaf, Tensor) else leaf, dict(batch))
        microbatch.setdefault(base.key_name, None)
        for path, leaf in leaves.items():
            if leaf.dim() == 2:
                noted.know(leaf, (home_of(base, path), False))
        with noted:
            specialised.run(list(base.layers), base.layer_trees(leaves), None, microbatch, base.state_by_layer(states))
    return noted.found
