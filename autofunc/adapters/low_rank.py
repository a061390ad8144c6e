"""`af.lora` and `af.merge_lora`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tensordict import TensorDict

from autofunc import tree
from autofunc.adapters.adapter import Rank, part_of
from autofunc.adapters.model import AdaptedModel, require_adapted
from autofunc.adapters.targets import plan_of
from autofunc.errors import ModelError, one_of
from autofunc.model import Model


def lora(
    model: Model,
    targets: Sequence[str] | str,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    *,
    exclude: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    use_rslora: bool = False,
    example_batch: Mapping[str, Any] | None = None,
) -> AdaptedModel:
    """A model whose weights are frozen, and change by products of two small factors, which are trained (LoRA).

    Where the model multiplies by a weight W (out, in) it adds `alpha / rank * (x A^T) B^T`. W + B A is never made, and W
    costs no gradient. An operator that does something else with W gets W with its change added, and a warning says so.
    Factors have the names that PEFT gives them, `q_proj.lora_A.weight` and `q_proj.lora_B.weight`. A is random, from
    (seed, path), and B zero, so that the model starts as it was.

    Args:
        model: any; it stays as it is. What it trains does not matter.
        targets: names or shell-style patterns of parts or weights, of which the end is enough: `["q_proj", "*.mlp.*"]`; or
            "all-linear", whatever is multiplied by, but for the output layer.
        rank: columns of B.
        alpha: see above.
        dropout: of the x that the factors multiply, from the key of the microbatch; without a key there is none.
        exclude: names or patterns of those that get none.
        modules_to_save: names or patterns of parts that are trained whole, such as a new head.
        use_rslora: divide alpha by the root of the rank.
        example_batch: of a model of named layers, to see how it reads its weights: for "all-linear", and for weights that
            are stored as (in, out). A captured model has its own.

    Returns:
        A model for `af.split`; `merge_lora` gives the plain one back, and `save_adapter` writes what PEFT loads.

    Raises:
        ModelError: for patterns that name nothing that an adapter fits, and sizes that are none. When it runs, for a weight
            that the layer does not multiply by.

    Example:
        model = af.lora(af.from_module(module, batch), ["q_proj", "v_proj"], rank=8)
        pipe = af.pipeline(af.split(model, ["layers.4"]), schedule)
    """
    if isinstance(model, AdaptedModel):
        raise ModelError(
            f"{model.title} has adapters already; merge them first (af.merge_lora), or name all targets at once"
        )
    size = Rank(rank, alpha, dropout, use_rslora)
    plan = plan_of(model, targets, exclude, size, example_batch)
    saved = _parameters_of(model, modules_to_save)
    both = [path for path in plan if model.canonical(path) in saved]
    if both:
        raise ModelError(
            f"lora: {part_of(both[0])!r} is in targets and in modules_to_save, which trains it whole; leave one out"
        )
    return AdaptedModel(model, plan, saved)


def merge_lora(model: Model, params: tree.Nested) -> tuple[Model, TensorDict]:
    """The model without adapters, and its parameters with their changes added: W + alpha / rank * B A.

    Args:
        model: what `lora` gave.
        params: its full tree; on several processes `pipe.gather(params)`.

    Raises:
        ModelError: for a model without adapters, for parameters that are missing, and for an adapter of a weight that is
            tied to one without.

    Example:
        plain, params = af.merge_lora(model, params)
    """
    adapted = require_adapted(model, "merge_lora")
    return adapted.base, tree.to_tensordict(adapted.merged(params))


def _parameters_of(model: Model, patterns: Sequence[str]) -> list[str]:
    """Canonical paths of the parameters in parts with these names."""
    paths = list(dict.fromkeys(model.canonical(path) for path in model.spec))
    found: dict[str, None] = {}
    for pattern in patterns:
        own = [path for path in paths if any(tree.matches(part, [pattern, f"*.{pattern}"]) for part in _parts(path))]
        if not own:
            known = {part: None for path in paths for part in _parts(path)}
            raise ModelError(f"lora: modules_to_save {pattern!r} names no part; {one_of(pattern, known)}")
        found.update(dict.fromkeys(own))
    return list(found)


def _parts(path: str) -> list[str]:
    """The parts that a parameter is in, and itself: `h`, `h.0`, `h.0.attn`, ..."""
    names = tree.split_path(path)
    return [tree.join(*names[: number + 1]) for number in range(len(names))]
