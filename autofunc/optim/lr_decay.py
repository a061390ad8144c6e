"""Named learning rate shapes: a warm-up, then a decay. Plain arithmetic on the step.

Shapes and option names follow NVIDIA's Megatron-LM, `megatron/core/optimizer_param_scheduler.py`, as in NeMo AutoModel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autofunc.errors import ModelError, one_of

_Fraction = Callable[[float], float]

_FALLS: Mapping[str, _Fraction] = {
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (math.cos(math.pi * share) + 1.0),
    "exponential": lambda share: 2.0 * 0.5**share - 1.0,
    "minus_sqrt": lambda share: 1.0 - math.sqrt(share),
}
"""The remaining fraction of `max_lr - min_lr` after a share of the decay."""

STYLES = ("cosine", "linear", "constant", "inverse-square-root", "WSD")
MOST_WARMUP_STEPS = 1000


@dataclass(frozen=True)
class Decay:
    """A learning rate as a function of the number of updates so far.

    Args:
        style: one of `STYLES`. WSD (warm-up, stable, decay) stays at `max_lr` until the last `wsd_decay_steps`.
        lr: of the optimizer.
        lr_decay_steps: updates, including the warm-up, after which it stays at `min_lr`; "constant" needs none.
        lr_warmup_steps: updates of linear warm-up to `max_lr`; by default a tenth of `lr_decay_steps`, at most 1,000.
        init_lr: of the first update if there is a warm-up; by default a tenth of `lr`.
        min_lr: of the last update; by default a hundredth of `lr`.
        max_lr: by default `lr`.
        wsd_decay_steps: length of WSD's final decay in updates; by default a tenth of `lr_decay_steps`.
        lr_wsd_decay_style: shape of WSD's decay: exponential, linear, cosine or minus_sqrt.

    Raises:
        ModelError: for unknown styles and inconsistent numbers.
    """

    style: str
    lr: float
    lr_decay_steps: int | None = None
    lr_warmup_steps: int | None = None
    init_lr: float | None = None
    min_lr: float | None = None
    max_lr: float | None = None
    wsd_decay_steps: int | None = None
    lr_wsd_decay_style: str = "exponential"

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ModelError(f"lr_decay_style {self.style!r}: {one_of(self.style, STYLES)}")
        if self.lr_wsd_decay_style not in _FALLS:
            raise ModelError(f"lr_wsd_decay_style {self.lr_wsd_decay_style!r}: {one_of(self.lr_wsd_decay_style, _FALLS)}")
        if self.lr_decay_steps is None and self.style != "constant":
            raise ModelError(f"lr_decay_style {self.style!r} needs lr_decay_steps: the steps until it reaches min_lr")
        low, high, first = self._lowest, self._highest, self._first
        if not 0.0 <= low <= high:
            raise ModelError(f"min_lr={low:g} and max_lr={high:g}: expected 0 <= min_lr <= max_lr")
        if not 0.0 <= first <= high:
            raise ModelError(f"init_lr={first:g} and max_lr={high:g}: expected 0 <= init_lr <= max_lr")
        if self.style != "constant" and self._warmup >= self._end:
            raise ModelError(
                f"lr_warmup_steps={self._warmup} leaves nothing of lr_decay_steps={self._end}, which includes the warm-up: "
                f"give at most {self._end - 1}"
            )
        if self.style == "WSD" and not 0 < self._fall <= self._end - self._warmup:
            raise ModelError(
                f"wsd_decay_steps={self._fall} does not fit between lr_warmup_steps={self._warmup} and "
                f"lr_decay_steps={self._end}: give at least 1 and at most {self._end - self._warmup}"
            )

    def __call__(self, updates: int) -> float:
        """Return the learning rate of the next update, after `updates` updates."""
        if self._warmup and updates <= self._warmup:
            return self._first + (self._highest - self._first) * updates / self._warmup
        if self.style == "constant":
            return self._highest
        if updates > self._end:
            return self._lowest
        if self.style == "inverse-square-root":
            return max(self._lowest, self._highest * math.sqrt(max(self._warmup, 1) / max(updates, 1)))
        if self.style == "WSD":
            done = max(updates - (self._end - self._fall), 0) / self._fall
            left = _FALLS[self.lr_wsd_decay_style](done)
        else:
            left = _FALLS[self.style]((updates - self._warmup) / (self._end - self._warmup))
        return self._lowest + left * (self._highest - self._lowest)

    @property
    def _end(self) -> int:
        return self.lr_decay_steps or 0

    @property
    def _warmup(self) -> int:
        return min(MOST_WARMUP_STEPS, self._end // 10) if self.lr_warmup_steps is None else self.lr_warmup_steps

    @property
    def _fall(self) -> int:
        return max(self._end // 10, 1) if self.wsd_decay_steps is None else self.wsd_decay_steps

    @property
    def _highest(self) -> float:
        return self.lr if self.max_lr is None else self.max_lr

    @property
    def _lowest(self) -> float:
        return 0.01 * self.lr if self.min_lr is None else self.min_lr

    @property
    def _first(self) -> float:
        return 0.1 * self.lr if self.init_lr is None else self.init_lr
