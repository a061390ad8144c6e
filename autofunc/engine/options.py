"""How stages are differentiated: the choices of `af.pipeline`, checked together."""

from __future__ import annotations

from dataclasses import dataclass

from autofunc.errors import AutofuncError, one_of

ENGINES = ("graph", "eager")
REMATS = ("layer", "stage", "auto")


@dataclass(frozen=True)
class EngineOptions:
    """Checked when made.

    Args:
        engine: "graph" or "eager".
        compile: run pieces as compiled code.
        remat: what the backward computes again: None, "layer", "stage" or "auto".
        memory_budget: bytes that may be alive on a rank, for "auto".

    Raises:
        AutofuncError: for an unknown choice, or choices that do not go together.
    """

    engine: str = "graph"
    compile: bool = False
    remat: str | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise AutofuncError(f"unknown engine {self.engine!r}: {one_of(self.engine, ENGINES)}")
        if self.remat is not None and self.remat not in REMATS:
            raise AutofuncError(f"unknown remat {self.remat!r}: {one_of(str(self.remat), REMATS)}, or None")
        if self.engine == "eager":
            if self.compile:
                raise AutofuncError('compile=True compiles captured stages, so it needs engine="graph"')
            if self.remat == "auto":
                raise AutofuncError('remat="auto" weighs captured stages, so it needs engine="graph"')
        if (self.remat == "auto") != (self.memory_budget is not None):
            raise AutofuncError(
                f'remat={self.remat!r}, memory_budget={self.memory_budget}: "auto" goes with the bytes that may be alive '
                "on a rank, and only that"
            )
        if self.memory_budget is not None and self.memory_budget <= 0:
            raise AutofuncError(f"memory_budget={self.memory_budget}: expected a number of bytes")
