"""A run's model on its batches, without weights or data: wrong shapes, keys and lengths are found in time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from autofunc.batch import signature, split_batch
from autofunc.data import STACKED, first_rows
from autofunc.errors import AutofuncError, ConfigError
from autofunc.losses import Loss
from autofunc.splitting import Stage, infer_boundaries


class Trial:
    """Runs the stages on fake tensors, once for every signature that a microbatch can have.

    Args:
        stages: all of them.
        loss: of the run; None for the model's own.
        rows: of a batch, over all data parallel ranks.
        places: data parallel ranks.
        num_microbatches: of each of them.
    """

    def __init__(self, stages: Sequence[Stage], loss: Loss | None, rows: int, places: int, num_microbatches: int) -> None:
        self._stages, self._loss = stages, loss
        self._rows, self._places, self._num_microbatches = rows, places, num_microbatches
        self._tried: set[Hashable] = set()

    def run(self, where: str, dataset: Any, drop_last: bool) -> None:
        """Try the first batch of a dataset, and the last one, which may be short.

        Args:
            where: the dataset's section, for messages.
            dataset: has rows by index.
            drop_last: whether a short last batch is left out.

        Raises:
            ConfigError: when the model cannot run on such a batch.
            DataError: when the rows make no batch.
        """
        last = len(dataset) % self._rows
        for start in [0, len(dataset) - last] if last and not drop_last else [0]:
            batch = first_rows(dataset, self._rows // self._places, start)
            try:
                name = self._stages[0].model.key_name
                microbatches = split_batch(
                    batch, self._num_microbatches, key=(0, 0), batch_dims=STACKED, key_name=name
                )  # fmt: skip
                self._try(microbatches[0])
            except AutofuncError as error:
                raise ConfigError(f"the model on a batch of {where}: {error}") from error

    def _try(self, microbatch: dict[str, Any]) -> None:
        known = signature(microbatch)
        if known not in self._tried:
            infer_boundaries(self._stages, {}, microbatch, self._loss)
            self._tried.add(known)
