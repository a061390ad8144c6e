"""Experiment trackers: TensorBoard, Weights & Biases, MLflow. Only the first rank uses them."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from autofunc.config import FinetuneConfig
from autofunc.config.tracking import Mlflow, Tensorboard, Wandb
from autofunc.errors import FAILURES, ConfigError, PipelineRunError, in_brief
from autofunc.train.output import TRACKERS

_MOST_PARAMS, _MOST_LETTERS = 100, 500  # limits of every MLflow server: parameters per request, characters per value


class Tracker(Protocol):
    """A tracker during a run."""

    name: str
    id: str | None  # by which a resumed run finds it; None if its folder is enough

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of a step."""
        ...

    def close(self, failed: bool) -> None:
        """Flush; the run has ended."""
        ...


class TensorboardTracker:
    """Writes event files with `torch.utils.tensorboard`."""

    name, id = "tensorboard", None

    def __init__(
        self, wanted: Tensorboard, config: Mapping[str, Any], folder: Path, after_step: int, known: str | None
    ) -> None:  # fmt: skip
        where = Path(wanted.log_dir).expanduser() if wanted.log_dir is not None else folder / self.name
        summary = importlib.import_module("torch.utils.tensorboard")
        self._writer = summary.SummaryWriter(
            str(where), purge_step=after_step + 1 if after_step else None, flush_secs=wanted.flush_secs
        )
        self._writer.add_text("config", "\n".join(f"    {line}" for line in json.dumps(config, indent=2).splitlines()))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """See `Tracker.close`."""
        self._writer.close()


class WandbTracker:
    """Logs to a Weights & Biases run."""

    name = "wandb"

    def __init__(
        self, wanted: Wandb, config: Mapping[str, Any], folder: Path, after_step: int, known: str | None
    ) -> None:  # fmt: skip
        given = wanted.model_dump(exclude={"enable"}, exclude_none=True)
        given = {"name": folder.name, "dir": str(folder), **({} if known is None else {"id": known}), **given}
        self._run = importlib.import_module(self.name).init(config=dict(config), resume="allow", **given)
        self.id: str | None = self._run.id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """See `Tracker.close`."""
        self._run.finish(exit_code=int(failed))


class MlflowTracker:
    """Logs to an MLflow run, without waiting for its server."""

    name = "mlflow"

    def __init__(
        self, wanted: Mlflow, config: Mapping[str, Any], folder: Path, after_step: int, known: str | None
    ) -> None:  # fmt: skip
        self._entities = importlib.import_module("mlflow.entities")
        self._client = importlib.import_module(self.name).MlflowClient(tracking_uri=wanted.tracking_uri)
        self.id: str | None = known
        if known is not None:
            self._client.update_run(known, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(wanted.experiment_name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(
            wanted.experiment_name, artifact_location=wanted.artifact_location
        )  # fmt: skip
        made = self._client.create_run(experiment, run_name=wanted.run_name or folder.name, tags=dict(wanted.tags))
        self.id = made.info.run_id
        params = [self._entities.Param(name, str(value)[:_MOST_LETTERS]) for name, value in _flat(config)]
        for first in range(0, len(params), _MOST_PARAMS):
            self._client.log_batch(self.id, params=params[first : first + _MOST_PARAMS])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See `Tracker.log`."""
        now = int(time.time() * 1e3)
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics, synchronous=False)

    def close(self, failed: bool) -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self.id, "FAILED" if failed else "FINISHED")


_KINDS = {"tensorboard": TensorboardTracker, "wandb": WandbTracker, "mlflow": MlflowTracker}


def check_trackers(config: FinetuneConfig) -> None:
    """Refuse a section whose package is not installed.

    Raises:
        ConfigError: with the command that installs it.
    """
    for name, _ in _wanted(config):
        if name not in sys.modules and find_spec(name) is None:
            raise ConfigError(
                f"{name}: the package {name} is not installed: pip install 'autofunc[{name}]', or leave the section out"
            )


def open_trackers(config: FinetuneConfig, folder: Path, after_step: int) -> list[Tracker]:
    """Open the configured trackers and log the configuration.

    Args:
        config: of the run.
        folder: of the run; holds the file with the run's ids.
        after_step: the step a resumed run starts after; trackers continue there.

    Raises:
        PipelineRunError: if a tracker cannot start.
    """
    file = folder / TRACKERS
    known = json.loads(file.read_text(encoding="utf-8")) if after_step and file.is_file() else {}
    opened: list[Tracker] = []
    for name, wanted in _wanted(config):
        try:
            opened.append(_KINDS[name](wanted, config.model_dump(mode="json"), folder, after_step, known.get(name)))
        except FAILURES as error:
            raise PipelineRunError(f"{name} cannot start: {in_brief(error)}") from error
    ids = {each.name: each.id for each in opened if each.id is not None}
    if ids:
        file.write_text(json.dumps({**known, **ids}) + "\n", encoding="utf-8")
    return opened


def _wanted(config: FinetuneConfig) -> Iterator[tuple[str, Any]]:
    sections = {name: getattr(config, name) for name in _KINDS}
    yield from ((name, each) for name, each in sections.items() if each is not None and each.enable)


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield a configuration's values by dotted key, skipping absent ones."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _flat(value, f"{path}.{name}" if path else str(name))
    elif node is not None:
        yield path, node
