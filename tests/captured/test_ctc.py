"""CTC losses inside forward, with lengths that are tensors and differ from row to row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autofunc as af
from autofunc.errors import ModelError
from tests.captured.laws import check_layouts

Scored = Callable[[Tensor, Tensor, Tensor], Tensor]
LABELS = torch.tensor([[1, 2, 3, 4], [2, 2, -1, -1], [3, -1, -1, -1], [4, 1, 2, -1]])
STEPS = torch.tensor([9, 8, 9, 7])


class Transcribing(nn.Module):
    """Two layers, and a test's loss of their (steps, rows, classes)."""

    def __init__(self, scored: Scored) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.scored = nn.Linear(6, 6), nn.Linear(6, 5), scored

    def forward(self, x: Tensor, labels: Tensor, steps: Tensor) -> Tensor:
        """Compute the loss."""
        log_probs = self.second(torch.tanh(self.first(x))).log_softmax(-1).transpose(0, 1)
        return self.scored(log_probs, labels, steps)


def batch(labels: Tensor = LABELS) -> dict[str, Tensor]:
    return {"x": torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(0)), "labels": labels, "steps": STEPS}


def selected(log_probs: Tensor, labels: Tensor, steps: Tensor) -> Tensor:
    mask = labels >= 0
    return functional.ctc_loss(log_probs, labels.masked_select(mask), steps, mask.sum(-1))


def padded(log_probs: Tensor, labels: Tensor, steps: Tensor) -> Tensor:
    lengths = (labels >= 0).sum(-1)
    return nn.CTCLoss(reduction="sum", zero_infinity=True)(log_probs, labels.clamp_min(0), steps, lengths)


def by_row(log_probs: Tensor, labels: Tensor, steps: Tensor) -> Tensor:
    lengths = (labels >= 0).sum(-1)
    return functional.ctc_loss(log_probs, labels.clamp_min(0), steps, lengths, reduction="none").square().mean()


@pytest.mark.parametrize("scored", [selected, padded, by_row])
def test_rows_of_any_length(scored: Scored) -> None:
    check_layouts(Transcribing(scored), batch(), [(["second"], "1f1b"), (["second"], "zb_h1")])


def test_unreachable_targets_count_nothing() -> None:
    """The same label four times takes seven steps, with the blanks between."""
    module = Transcribing(lambda log_probs, labels, steps: padded(log_probs, labels, steps.clamp_max(6)))
    check_layouts(module, batch(torch.tensor([[1, 1, 1, 1], *LABELS[1:].tolist()])), [(["second"], "1f1b")])


def test_selected_elements_with_another_reader() -> None:
    def scored(log_probs: Tensor, labels: Tensor, steps: Tensor) -> Tensor:
        positive = labels.masked_select(labels.abs() > 0)  # all
        return log_probs.square().mean() * (positive + 1).float().std() * positive.abs().max() / len(positive)

    check_layouts(Transcribing(scored), batch(), [(["second"], "1f1b")])

    def differing(log_probs: Tensor, labels: Tensor, steps: Tensor) -> Tensor:
        return log_probs.mean() * torch.sum(labels.masked_select(labels >= 0))

    with pytest.raises(ModelError, match=r"the data decides how many rows .* makes"):
        af.from_module(Transcribing(differing), batch())


def test_labels_written_to_after_selection() -> None:
    def scored(log_probs: Tensor, labels: Tensor, steps: Tensor) -> Tensor:
        mask, labels = labels >= 0, labels + 0
        targets = labels.masked_select(mask)
        labels.clamp_max_(1)
        return functional.ctc_loss(log_probs, targets, steps, mask.sum(-1))

    with pytest.raises(ModelError, match="write to a clone"):
        af.from_module(Transcribing(scored), batch())
