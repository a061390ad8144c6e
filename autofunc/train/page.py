"""`run.html`: a whole run on one self-contained page."""

from __future__ import annotations

import base64
import os
import platform
from collections.abc import Mapping
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment

from autofunc import __version__
from autofunc.config import FinetuneConfig
from autofunc.schedule import Costs, Timeline, costs_of, simulate
from autofunc.schedule.pictures.draw_html import to_html
from autofunc.shown import printable, shown, size_in_words
from autofunc.splitting import parameter_count
from autofunc.train.loop import TrainResult
from autofunc.train.recipe import Recipe

_PIXELS_OF_ROW, _PIXELS_OF_TIMELINE, _PIXELS_BESIDE = 27, 100, 120


def make_page(
    recipe: Recipe, config: FinetuneConfig, result: TrainResult, folder: Path, device: torch.device, curves: bytes | None
) -> str:
    """Return the page of a finished run.

    Args:
        recipe: of the run.
        config: the recipe's configuration.
        result: of the run.
        folder: with the results.
        device: of the first rank.
        curves: a PNG, or None.
    """
    timelines, caption = _timelines(recipe, result.timeline)
    rows = sum(each.schedule.num_ranks for each in timelines)
    template = Environment(autoescape=True, trim_blocks=True).from_string(
        files("autofunc.train").joinpath("run.html").read_text(encoding="utf-8")
    )
    return template.render(
        title=shown(folder),
        subtitle=f"ended {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        tables={"Result": _result(result), "Run": _run(recipe), "Machine": _machine(device)},
        notes=[printable(note) for note in recipe.notes],
        curves=None if curves is None else base64.b64encode(curves).decode(),
        caption=caption,
        timelines=to_html(timelines),
        timeline_height=rows * _PIXELS_OF_ROW + len(timelines) * _PIXELS_OF_TIMELINE + _PIXELS_BESIDE,
        config=_yaml(config),
    )


def _timelines(recipe: Recipe, measured: Timeline | None) -> tuple[list[Timeline], str]:
    """Return the timelines to draw, and their caption."""
    if measured is None:
        return [simulate(recipe.schedule, Costs())], (
            "Predicted, with all actions taking the same time. The step is measured if pipeline ranks are processes of "
            "their own."
        )
    predicted = simulate(measured.schedule, costs_of(measured))
    return [predicted, measured], (
        "One step, predicted from the mean time of each stage's actions and as measured, in milliseconds."
    )


def _result(result: TrainResult) -> Mapping[str, Any]:
    how = "told to end" if result.stopped else "ended early: validation stopped improving" if result.ended_early else "done"
    found = {"steps": f"{result.num_steps:,} ({how})", "loss": f"{result.loss:.4f}"}
    if result.validated is not None:
        found |= {name.replace("_", " "): f"{value:.4f}" for name, value in result.validated.named().items()}
    found["training"] = f"{result.training_seconds:,.1f} s"
    if result.timeline is not None:
        found["bubble"] = f"{result.timeline.bubble_fraction:.1%} measured"
    return found | {"peak memory by rank": ", ".join(map(size_in_words, result.peak_memory_bytes))}


def _run(recipe: Recipe) -> Mapping[str, Any]:
    return {
        "parameters": f"{parameter_count(recipe.model):,}", "layout": str(recipe.axes),
        "schedule": f"{recipe.schedule.name}, {recipe.schedule.num_stages} stages, "
        f"{recipe.schedule.num_microbatches} microbatches of {recipe.microbatch_rows} rows",
        "rows of a step": f"{recipe.rows:,}", "optimizer": printable(repr(recipe.optimizer)), "seed": recipe.seed,
    }  # fmt: skip


def _machine(device: torch.device) -> Mapping[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    return {
        "autofunc": __version__, "torch": torch.__version__, "CUDA": torch.version.cuda or "none",
        "Python": platform.python_version(), "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "devices": name,
    }  # fmt: skip


def _yaml(config: FinetuneConfig) -> str:
    from omegaconf import OmegaConf

    return printable(OmegaConf.to_yaml(OmegaConf.create(config.model_dump())), keep="\n")
