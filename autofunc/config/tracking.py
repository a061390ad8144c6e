"""What a configuration says of where a run is followed, beside its own files: by the names that these tools have for it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from autofunc.config.kinds import Section, Text


class _Tracking(Section):
    enable: bool = Field(True, description="false is as good as no section")


class Tensorboard(_Tracking):
    """Files for TensorBoard."""

    log_dir: Text | None = Field(None, description="where they go; by default tensorboard in output_dir")
    flush_secs: Annotated[int, Field(ge=1, le=1 << 20)] = Field(10, description="seconds until what is written can be seen")


class Wandb(_Tracking):
    """A run of Weights & Biases: arguments of wandb.init."""

    project: Text = Field("autofunc", description="the project")
    entity: Text | None = Field(None, description="the user or team; by default the one that is logged in")
    name: Text | None = Field(None, description="of the run; by default that of output_dir")
    id: Text | None = Field(None, description="of the run, to go on with; a run that goes on knows its own")
    group: Text | None = Field(None, description="of runs")
    job_type: Text | None = Field(None, description="what kind of run it is")
    tags: list[Text] = Field([], description="of the run")
    notes: Text | None = Field(None, description="on the run")
    mode: Literal["online", "offline", "disabled", "shared"] | None = Field(
        None, description="offline keeps it here, for wandb sync; by default WANDB_MODE says"
    )
    dir: Text | None = Field(None, description="where its files go; by default output_dir")


class Mlflow(_Tracking):
    """A run of MLflow."""

    experiment_name: Text = Field("autofunc", description="the experiment, which is made where there is none")
    run_name: Text | None = Field(None, description="of the run; by default that of output_dir")
    tracking_uri: Text | None = Field(None, description="the server, or a folder; by default MLFLOW_TRACKING_URI says")
    artifact_location: Text | None = Field(None, description="of an experiment that is made")
    tags: dict[str, str] = Field({}, description="of the run")
