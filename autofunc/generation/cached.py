"""Generation with a KV cache: the pipeline of a model that keeps keys and values, and its steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDict
from torch import Tensor

from autofunc import tree
from autofunc.adapters.model import AdaptedModel
from autofunc.captured import INSIDE, CapturedModel, capture_around
from autofunc.engine import EngineOptions
from autofunc.errors import ModelError, in_brief
from autofunc.generation.decoder_module import DecoderWithCache, why_no_cache
from autofunc.generation.prompts import LeftPadded, rounded_up
from autofunc.model import CacheForm, Model
from autofunc.pipe import Pipeline
from autofunc.splitting import split

Made = TypeVar("Made")

_PROMPT_COLUMNS, _COLUMNS = 32, 64  # prompts and caches are padded to multiples of these, so that captures are reused
_MOST_FORMS = 8  # remembered per pipeline and per model; the oldest is forgotten first
_BATCH_DIMS = {"input_ids": 0, "position_ids": 0, "attention_mask": 0, "start": None}

_pipelines: WeakKeyDictionary[Pipeline, dict[CacheForm, Pipeline | str]] = WeakKeyDictionary()
_models: WeakKeyDictionary[Model, dict[CacheForm, Model]] = WeakKeyDictionary()


class CachedSteps:
    """Steps of one generation; each computes only the new tokens.

    Args:
        pipe: of the model that keeps keys and values.
        params: this process's parameters.
        padded: the prompts; as many rows as all caches together.
        num_caches: microbatches per step, each with its own cache.
    """

    def __init__(self, pipe: Pipeline, params: tree.Nested, padded: LeftPadded, num_caches: int) -> None:
        self._pipe, self._params, self._padded = pipe, params, padded
        self._mask, self._column, self.num_rows = padded.mask(), 0, len(padded.rows)
        self._states: list[TensorDict] = [pipe.empty_state(padded.device) for _ in range(num_caches)]

    def logits(self, tokens: Tensor | None) -> Tensor | None:
        """Return the logits of each row's next token, (rows, vocabulary); None on processes without the last stage.

        Args:
            tokens: chosen after the last step, int64 of shape (rows,); None in the first step.
        """
        ids = self._padded.input_ids if tokens is None else tokens.unsqueeze(-1)
        start, self._column = self._column, self._column + ids.shape[1]
        batch = {
            "input_ids": ids,
            "position_ids": self._padded.positions(start, self._column),
            "attention_mask": self._mask,
            "start": torch.tensor(start, device=ids.device),
        }
        outputs, self._states = self._pipe.advance(self._params, batch, self._states)
        return None if outputs is None else outputs[:, -1]


def cached_steps(
    pipe: Pipeline, params: tree.Nested, rows: Sequence[Sequence[int]], max_new_tokens: int, device: torch.device
) -> CachedSteps | str:
    """Return the steps of a generation with a cache, or the reason why the model has none.

    Args:
        pipe: of the model.
        params: this process's parameters.
        rows: token ids of each prompt; copies of the last one pad them to a multiple of the number of caches.
        max_new_tokens: the most tokens that follow a prompt.
        device: where this process computes.
    """
    # with several ranks each step has a microbatch for every rank, so that all of them work at the same time
    num_caches = 1 if pipe.mesh is None else min(pipe.schedule.num_ranks, len(rows))
    filled = [*rows, *[rows[-1]] * (-len(rows) % num_caches)]
    width = rounded_up(max(map(len, rows)), _PROMPT_COLUMNS)
    length = rounded_up(width + max_new_tokens - 1, _COLUMNS)
    found = _pipeline(pipe, CacheForm(len(filled) // num_caches, length, _dtype(pipe, params)))
    if isinstance(found, str):
        return found
    return CachedSteps(found, params, LeftPadded(filled, width, length, device), num_caches)


def _dtype(pipe: Pipeline, params: tree.Nested) -> torch.dtype:
    """Return the dtype of keys and values."""
    floating = (leaf.dtype for leaf in tree.flatten(params).values() if leaf.is_floating_point())
    return pipe.sharding.precision.parameter_dtype(next(floating, torch.get_default_dtype()))


def _pipeline(pipe: Pipeline, form: CacheForm) -> Pipeline | str:
    """Return the pipeline with a cache, built once per form; or the reason why there is none."""
    return _remembered(_pipelines.setdefault(pipe, {}), form, lambda: _new_pipeline(pipe, form))


def _remembered(known: dict[CacheForm, Made], form: CacheForm, make: Callable[[], Made]) -> Made:
    if form not in known:
        while len(known) >= _MOST_FORMS:
            known.pop(next(iter(known)))
        known[form] = make()
    return known[form]


def _new_pipeline(pipe: Pipeline, form: CacheForm) -> Pipeline | str:
    model = pipe.stages[0].model
    if model.state_spec:
        return f"{model.title} keeps its own state"
    found = _with_cache(model)
    if isinstance(found, str):
        return found
    make, prefix = found
    try:
        known = _remembered(_models.setdefault(model, {}), form, lambda: make(form))
        stages = split(known, [f"{prefix}{stage.layers[0]}" for stage in pipe.stages[1:]])
    except ModelError as error:
        return f"{model.title} cannot be captured with a cache ({in_brief(error)})"
    options = EngineOptions(pipe.options.engine, pipe.options.compile)
    return Pipeline(stages, pipe.schedule, None, pipe.mesh, options, _BATCH_DIMS, pipe.sharding, pipe.transfers)


def _with_cache(model: Model) -> tuple[Callable[[CacheForm], Model], str] | str:
    """Return (builder of the model with a cache, prefix of its layer names), or the reason why there is none."""
    if isinstance(model, AdaptedModel):
        found = _with_cache(model.base)
        if isinstance(found, str):
            return found
        make, prefix = found
        return (lambda form: AdaptedModel(make(form), model.plan, model.saved, model.stored)), prefix
    if model.with_cache is not None:
        return model.with_cache, ""
    if not isinstance(model, CapturedModel) or not model.is_module:
        return f"{model.title} has no cache"
    reason = why_no_cache(model.module)
    return reason or ((lambda form: _around(model, form)), f"{INSIDE}.")


def _around(model: CapturedModel, form: CacheForm) -> CapturedModel:
    example = {
        "input_ids": torch.zeros((form.rows, 1), dtype=torch.long),
        "position_ids": torch.zeros((form.rows, 1), dtype=torch.long),
        "attention_mask": torch.ones((form.rows, form.length), dtype=torch.long),
        "start": torch.tensor(0),
    }
    return capture_around(DecoderWithCache(model.module, form, model.device), model, example)
