"""A step that cannot be captured. The last file: a capture that failed leaves the generators of a device unusable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autofunc as af
from autofunc.errors import AutofuncError
from tests.gpu.test_graphs import check_steps, pair_of

pytestmark = pytest.mark.gpu


@torch.library.custom_op("autofunc_tests::waits", mutates_args=())
def waits(x: Tensor) -> Tensor:
    """Makes the host wait for the device."""
    return x * float(x.sum() * 0 + 1)


waits.register_fake(lambda x: torch.empty_like(x))
waits.register_autograd(lambda ctx, grad: grad.clone())


def test_what_fails_while_it_is_recorded() -> None:
    """It is said where, and other steps go on."""
    layer = af.Layer(init=lambda key: {"w": key.normal("w", (4, 4))}, apply=lambda p, x, b: waits(b["x"] @ p["w"]))
    model = af.Model({"a": layer})
    s = af.schedule.build("1f1b", num_ranks=1, num_microbatches=2)
    pipe = af.pipeline(af.split(model, 1), s, loss=lambda out, mb: out.sum(), compile="graphs")
    params, batch = model.init(device="cuda"), {"x": torch.randn(4, 4).cuda()}
    af.value_and_grad(pipe)(params, batch)
    with pytest.raises(AutofuncError, match="a step cannot be recorded: rank 0, step 2, action 0F0"):
        af.value_and_grad(pipe)(params, batch)
    check_steps(*pair_of("mlp", "1f1b"), moves=())
