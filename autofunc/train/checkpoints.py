"""A run's checkpoints: when they are due, what they are called, and which are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from autofunc.checkpoint import Saving, begin_save
from autofunc.checkpoint.folder import partial_of, remove
from autofunc.checkpoint.write import is_first
from autofunc.config.schema import CheckpointSection, StepScheduler
from autofunc.errors import CheckpointError
from autofunc.pipe import Pipeline
from autofunc.runtime.position import here
from autofunc.shown import quoted
from autofunc.train.output import WEIGHTS
from autofunc.train.step import Trained
from autofunc.train.step_folders import (
    LATEST,
    LOWEST_VAL,
    VALIDATION_LOSS,
    link,
    lowest,
    name_of,
    steps_in,
    validation_losses,
)
from autofunc.train.weights import save_weights


class Checkpoints:
    """Writes the checkpoints of a run.

    Args:
        folder: of the checkpoints.
        config: of checkpoints.
        steps: how often to write.
        show: called on the first rank with messages about checkpoints that cannot be written.
    """

    def __init__(
        self, folder: Path, config: CheckpointSection, steps: StepScheduler, show: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.folder, self._config, self._steps, self._show = folder, config, steps, show
        self._every_epoch = steps.save_checkpoint_every_epoch
        self._saving: Saving | None = None
        self._losses = validation_losses(folder) if is_first() else {}  # for the links, which the first rank makes
        several = config.is_async and dist.is_initialized()
        self._background: Any = dist.new_group(backend="gloo") if several else config.is_async

    def is_due(self, step: int, ends_epoch: bool) -> bool:
        """Return whether a checkpoint is due after this step."""
        every = self._steps.ckpt_every_steps
        return bool(every and step % every == 0) or (ends_epoch and self._every_epoch)

    @property
    def is_busy(self) -> bool:
        """Whether this process is still writing a checkpoint."""
        return self._saving is not None and not self._saving.is_written

    def save(self, step: int, pipe: Pipeline, now: Trained, extra: Mapping[str, Any]) -> bool:
        """Write a checkpoint. All processes call it.

        A failure to write is shown and does not end the run.

        Args:
            step: just finished.
            pipe: of the run.
            now: parameters and states after the step.
            extra: what else resuming needs; includes `validation_loss` if it was measured after this step.

        Returns:
            True if the checkpoint is written or being written.
        """
        self.finish()
        path = self.folder / name_of(step)
        with here.unhurried(f"writing a checkpoint after step {step}"):
            try:
                self._saving = begin_save(
                    path, params=now.params, state=now.state, optimizer_state=now.optimizer_state, average=now.average,
                    extra=extra, background=self._background,
                )  # fmt: skip
                if self._config.save_consolidated in ("every", True):
                    whole, whole_state = pipe.collect(now.params), pipe.collect(now.state)
                    if is_first():
                        save_weights(whole, partial_of(path) / WEIGHTS, whole_state)
            except (CheckpointError, OSError) as error:
                self._tell(str(error))
        if extra.get(VALIDATION_LOSS) is not None:
            self._losses[step] = extra[VALIDATION_LOSS]
        return self.finish() if not self._config.is_async else True

    def finish(self) -> bool:
        """Publish the checkpoint being written; return whether that succeeded. All processes call it."""
        if self._saving is None:
            return False
        saving, self._saving = self._saving, None
        with here.unhurried(f"publishing {saving.path.name}"):
            try:
                saving.finish()
                if is_first():
                    self._published(saving.path)
            except CheckpointError as error:
                self._tell(str(error))
                return False
            except OSError as error:  # from a link, or from deleting an old checkpoint: the new one is complete
                self._tell(f"{quoted(str(self.folder))}: {error}")
        return True

    def _tell(self, text: str) -> None:
        self._show(f"no checkpoint: {text}")

    def _published(self, path: Path) -> None:
        """Point the links at a new checkpoint, and delete those that are too old."""
        link(self.folder / LATEST, path.name)
        losses = {step: loss for step, loss in self._losses.items() if (self.folder / name_of(step)).is_dir()}
        best = lowest(losses)
        if best is not None:
            link(self.folder / LOWEST_VAL, name_of(best))
        kept = self._config.max_recent_checkpoints
        found = steps_in(self.folder)
        for step in found[:-kept] if kept else ():
            if step != best:
                remove(self.folder / name_of(step))
