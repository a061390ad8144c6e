"""Fake tensors: shapes and dtypes without memory. The only file that knows how torch makes them."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Fake tensors and their errors have no public names; tried with torch 2.13.0.
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from autofunc.errors import AutofuncError, ModelError, in_brief
from autofunc.installed import is_of_torch

_LOG = logging.getLogger("torch._subclasses.fake_tensor")
"""Torch logs the traceback of each failing operator here; our errors are clearer."""


class _Mode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Infers shapes that torch takes to depend on data, though they do not."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._ctc_loss.default:
            with self:
                return _ctc_loss(*args, **(kwargs or {}))
        return super().dispatch(func, types, args, kwargs)


def _ctc_loss(
    log_probs: Tensor, targets: Tensor, input_lengths: Sequence[int], target_lengths: Sequence[int], *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return empty losses per row; and per row, step, and place among targets and blanks, the likelihood of reaching it."""
    steps, rows = log_probs.shape[:2]
    return log_probs.new_empty(rows), log_probs.new_empty(rows, steps, 2 * max(target_lengths) + 1)


def fake_mode() -> FakeTensorMode:
    """Return a context in which operators compute shapes only. Real constants that a function closes over are accepted."""
    # a shape environment lets a loss select rows by a mask, whose number is not known yet
    return _Mode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)


def without_memory(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Return a fake tensor to keep in place of a real one, without keeping the real tensor's memory alive."""
    return mode.from_tensor(tensor) if tensor.layout is torch.strided else tensor


def fake_like(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """Return a fake tensor of the active mode, like a real tensor or one of another mode."""
    if not is_fake(tensor):
        return mode.from_tensor(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor is fake: a shape without values."""
    return isinstance(tensor, FakeTensor)


def is_own(frame: traceback.FrameSummary) -> bool:
    """Return whether a frame is in this library."""
    return frame.filename.startswith(str(Path(__file__).parent))


def user_line(frames: traceback.StackSummary) -> str:
    """Return the innermost line of a traceback outside torch and this library."""
    outside = [frame for frame in frames if not is_of_torch(frame.filename) and not is_own(frame)]
    frame = (outside or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}: {frame.line}"


@contextmanager
def naming_errors(what: str) -> Iterator[None]:
    """Turn errors on fake tensors into a `ModelError` that names the stage and the user's line."""
    disabled, _LOG.disabled = _LOG.disabled, True
    try:
        yield
    except AutofuncError:
        raise
    except (DataDependentOutputException, GuardOnDataDependentSymNode) as error:
        line = user_line(traceback.extract_tb(error.__traceback__))
        raise ModelError(
            f"{what} reads the value of a tensor ({line}), which is not known while shapes are inferred; "
            "keep it a tensor: no .item(), no 'if' on a tensor"
        ) from error
    except Exception as error:
        line = user_line(traceback.extract_tb(error.__traceback__))
        raise ModelError(f"{what} cannot run on this batch: {in_brief(error)} ({line})") from error
    finally:
        _LOG.disabled = disabled
