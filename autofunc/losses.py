"""The loss contract, and common losses.

A loss is a function `loss_fn(outputs, microbatch)` that returns a scalar mean (of weight 1), `(sum, weight)` or
`(sum, weight, aux)`. The loss of a step is the total of sums over the total of weights of all microbatches, so a
token-weighted mean is exact for any distribution of tokens over microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from autofunc import tree
from autofunc.chunked_entropy import chunked_entropy
from autofunc.errors import BatchError, ModelError, one_of
from autofunc.spread import current_spread

Loss = Callable[[Any, Mapping[str, Any]], Any]

REDUCTIONS = ("sum", "mean", "max", "cat")
IGNORED = -100
"""Label of tokens that do not count."""
NO_WEIGHT = f"the total weight of the loss is 0: no microbatch has a label to learn from (all are {IGNORED}?)"
"""Why a step has no loss, for messages."""


class LossTerms(NamedTuple):
    """Terms of one microbatch: `sum` (0-dim, differentiable), `weight` (0-dim fp32), `aux` (a pytree)."""

    sum: Tensor
    weight: Tensor
    aux: Any


def causal_lm(outputs: Any, microbatch: Mapping[str, Any], *, mask: str | None = None) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy in nats summed over labels other than -100, and their number; computed in fp32 or wider.

    Args:
        outputs: logits of shape (..., vocabulary), or a mapping or object with "logits". Logits that tp ranks hold cut
            along the vocabulary are not gathered.
        microbatch: `microbatch["labels"]`, int64 of shape (...), already aligned: `labels[..., t]` is the token that
            `logits[..., t, :]` predicts.
        mask: entry of the batch with the labels' shape, such as "loss_mask"; labels where it is 0 do not count either.

    Raises:
        BatchError: for outputs without logits, and for a mask that is missing or has a different shape.
    """
    logits = logits_of(outputs, "causal_lm")
    logits, labels = logits.flatten(0, -2), _counted_labels(microbatch, mask).flatten()
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    spread = current_spread()
    total = spread.cross_entropy(logits, labels) if spread is not None else None
    if total is None:
        total = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    return total, (labels != IGNORED).sum()


def logits_of(outputs: Any, taker: str) -> Tensor:
    """Return the logits among a model's outputs.

    Args:
        outputs: logits, or a mapping or object with "logits".
        taker: the calling function, for messages.

    Raises:
        BatchError: if there are none.
    """
    logits = _entry(outputs, "logits")
    logits = outputs if logits is None else logits
    if not isinstance(logits, Tensor):
        raise BatchError(
            f"{taker} takes logits, but the model's output ({type(outputs).__name__}) has no 'logits'"
            + ("; af.losses.chunked_causal_lm takes what it returns" if _entry(outputs, "hidden") is not None else "")
        )
    return logits


def chunked_causal_lm(
    outputs: Any, microbatch: Mapping[str, Any], *, num_chunks: int = 8, mask: str | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `causal_lm` chunk by chunk, so that the logits of only one chunk of tokens exist at a time.

    The backward recomputes them and returns the gradients of hidden states and weight from one pass, so with `I` and `W`
    separate, both come with `I`. Sums run chunk by chunk, so the last bits differ from those of `causal_lm`.

    Args:
        outputs: the result of `lazy_logits`: a mapping with "hidden" (..., features), "weight" (vocabulary, features) and,
            optionally, "bias" (vocabulary,).
        microbatch: `microbatch["labels"]`, int64 of shape (...), aligned as for `causal_lm`.
        num_chunks: number of pieces to cut a microbatch's tokens into.
        mask: see `causal_lm`.

    Raises:
        BatchError: for other outputs, and as `causal_lm`.
        ModelError: with tensor parallel ranks.
    """
    hidden, weight = _entry(outputs, "hidden"), _entry(outputs, "weight")
    if hidden is None or weight is None:
        raise BatchError(
            "chunked_causal_lm takes hidden states and the head's weight, but the model's output has no 'hidden' and "
            "'weight'; let its last layer return af.losses.lazy_logits(x, params[\"weight\"], batch), or use causal_lm"
        )
    if num_chunks < 1:
        raise BatchError(f"chunked_causal_lm: num_chunks={num_chunks}; expected at least 1")
    if current_spread() is not None:
        raise ModelError(
            "chunked_causal_lm does not work over tensor parallel ranks, which cut the weight and the logits along the "
            "vocabulary; use causal_lm, and a head that returns logits"
        )
    labels = _counted_labels(microbatch, mask).flatten()
    bias = _entry(outputs, "bias")
    return chunked_entropy(hidden.flatten(0, -2), weight, bias, labels, IGNORED, num_chunks), (labels != IGNORED).sum()


def lazy_logits(hidden: Tensor, weight: Tensor, batch: Mapping[str, Any], bias: Tensor | None = None) -> Any:
    """Return, in a last layer, the input of `chunked_causal_lm` if the batch has labels, else the logits.

    Args:
        hidden: (..., features).
        weight: (vocabulary, features).
        batch: of the layer.
        bias: (vocabulary,).
    """
    if "labels" not in batch:
        return functional.linear(hidden, weight, bias)
    return {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})


def _counted_labels(microbatch: Mapping[str, Any], mask: str | None) -> Tensor:
    labels: Tensor = microbatch["labels"]
    if mask is None:
        return labels
    counts = microbatch.get(mask)
    if counts is None:
        raise BatchError(f"mask={mask!r}: the batch has no such entry; {one_of(mask, microbatch)}")
    if counts.shape != labels.shape:
        raise BatchError(
            f"mask={mask!r} has shape {tuple(counts.shape)}, and labels {tuple(labels.shape)}; expected the same"
        )
    return labels.masked_fill(counts == 0, IGNORED)


def reduce_aux(**how: str) -> Callable[[Loss], Loss]:
    """Declare how a loss's auxiliary outputs are combined over microbatches; entries not named are summed.

    Raises:
        BatchError: for a reduction other than "sum", "mean", "max" and "cat".

    Example:
        @af.losses.reduce_aux(accuracy="mean", predictions="cat")
        def loss(outputs, microbatch): ...
            return total, weight, {"accuracy": accuracy, "predictions": predictions}
    """
    for entry, reduction in how.items():
        if reduction not in REDUCTIONS:
            raise BatchError(f"aux entry {entry!r}: unknown reduction {reduction!r}; {one_of(reduction, REDUCTIONS)}")

    def declare(loss: Loss) -> Loss:
        loss.aux_reductions = how  # type: ignore[attr-defined]
        return loss

    return declare


def own_loss(outputs: Any) -> Any:
    """Return the loss among a model's outputs: a scalar, the entry `loss`, or a tuple's leading scalar; else None."""
    if tuple(getattr(outputs, "shape", (1,))) == ():
        return outputs
    if begins_with_scalar(outputs):
        return outputs[0]
    return _entry(outputs, "loss")


def begins_with_scalar(outputs: Any) -> bool:
    """Return whether outputs are a plain tuple or list whose first member is a floating-point scalar, as a loss is."""
    if type(outputs) not in (tuple, list) or not outputs or not isinstance(outputs[0], Tensor):
        return False
    return outputs[0].dim() == 0 and outputs[0].is_floating_point()


def evaluate(loss: Loss | None, outputs: Any, microbatch: Mapping[str, Any]) -> LossTerms:
    """Call a loss and normalise its result. Without a loss, the outputs' own `loss` is the mean.

    Raises:
        BatchError: if the loss is not a floating-point scalar, or the outputs have none.
    """
    if loss is None:
        value = own_loss(outputs)
        if value is None:
            raise BatchError(
                f"no loss given, and the model's output ({type(outputs).__name__}) has no 'loss'; pass loss=..., for "
                "example af.losses.causal_lm"
            )
    else:
        value = loss(outputs, microbatch)
    total, weight, aux = (*value, None)[:3] if isinstance(value, tuple) else (value, 1.0, None)
    if not isinstance(total, Tensor) or total.dim() != 0 or not total.is_floating_point():
        shape = f"{total.dtype} of shape {tuple(total.shape)}" if isinstance(total, Tensor) else type(total).__name__
        raise BatchError(
            f"the loss must be a floating-point scalar (0-dim tensor), or (sum, weight) or (sum, weight, aux); got {shape}"
        )
    if not isinstance(weight, Tensor):
        weight = torch.full((), float(weight), device=total.device)
    return LossTerms(total, weight.detach().float(), tree.map_leaves(_detached, aux))


def combine_aux(loss: Loss | None, collected: Sequence[Any], weights: Sequence[float] = ()) -> Any:
    """Combine the aux of all microbatches, in order, as the loss declares.

    Args:
        loss: declares the reductions.
        collected: aux by microbatch.
        weights: by microbatch, for means; equal by default.
    """
    how: Mapping[str, str] = getattr(loss, "aux_reductions", {})
    first = collected[0]
    if isinstance(first, Mapping):
        return {name: _reduce(how.get(name, "sum"), [aux[name] for aux in collected], weights) for name in first}
    return _reduce("sum", collected, weights)


def _reduce(how: str, values: Sequence[Any], weights: Sequence[float]) -> Any:
    specs = [tree.leaves_and_spec(value) for value in values]
    columns = zip(*(leaves for leaves, _ in specs), strict=True)
    return tree.from_leaves([_reduce_leaf(how, list(column), weights) for column in columns], specs[0][1])


def _reduce_leaf(how: str, values: list[Any], weights: Sequence[float]) -> Any:
    if not isinstance(values[0], Tensor):
        values = [torch.as_tensor(value) for value in values]
    if how == "cat":
        return torch.cat([value[None] if value.dim() == 0 else value for value in values])
    stacked = torch.stack(values)
    if how == "max":
        return stacked.amax(0)
    if how == "mean" and weights:
        return torch.tensordot(torch.tensor(weights, device=stacked.device) / sum(weights), stacked.float(), dims=1)
    return stacked.float().mean(0) if how == "mean" else stacked.sum(0)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _entry(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
