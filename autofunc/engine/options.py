"""The engine options of `af.pipeline`, checked together."""

from __future__ import annotations

from dataclasses import dataclass

from autofunc.errors import AutofuncError, one_of

ENGINES = ("graph", "eager")
REMATS = ("layer", "stage", "auto")
GRAPHS, BOTH = "graphs", "inductor+graphs"
COMPILES = (GRAPHS, BOTH)
"""The values of `compile` besides True and False."""


@dataclass(frozen=True)
class EngineOptions:
    """How stages are differentiated and run; checked on construction.

    Args:
        engine: "graph" or "eager".
        compile: True runs pieces as compiled code, "graphs" records steps as CUDA graphs, "inductor+graphs" does both.
        remat: what the backward recomputes: None, "layer", "stage" or "auto".
        memory_budget: bytes that may be alive on a rank, for "auto".
        overlap_f_b: interleave the F/B pairs that the schedule marks, if their stages exchange values.

    Raises:
        AutofuncError: for an unknown choice, or choices that conflict.
    """

    engine: str = "graph"
    compile: bool | str = False
    remat: str | None = None
    memory_budget: int | None = None
    overlap_f_b: bool = True

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise AutofuncError(f"unknown engine {self.engine!r}: {one_of(self.engine, ENGINES)}")
        if self.remat is not None and self.remat not in REMATS:
            raise AutofuncError(f"unknown remat {self.remat!r}: {one_of(str(self.remat), REMATS)}, or None")
        if not isinstance(self.compile, bool) and self.compile not in COMPILES:
            raise AutofuncError(f"unknown compile {self.compile!r}: {one_of(str(self.compile), COMPILES)}, True or False")
        if self.engine == "eager":
            if self.compile:
                does = "records" if self.compile == GRAPHS else "compiles"
                raise AutofuncError(f'compile={self.compile!r} {does} captured stages, so it needs engine="graph"')
            if self.remat == "auto":
                raise AutofuncError('remat="auto" measures captured stages, so it needs engine="graph"')
        if (self.remat == "auto") != (self.memory_budget is not None):
            raise AutofuncError(
                f'remat={self.remat!r}, memory_budget={self.memory_budget}: "auto" needs the bytes that may be alive '
                "on a rank, and the other choices take none"
            )
        if self.memory_budget is not None and self.memory_budget <= 0:
            raise AutofuncError(f"memory_budget={self.memory_budget}: expected a number of bytes")

    @property
    def compiles(self) -> bool:
        """True if pieces run as compiled code."""
        return self.compile in (True, BOTH)

    @property
    def records(self) -> bool:
        """True if steps run as CUDA graphs."""
        return self.compile in COMPILES

    @property
    def overlaps(self) -> bool:
        """True if marked pairs are interleaved: only captured stages run operator by operator can stop where they wait."""
        return self.overlap_f_b and self.engine == "graph" and not self.compile
