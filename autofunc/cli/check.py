"""`autofunc check`: find what prevents pipelining a configuration's model, as a table or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console

from autofunc.captured import with_values
from autofunc.checks import check as run_checks
from autofunc.config import check_targets, read_config, refusing_exit
from autofunc.data import STACKED, first_rows
from autofunc.model import Model
from autofunc.progress_bar import CONSOLE
from autofunc.shown import literal, shown
from autofunc.train.axes import axes_of, sharding_of
from autofunc.train.datasets import read_dataset
from autofunc.train.model import loss_to_check, make

_MOST_ROWS = 4  # of the example: forward runs on it about twenty times


@refusing_exit()
def check(config_path: str, overrides: Sequence[str], as_json: bool) -> bool:
    """Print the findings; return whether nothing failed.

    Args:
        config_path: the YAML file.
        overrides: see `config.load_config`.
        as_json: print JSON instead of a table.

    Raises:
        AutofuncError: for mistakes in the configuration itself.
    """
    with CONSOLE.status(literal(f"checking {shown(config_path)}")):
        config, notes = read_config(config_path, overrides)
        check_targets(config)
        dataset = read_dataset(config.dataset, "dataset", config.dataloader)
        made = make(config)
        module = made if isinstance(made, Model) else with_values(made, config.seed)
        batch = first_rows(dataset, min(max(config.step_scheduler.local_batch_size, 2), _MOST_ROWS))
        loss, axes = loss_to_check(config, module, batch), axes_of(config, None)
        report = run_checks(
            module, batch, loss=loss, inputs=config.inputs, batch_dims=STACKED,
            axes={"tp": axes.tp, "cp": axes.cp, "ep": axes.ep}, sharding=sharding_of(config, axes, notes),
        )  # fmt: skip
    if as_json:
        sys.stdout.write(json.dumps({**report.to_dict(), "notes": notes}, indent=2) + "\n")
        return report.ok
    console = Console(file=sys.stdout)
    for note in notes:
        console.print(literal(f"note: {note}"))
    sys.stdout.write(report.table(colour=console.is_terminal and not console.no_color) + "\n")
    return report.ok
