"""`af.generate`: continue prompts with a pipeline of any layout."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autofunc import tree
from autofunc.errors import AutofuncError, MeshError, ModelError
from autofunc.generation.cached import cached_steps
from autofunc.generation.prompts import Prompts, as_lists
from autofunc.generation.sampling import Sampling, next_tokens
from autofunc.generation.whole_sequence import WholeSteps
from autofunc.mesh import axis_size, share_over_pp
from autofunc.model import Model
from autofunc.pipe import Pipeline

OWN = "own"
"""Value of `eos`: the model's own end-of-text tokens."""
_LIMITS = ("n_positions", "max_position_embeddings", "max_seq_len")


def generate(
    pipe: Pipeline,
    params: tree.Nested,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    eos: int | Sequence[int] | str = OWN,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    state: tree.Nested | None = None,
    tell: Callable[[str], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt: greedily, or by sampling if a temperature, top_k or top_p is given.

    Decoders of transformers and models that bring their own cache (`stages.gpt2`, `stages.llama`) keep keys and values.
    Other models recompute the whole text for each token; a warning reports it. Parameters are not modified. Under a mesh
    every process passes the same prompts and receives all results.

    Args:
        pipe: of the model, with any schedule and loss, on any number of pp ranks.
        params: this process's parameters, as for `pipe(params, batch)`.
        prompts: token ids of each prompt, of any lengths; or an integer tensor of shape (rows, tokens).
        max_new_tokens: most new tokens per prompt.
        eos: the token or tokens that end a text; by default those of the model's config, () for none.
        temperature: sample from logits divided by this; 0 takes the likeliest token.
        top_k: sample from this many of the likeliest tokens.
        top_p: sample from the likeliest tokens whose probabilities add up to this.
        seed: samples are a function of (seed, step, row).
        state: of layers that keep some, see `pipe.forward`.
        tell: receives the text of warnings instead.
        on_step: called after each step with the number of steps so far.

    Returns:
        The new tokens of each prompt, including the one that ends a text.

    Raises:
        AutofuncError: for invalid prompts, texts longer than the model's positions, and a mesh that shards parameters
            or tokens.

    Example:
        tokens = af.generate(pipe, params, [[1, 5, 3], [2]], max_new_tokens=20, temperature=0.8, top_p=0.95)
    """
    sampling = Sampling(temperature, top_k, top_p, seed)
    model = pipe.stages[0].model
    _check_mesh(pipe)
    rows = check_request(model, prompts, max_new_tokens)
    ends = frozenset(_own_ends(model) if eos == OWN else [eos] if isinstance(eos, int) else map(int, eos))
    device = pipe.device_of(params)
    steps: Any = cached_steps(pipe, params, rows, max_new_tokens, device)
    if isinstance(steps, str):
        (tell or _warn)(f"generating without a cache: {steps}. Every token takes a forward pass over the whole text")
        steps = WholeSteps(pipe, params, rows, max_new_tokens, state, device)
    made: list[list[int]] = [[] for _ in rows]
    tokens: Tensor | None = None
    for number in range(max_new_tokens):
        logits = steps.logits(tokens)
        tokens = _shared(pipe, None if logits is None else _chosen(logits, sampling, number), steps.num_rows, device)
        chosen = tokens.tolist()
        if chosen[0] < 0:
            raise ModelError(
                f"{model.title} returns logits that are NaN or depend on later tokens: it is not a causal model, so it "
                "cannot continue a prompt"
            )
        for text, token in zip(made, chosen, strict=False):
            if not text or text[-1] not in ends:
                text.append(token)
        if on_step is not None:
            on_step(number + 1)
        if all(text[-1] in ends for text in made):
            break
    return made


def check_request(model: Model, prompts: Prompts, max_new_tokens: int) -> list[list[int]]:
    """Check that prompts fit a model and return their token ids.

    Raises:
        AutofuncError: see `generate`.
    """
    rows = as_lists(prompts, getattr(_config(model), "vocab_size", None))
    _check_length(model, max(map(len, rows)), max_new_tokens)
    return rows


def _chosen(logits: Tensor, sampling: Sampling, step: int) -> Tensor:
    """Return the next tokens, int64 of shape (rows,); all -1 if any logit is NaN."""
    return torch.where(logits.isnan().any(), -1, next_tokens(logits.nan_to_num(), sampling, step))


def _shared(pipe: Pipeline, tokens: Tensor | None, rows: int, device: torch.device) -> Tensor:
    """Return the tokens chosen by the last stage's process, on every process."""
    if pipe.mesh is None:
        assert tokens is not None, "this process runs all stages"
        return tokens
    given = torch.empty(rows, dtype=torch.int64, device=device) if tokens is None else tokens.contiguous()
    return share_over_pp(pipe.mesh, pipe.schedule.placement[-1], given)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _check_mesh(pipe: Pipeline) -> None:
    """Refuse a mesh that shards parameters or tokens."""
    for axis in ("dp_shard", "tp", "cp"):
        if axis_size(pipe.mesh, axis) > 1:
            raise MeshError(
                f"generate runs on the pp axis of a mesh, and this one has {axis}={axis_size(pipe.mesh, axis)}, which "
                "shards parameters or tokens: gather them, full = pipe.gather(params), and use a pipeline without a mesh, "
                "or with one of pp only"
            )


def _config(model: Any) -> Any:
    """Return the config of a language model; for a multimodal model, that of its text part."""
    config = model.config
    text_config = getattr(config, "get_text_config", None)
    return text_config(decoder=True) if callable(text_config) else config


def _check_length(model: Any, longest: int, max_new_tokens: int) -> None:
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise AutofuncError(f"max_new_tokens={max_new_tokens!r}: expected 1 or more")
    config = _config(model)
    limit = next((known for name in _LIMITS if isinstance(known := getattr(config, name, None), int)), None)
    if limit is not None and longest + max_new_tokens > limit:
        fits = f"max_new_tokens={limit - longest} fits" if longest < limit else f"cut prompts to fewer than {limit}"
        raise AutofuncError(
            f"{model.title} has positions for {limit} tokens; the longest prompt has {longest}, and {max_new_tokens} may "
            f"follow: {fits}"
        )


def _own_ends(model: Any) -> Sequence[int]:
    """Return the tokens that end a text of this model, from its transformers config."""
    module = getattr(getattr(model, "base", model), "module", None)
    for config in (getattr(module, "generation_config", None), model.config):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return ()
