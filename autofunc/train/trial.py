"""A trial of a run's model on its batches, without weights: finds wrong shapes, keys and lengths early."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from autofunc.batch import signature, split_batch
from autofunc.data import STACKED, Padded, first_rows
from autofunc.errors import AutofuncError, ConfigError, DataError
from autofunc.losses import Loss
from autofunc.splitting import ALONE, Setting, Stage, infer_boundaries
from autofunc.train.datasets import Batches
from autofunc.train.labels import inside


class Trial:
    """Runs the stages on fake tensors, once per signature of a microbatch.

    Args:
        stages: all of them.
        loss: of the run; None for the model's own.
        setting: of the stages.
    """

    def __init__(self, stages: Sequence[Stage], loss: Loss | None, setting: Setting = ALONE) -> None:
        self._stages, self._loss, self._setting = stages, loss, setting
        self._tried: set[Hashable] = set()

    def run(self, where: str, dataset: Any, batches: Batches) -> None:
        """Try a dataset's first microbatch, and its last, which may be short.

        Args:
            where: the dataset's section, for messages.
            dataset: map-style.
            batches: sizes.

        Raises:
            ConfigError: if the model cannot run on such a microbatch, or the rows cannot be collated.
        """
        most = batches.microbatch
        rows, last = min(most, len(dataset)), len(dataset) % batches.rows
        try:
            lengths = lengths_of(dataset)
        except DataError as error:
            raise ConfigError(f"{where}: {error}") from error
        for length in lengths:
            self._run(where, dataset, 0, rows, most, length)
        if last and not batches.drop_last:
            short = last % most or most
            self._run(where, dataset, len(dataset) - short, short, most)

    def _run(self, where: str, dataset: Any, start: int, rows: int, most: int, length: int = 0) -> None:
        name = self._stages[0].model.key_name
        try:
            batch = first_rows(dataset, rows, start, length)
            self._try(split_batch(batch, 1, key=(0, 0), batch_dims=STACKED, key_name=name)[0])
        except AutofuncError as error:
            hint = (
                f". These are its last {rows} rows; dataloader.drop_last: true drops a short batch" if rows < most else ""
            )
            raise ConfigError(f"the model on a batch of {where}: {error}{hint}") from error

    def _try(self, microbatch: dict[str, Any]) -> None:
        known = signature(microbatch)
        if known not in self._tried:
            infer_boundaries(self._stages, {}, microbatch, self._loss, setting=self._setting)
            self._tried.add(known)


def lengths_of(dataset: Any) -> list[int]:
    """Return the lengths that rows of a dataset are known to have, besides that of its first rows, which is 0.

    Raises:
        DataError: if its longest row fits into none of them.
    """
    if not isinstance(dataset, Padded):
        return [0]
    longest = dataset.padding.fitting(max((getattr(each, "seq_len", None) or 0 for each in inside(dataset)), default=0))
    return [0, *(dataset.padding.lengths or [longest])]
