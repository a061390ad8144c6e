"""An exponential moving average of parameters, as a function of trees."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from autofunc import tree
from autofunc.errors import ModelError, one_of
from autofunc.shard.dtensors import like, local


@torch.inference_mode(False)
@torch.no_grad()
def ema(average: tree.Nested, params: tree.Nested, decay: float) -> TensorDict:
    """Return the exponential moving average after another step: `decay * average + (1 - decay) * params`, a new tree.

    Both trees are this process's, sharded or not, and are not modified. Leaves that are not floating point are taken from
    `params`.

    Args:
        average: the average so far; at first `params.clone()`, since `update` writes into `params`. It keeps its dtypes, so
            for bf16 parameters start from `params.float()`.
        params: of the same paths.
        decay: from 0, which forgets the average, to 1, which keeps it.

    Raises:
        ModelError: for a decay out of range, or paths that differ.

    Example:
        average = params.clone()
        for step in range(1, num_steps + 1):
            ...
            params, state = optimizer.update(grads, state, params)
            average = af.ema(average, params, decay=0.999)
        validation_loss = pipe(average, validation_batch)
    """
    if not 0 <= decay <= 1:
        raise ModelError(f"ema: decay={decay}; expected a number from 0 to 1, such as 0.999")
    before, now = tree.flatten(average), tree.flatten(params)
    others = [*(path for path in now if path not in before), *(path for path in before if path not in now)]
    if others:
        raise ModelError(f"ema: only one of the average and the parameters has {others[0]!r}; {one_of(others[0], before)}")
    numbers = {path: leaf for path, leaf in before.items() if leaf.is_floating_point()}
    if not numbers:
        return tree.to_tensordict({path: leaf.clone() for path, leaf in now.items()})
    old = tree.to_tensordict({path: local(leaf) for path, leaf in numbers.items()})
    new = tree.to_tensordict({path: local(now[path]).to(leaf.dtype) for path, leaf in numbers.items()})
    made = tree.flatten(old.lerp(new, 1 - decay))
    return tree.to_tensordict(
        {path: like(numbers[path], made[path]) if path in made else leaf.clone() for path, leaf in now.items()}
    )
