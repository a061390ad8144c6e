"""Unmodified modules on an accelerator: bit for bit the loop over what was captured; to rounding, their own backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autofunc as af
from tests.captured import laws
from tests.captured.zoo import ZOO
from tests.cases import assert_same_tree
from tests.gpu.test_laws import on_device

pytestmark = pytest.mark.gpu
LAYOUTS = [(2, "1f1b"), (3, "zb_h1")]


@pytest.mark.parametrize("name", ZOO)
def test_models_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "TOLERANCE", 1e-5)  # other kernels for other shapes
    make, batch = ZOO[name]
    laws.check_layouts(make().cuda(), on_device(batch()), LAYOUTS)


class _Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(wide, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)) for wide in (3, 8, 8)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x.mean((2, 3))), labels)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_state_of_batch_normalisation(layout: str) -> None:
    torch.manual_seed(0)
    module = _Convolutions().cuda()
    batch = {"x": torch.randn(8, 3, 8, 8).cuda(), "labels": torch.arange(8).cuda() % 4}
    if layout == "channels_last":
        module, batch["x"] = (
            module.to(memory_format=torch.channels_last),
            batch["x"].contiguous(memory_format=torch.channels_last),
        )
    model = af.from_module(module, batch)
    stages = af.split(model, 2)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(stages, s)
    params, state = model.init(device="cuda"), pipe.init_state()
    (loss, state), grads = af.value_and_grad(pipe, has_state=True)(params, batch, state=state)
    losses = []
    for half in range(2):
        rows = slice(4 * half, 4 * half + 4)
        losses.append(module(batch["x"][rows], batch["labels"][rows]))
    (sum(losses) / 2).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(loss, sum(losses).detach() / 2, rtol=1e-5, atol=0)  # type: ignore[union-attr]
    own = dict(module.named_buffers())
    for path, leaf in af.tree.flatten(state).items():
        torch.testing.assert_close(leaf.cuda(), own[path], rtol=1e-5, atol=1e-6, msg=path)
    found = af.tree.flatten(grads)
    for name, leaf in module.named_parameters():
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-4, atol=1e-5, msg=name)


class _Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).tanh()
            if x.isnan().any():
                raise ValueError("not a number")
            x = nn.functional.dropout(x, 0.25, self.training)
        return x.square().mean()


def test_a_decision_by_data() -> None:
    torch.manual_seed(0)
    module = _Branches().cuda()
    batch = {"x": torch.randn(8, 6).cuda()}
    model = af.from_module(module, batch)
    s = af.schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    pipe = af.pipeline(af.split(model, 2), s)
    params = model.init(device="cuda")
    loss, grads = af.value_and_grad(pipe)(params, batch, (0, 1))
    expected_loss, expected = af.reference_value_and_grad(model, None, 2)(params, batch, (0, 1))
    assert torch.equal(loss, expected_loss)
    assert_same_tree(expected, grads)
    with pytest.raises(af.errors.AutofuncError, match="would take another"):
        af.value_and_grad(pipe)(params, {"x": torch.full((8, 6), float("nan")).cuda()}, (0, 1))
