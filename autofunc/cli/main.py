"""The command line. Its own imports are light: torch is imported when a command needs it."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated

import typer

from autofunc import __version__
from autofunc.cli import config as config_commands
from autofunc.cli import data, schedule
from autofunc.cli.bench import BenchOptions
from autofunc.cli.loading import loading_torch
from autofunc.cli.options import TAKES_OVERRIDES, ConfigFile, EvaluateOptions, GenerateOptions, RunOptions, takes_groups
from autofunc.errors import AutofuncError, ConfigError, PipelineRunError, full_message, one_of
from autofunc.shown import quoted

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Pipeline parallelism as pure functions: one YAML file trains a model that is split at its split_points.",
)


app.add_typer(schedule.app, name="schedule")
app.add_typer(config_commands.app, name="config")
app.add_typer(data.app, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"autofunc {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options common to all commands."""


_ANY_KEY = "Any key of the file can be set: --step_scheduler.max_steps 10, or distributed.schedule=gpipe"
Domain = Annotated[str, typer.Argument(metavar="llm", help="Kind of model to train: llm.")]


@app.command("finetune", context_settings=TAKES_OVERRIDES, epilog=_ANY_KEY)
@takes_groups
def finetune(context: typer.Context, domain: Domain, options: RunOptions) -> None:
    """Train a language model as described in a YAML file.

    Starts its own worker processes, unless run under torchrun.

    Example: autofunc finetune llm -c examples/demo.yaml --step_scheduler.max_steps 20
    """
    _run(["finetune", _known_domain("finetune", domain)], context, options)


@app.command("pretrain", context_settings=TAKES_OVERRIDES, epilog=_ANY_KEY)
@takes_groups
def pretrain(context: typer.Context, domain: Domain, options: RunOptions) -> None:
    """Train a language model, like finetune; the key weights chooses the initial weights.

    Example: autofunc pretrain llm -c run.yaml --weights seed
    """
    _run(["pretrain", _known_domain("pretrain", domain)], context, options)


@app.command("train", context_settings=TAKES_OVERRIDES, epilog=_ANY_KEY)
@takes_groups
def train(context: typer.Context, options: RunOptions) -> None:
    """Train any model as described in a YAML file: an image classifier as well as a language model.

    Example: autofunc train -c run.yaml --loss_fn._target_ net.py:loss
    """
    _run(["train"], context, options)


@app.command("evaluate", context_settings=TAKES_OVERRIDES, epilog=_ANY_KEY)
@takes_groups
def evaluate(context: typer.Context, options: EvaluateOptions) -> None:
    """Measure a checkpoint, or weights, on the validation datasets: the loss and the metrics of the file.

    Example: autofunc evaluate -c run.yaml --checkpoint.restore_from LATEST
    """
    from autofunc.cli.train import train as run

    run(
        ["evaluate"],
        RunOptions(options.config, options.nproc_per_node),
        context.args,
        evaluates=True,
        as_json=options.as_json,
    )


@app.command("generate", context_settings=TAKES_OVERRIDES, epilog=_ANY_KEY)
@takes_groups
def generate(context: typer.Context, options: GenerateOptions) -> None:
    """Continue prompts with the model of a run or of a folder.

    Example: autofunc generate -c run.yaml --checkpoint.restore_from LATEST --prompt "Once"

    Example: autofunc generate --model my_model --prompt "Once" --temperature 0.8 --top-p 0.9
    """
    from autofunc.train.texts import TextsWanted, read_prompts

    if (options.config is None) == (options.model is None):
        raise ConfigError("generate needs either -c FILE, the configuration of a run, or --model FOLDER")
    wanted = TextsWanted(
        read_prompts(options.prompt or (), options.prompt_file), options.max_new_tokens, options.temperature, options.top_k,
        options.top_p, options.seed, options.tokenizer, options.as_json,
    )  # fmt: skip
    if options.config is not None:
        from autofunc.cli.train import train as run

        ranks = [] if options.pp is None else ["--distributed.pp_size", str(options.pp)]
        run(["generate"], RunOptions(options.config), [*context.args, *ranks], texts=wanted)
        return
    if context.args:
        raise ConfigError(
            f"generate --model takes no configuration keys such as {quoted(context.args[0])}; they need -c FILE"
        )
    assert options.model is not None, "one of the two is given"
    with loading_torch():
        from autofunc.cli.generate import generate_from_folder
    generate_from_folder(options.model, options.pp or 1, wanted)


def _known_domain(verb: str, domain: str) -> str:
    if domain != "llm":
        raise ConfigError(f"{verb} {domain!r}: {one_of(domain, ['llm'])}; autofunc train -c FILE trains models of any kind")
    return domain


def _run(verb: list[str], context: typer.Context, options: RunOptions) -> None:
    from autofunc.cli.train import train as run

    run(verb, options, context.args)


@app.command(
    "plan",
    context_settings=TAKES_OVERRIDES,
    epilog="Example: autofunc plan -c examples/demo.yaml --distributed.pp_size 4",
)
def plan(
    context: typer.Context,
    config: ConfigFile,
    nproc_per_node: Annotated[
        int | None,
        typer.Option("--nproc-per-node", "--nproc_per_node", min=1, help="Processes; by default as the file asks."),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time every layer here, with weights, and balance stages by the times.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
    picture: Annotated[
        str | None,
        typer.Option("--draw", metavar="FILE", help="Draw the predicted step: .svg, .png, .html or .json (a trace)."),
    ] = None,
    fake_data: Annotated[
        bool,
        typer.Option("--fake-data", help="Read no dataset: make up rows of dataset.seq_len token ids."),
    ] = False,
) -> None:
    """Show what a run would do, without weights or processes.

    Shows stages, parameters, operations, transfers, memory, step time and bubble.
    Runs the code that the file names in _target_, for the model and the data.
    """
    with loading_torch():
        from autofunc.cli.plan import plan as show_plan
    show_plan(config, context.args, nproc_per_node, measure, as_json, picture, fake_data)


@app.command(
    "check",
    context_settings=TAKES_OVERRIDES,
    epilog="Example: autofunc check -c examples/custom_model.yaml --json",
)
def check(
    context: typer.Context,
    config: ConfigFile,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Find what prevents sharding and pipelining a model (takes seconds).

    Runs the code that the file names in _target_.
    Runs twelve checks on a few rows of the dataset; the status is 1 if one fails.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # forwards are small: spinning threads would steal cores
    with loading_torch():
        from autofunc.cli.check import check as run_check
    if not run_check(config, context.args, as_json):
        raise typer.Exit(1)


@app.command("bench", context_settings=TAKES_OVERRIDES, epilog=_ANY_KEY)
@takes_groups
def bench(context: typer.Context, options: BenchOptions) -> None:
    """Time a training step of pipelines in turns: all combinations of the lists.

    Runs the code that the file names in _target_.
    Checks gradients against the plain microbatch loop, then times all in turns.
    Prints tables; writes bench.json, bench.png and bench.html (timelines).
    Starts its own processes, unless run under torchrun.

    Example: autofunc bench -c examples/custom_model.yaml --against torch

    Example: autofunc bench -c run.yaml --schedules 1f1b,zb_h1,zbv --compile off,on --microbatches 8,16

    Example: autofunc bench -c run.yaml --nproc-per-node 1 --remat none,layer --against torch,plain -o results
    """
    from autofunc.cli.bench import bench as run

    run(options, context.args)


@app.command(
    "export",
    context_settings=TAKES_OVERRIDES,
    epilog="Example: autofunc export -c run.yaml --weights runs/run -o my_model",
)
def export(
    context: typer.Context,
    config: ConfigFile,
    weights: Annotated[
        str, typer.Option("--weights", help="Output folder of the run, or its model.safetensors or adapter.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Folder to write.")],
) -> None:
    """Write trained weights as a folder that transformers' from_pretrained loads."""
    with loading_torch():
        from autofunc.cli.export import export as write
    write(config, context.args, weights, output)


def _check_options(words: list[str]) -> None:
    """Refuse unprintable option names, which click would echo as they are."""
    for option in (word.partition("=")[0] for word in words if word.startswith("-")):
        if not option.isprintable():
            raise ConfigError(f"there is no option {quoted(option)}")


def main() -> None:
    """Entry point: print user-facing errors with their notes, without a traceback."""
    if os.environ.get("MPLBACKEND", "").startswith("module://"):
        os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may not be installed here; commands draw into files
    try:
        _check_options(sys.argv[1:])
        app()
    except PipelineRunError as error:
        sys.stderr.write(f"error: {full_message(error)}\n")
        sys.exit(1)
    except AutofuncError as error:
        sys.stderr.write(f"error: {full_message(error)}\n")
        sys.exit(2)
    except Exception:  # from the user's code, or a bug of ours, which needs the whole traceback
        from autofunc.train.blame import brief, names_users_lines
        from autofunc.users_lines import wants_whole

        raised = traceback.format_exc()
        shown = brief(raised) if names_users_lines(raised) and not wants_whole() else raised
        sys.stderr.write(f"error: {shown}\n")
        sys.exit(1)
