"""`autofunc config`: inspect a configuration without running it. Nothing here imports torch."""

from __future__ import annotations

import json

import typer

from autofunc.cli.options import TAKES_OVERRIDES, ConfigFile
from autofunc.shown import printable, shown

app = typer.Typer(no_args_is_help=True, help="Validate a configuration, print it with its defaults, or print its schema.")


@app.command("validate", context_settings=TAKES_OVERRIDES, epilog="Example: autofunc config validate -c examples/demo.yaml")
def validate(context: typer.Context, config: ConfigFile) -> None:
    """Check every key and value without importing anything they name. `autofunc plan` builds it too."""
    from autofunc.config.read import read_config

    for note in read_config(config, context.args, look_into_targets=False)[1]:
        typer.echo(printable(f"note: {note}"))
    typer.echo(f"{shown(config)}: all keys and values are valid")


@app.command("print", context_settings=TAKES_OVERRIDES, epilog="Example: autofunc config print -c examples/demo.yaml")
def show(context: typer.Context, config: ConfigFile) -> None:
    """Print the configuration a run would use: overrides applied, defaults filled in."""
    from omegaconf import OmegaConf

    from autofunc.config.read import read_config

    typer.echo(
        OmegaConf.to_yaml(OmegaConf.create(read_config(config, context.args, look_into_targets=False)[0].model_dump())),
        nl=False,
    )


@app.command("schema", epilog="Example: autofunc config schema > autofunc.schema.json")
def schema() -> None:
    """Print the JSON schema of configurations, for editors."""
    from autofunc.config.schema import FinetuneConfig

    typer.echo(json.dumps(FinetuneConfig.model_json_schema(), indent=2))
