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
    """Return a model with frozen weights whose changes are products of two small trainable factors (LoRA).

    Wherever the model multiplies by a weight W (out, in), `alpha / rank * (x A^T) B^T` is added. W + B A is never
    materialised, and W costs no gradient. An operator that uses W in any other way gets W plus its change, with a warning.
    Factors have PEFT's names, `q_proj.lora_A.weight` and `q_proj.lora_B.weight`. A is random, from (seed, path), and B is
    zero, so the model's initial outputs do not change. Source: Hu et al., arXiv 2106.09685.

    Args:
        model: any; not modified. Its own trainable patterns are ignored.
        targets: names or shell-style patterns of parts or weights, matched at the end of a path: `["q_proj", "*.mlp.*"]`;
            or "all-linear", every weight the model multiplies by, except the output layer's.
        rank: columns of B.
        alpha: see above.
        dropout: of the factors' input x, from the key of the microbatch; without a key there is none.
        exclude: names or patterns of weights without an adapter.
        modules_to_save: names or patterns of parts to train in full, such as a new head.
        use_rslora: divide alpha by the square root of the rank.
        example_batch: for a model of named layers, to see how it reads its weights; needed for "all-linear", and for
            weights stored as (in, out). A captured model has its own.

    Returns:
        A model for `af.split`; `merge_lora` returns the plain one, and `save_adapter` writes files that PEFT loads.

    Raises:
        ModelError: for patterns that match no weight an adapter fits, and invalid sizes. At run time, for a weight that the
            layer does not multiply by.

    Example:
        model = af.lora(af.from_module(module, batch), ["q_proj", "v_proj"], rank=8)
        pipe = af.pipeline(af.split(model, ["layers.4"]), schedule)
    """
    if isinstance(model, AdaptedModel):
        raise ModelError(
            f"{model.title} already has adapters; merge them first (af.merge_lora), or name all targets at once"
        )
    size = Rank(rank, alpha, dropout, use_rslora)
    plan = plan_of(model, targets, exclude, size, example_batch)
    saved = _parameters_of(model, modules_to_save)
    both = [path for path in plan if model.canonical(path) in saved]
    if both:
        raise ModelError(
            f"lora: {part_of(both[0])!r} is in targets and in modules_to_save, which trains it in full; remove it from one"
        )
    return AdaptedModel(model, plan, saved)


def merge_lora(model: Model, params: tree.Nested) -> tuple[Model, TensorDict]:
    """Return the model without adapters, and its parameters with the changes added: W + alpha / rank * B A.

    Args:
        model: returned by `lora`.
        params: its full tree; on several processes `pipe.gather(params)`.

    Raises:
        ModelError: for a model without adapters, missing parameters, and an adapter of a weight that is tied to one
            without an adapter.

    Example:
        plain, params = af.merge_lora(model, params)
    """
    adapted = require_adapted(model, "merge_lora")
    return adapted.base, tree.to_tensordict(adapted.merged(params))


def _parameters_of(model: Model, patterns: Sequence[str]) -> list[str]:
    """Return the canonical paths of the parameters in parts that match these patterns."""
    paths = list(dict.fromkeys(model.canonical(path) for path in model.spec))
    found: dict[str, None] = {}
    for pattern in patterns:
        own = [path for path in paths if any(tree.matches(part, [pattern, f"*.{pattern}"]) for part in _parts(path))]
        if not own:
            known = {part: None for path in paths for part in _parts(path)}
            raise ModelError(f"lora: modules_to_save {pattern!r} matches no part; {one_of(pattern, known)}")
        found.update(dict.fromkeys(own))
    return list(found)


def _parts(path: str) -> list[str]:
    """Return the parts that contain a parameter, and the parameter itself: `h`, `h.0`, `h.0.attn`, ..."""
    names = tree.split_path(path)
    return [tree.join(*names[: number + 1]) for number in range(len(names))]
