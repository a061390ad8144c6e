"""The choice of weights that get an adapter: those of named parts, or all that a model multiplies by."""

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
"""PEFT's word for every weight the model multiplies by, except the output layer's."""

_MULTIPLIED = {How.LINEAR, How.TIMES, How.BEFORE, How.EINSUM, How.EINSUM_OVER_ROWS}
_OVER_ROWS = {How.TIMES, How.EINSUM_OVER_ROWS}
_OF_TURNED = {
    How.LINEAR: How.TIMES, How.TIMES: How.LINEAR, How.EINSUM: How.EINSUM_OVER_ROWS, How.EINSUM_OVER_ROWS: How.EINSUM,
}  # fmt: skip

Seen = Mapping[str, set[How]]
"""How each weight is read, by its home."""


def home_of(base: Model, holder: str) -> str:
    """Return the home of a weight: one name per part, whichever layer runs it, because a part has one adapter.

    Weights tied between parts, such as an embedding and a head, have a home for each part.
    """
    canonical = base.canonical(holder)
    if holder == canonical or not isinstance(base, CapturedModel):
        return holder
    if holder.partition("@")[0] == canonical:
        return canonical
    first, second = (path.rpartition(".")[0] for path in (canonical, holder))
    return canonical if base.module.get_submodule(first) is base.module.get_submodule(second) else holder


def homes_of(base: Model) -> dict[str, Tensor]:
    """Return the weights an adapter fits (floating point, two dims), by their homes."""
    found = {home_of(base, path): leaf for path, leaf in base.spec.items()}
    return {path: leaf for path, leaf in found.items() if leaf.dim() == 2 and leaf.is_floating_point()}


def plan_of(
    base: Model, targets: Sequence[str] | str, exclude: Sequence[str], size: Rank, example: Mapping[str, Any] | None
) -> Plan:
    """Return the adapters of the targeted weights.

    Args:
        base: the model.
        targets: names or patterns of parts or weights, matched at the end of a path; or `ALL_LINEAR`.
        exclude: names or patterns of weights without an adapter.
        size: of each adapter.
        example: a batch to trace the model on; a captured model has one.

    Raises:
        ModelError: for patterns that match no weight an adapter fits.
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
    """Return whether a pattern matches the path of a weight or of its part, whole or at the end after a dot."""
    names = {path, part_of(path)}
    return any(tree.matches(name, [pattern, f"*.{pattern}"]) for name in names for pattern in patterns)


def _named(what: str, patterns: Sequence[str], weights: Mapping[str, Tensor], all_: Mapping[str, Tensor]) -> list[str]:
    for pattern in patterns:
        if any(matching(path, [pattern]) for path in weights):
            continue
        other = next((path for path in all_ if matching(path, [pattern])), None)
        if other is not None:
            raise ModelError(
                f"lora: {what} {pattern!r} matches {other!r} of shape {tuple(all_[other].shape)}; an adapter fits weights "
                f"of two dims, such as {some_of(map(part_of, weights), 3)}"
            )
        raise ModelError(f"lora: {what} {pattern!r} matches no weight; {one_of(pattern, _endings(weights))}")
    return [path for path in weights if matching(path, patterns)]


def _endings(weights: Iterable[str]) -> list[str]:
    """Return the last names of the weights' parts, without repeats: `q_proj`."""
    return list(dict.fromkeys(part_of(path).rpartition(".")[2] for path in weights))


def _all_linear(base: Model, weights: Mapping[str, Tensor], reads: Seen | None) -> list[str]:
    """Return the weights that are only multiplied by, except the output layer's."""
    if reads is None:
        raise ModelError(
            f"lora: targets={ALL_LINEAR!r} has to trace {base.title} on a batch to see which weights it multiplies by: "
            "give example_batch=..., or name the targets"
        )
    return [path for path in weights if reads.get(path) and reads[path] <= _MULTIPLIED and not _is_output(base, path)]


def _is_output(base: Model, path: str) -> bool:
    """Return whether a weight is the only matrix of the model's last layer: a head."""
    last = next(reversed(base.layers))
    own = {home_of(base, each) for each in base.spec if base.layer_of(each) == last and base.spec[each].dim() == 2}
    return own == {path}


def _refuse_lookups(wanted: Sequence[str], reads: Seen | None) -> None:
    looked_up = [path for path in wanted if How.LOOKED_UP in (reads or {}).get(path, set())]
    if looked_up:
        raise ModelError(
            f"lora: {part_of(looked_up[0])!r} is a lookup table, and adapters fit only weights the model multiplies by. "
            "Leave it out (exclude), and name it in modules_to_save to train it in full"
        )


def _adapter(path: str, weight: Tensor, size: Rank, reads: Seen | None) -> Adapter:
    rows, columns = weight.shape
    return Adapter(size, (rows, columns), is_in_out(path, reads))


def is_in_out(path: str, reads: Seen | None) -> bool:
    """Return whether a weight is stored as (in, out): every read multiplies by it untransposed."""
    seen = (reads or {}).get(path, set())
    return bool(seen) and seen <= _OVER_ROWS


# --- how a model reads its weights


class _Noted(Reads):
    """Records how weights are read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[How]] = {}

    def read(self, func: Callable[..., Any], how: How, args: Sequence[Any], kwargs: Mapping[str, Any], known: Any) -> Any:
        """See `Reads.read`; each known tensor carries (its weight's path, whether it is transposed)."""
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
    """Return how each weight is read, by its home; None without a batch to trace the model on."""
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
