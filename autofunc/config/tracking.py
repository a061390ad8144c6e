"""Sections of experiment trackers, with the names of keys that these tools use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from autofunc.config.kinds import Section, Text


class _Tracking(Section):
    enable: bool = Field(True, description="false turns the tracker off, as without the section")


class Tensorboard(_Tracking):
    """Files for TensorBoard."""

    log_dir: Text | None = Field(None, description="folder of the files; by default tensorboard in output_dir")
    flush_secs: Annotated[int, Field(ge=1, le=1 << 20)] = Field(10, description="seconds until written values are visible")


class Wandb(_Tracking):
    """A Weights & Biases run: arguments of wandb.init."""

    project: Text = Field("autofunc", description="the project")
    entity: Text | None = Field(None, description="the user or team; by default the one logged in")
    name: Text | None = Field(None, description="name of the run; by default that of output_dir")
    id: Text | None = Field(None, description="id of a run to continue; a resumed run remembers its own")
    group: Text | None = Field(None, description="group of runs it belongs to")
    job_type: Text | None = Field(None, description="the kind of run")
    tags: list[Text] = Field([], description="tags of the run")
    notes: Text | None = Field(None, description="notes on the run")
    mode: Literal["online", "offline", "disabled", "shared"] | None = Field(
        None, description="offline keeps the run here, for wandb sync; by default WANDB_MODE decides"
    )
    dir: Text | None = Field(None, description="folder of its files; by default output_dir")


class Mlflow(_Tracking):
    """An MLflow run."""

    experiment_name: Text = Field("autofunc", description="the experiment, created if it does not exist")
    run_name: Text | None = Field(None, description="name of the run; by default that of output_dir")
    tracking_uri: Text | None = Field(None, description="the server, or a folder; by default MLFLOW_TRACKING_URI")
    artifact_location: Text | None = Field(None, description="artifact location of a new experiment")
    tags: dict[str, str] = Field({}, description="tags of the run")
