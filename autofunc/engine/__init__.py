"""Engines: from a pure stage to its forward and backward functions."""

from autofunc.engine.capture import capture
from autofunc.engine.compile import require_compiler
from autofunc.engine.eager import EagerStage
from autofunc.engine.functions import Microbatch, Produced, StageFunctions
from autofunc.engine.graph import GraphStage
from autofunc.engine.options import EngineOptions
from autofunc.engine.overlap import Overlapped
from autofunc.engine.residuals import Keep

__all__ = [
    "EagerStage",
    "EngineOptions",
    "GraphStage",
    "Keep",
    "Microbatch",
    "Overlapped",
    "Produced",
    "StageFunctions",
    "capture",
    "require_compiler",
]
