"""The plain microbatch loop as a contender: the whole model in one process."""

from __future__ import annotations

from torch import Tensor

from autofunc.benchmark.runner import Bystander
from autofunc.benchmark.subject import Subject


class PlainRunner(Bystander):
    """The plain loop, implementing `Runner`.

    Args:
        subject: the benchmark's model, batch and loss.
        microbatches: microbatches per step.
    """

    def __init__(self, subject: Subject, microbatches: int) -> None:
        self._step, self._grads = subject.plain_step(microbatches), dict[str, Tensor]()
        model = subject.model
        self._paths = {model.canonical(path) for path in model.spec if model.is_trainable(path)}

    def step(self) -> None:
        """See `Runner`."""
        self._grads = {}
        self._grads = self._step()

    def drop(self) -> None:
        """See `Runner`."""
        self._grads = {}

    def grads(self) -> dict[str, Tensor]:
        """See `Runner`."""
        return self._grads

    def paths(self) -> set[str]:
        """See `Runner`."""
        return self._paths
