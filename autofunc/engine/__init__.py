"""Engines: from a pure stage to its forward and backward functions."""

from autofunc.engine.eager import EagerStage
from autofunc.engine.functions import Microbatch, Produced, StageContext, StageFunctions
from autofunc.engine.graph import GraphStage

__all__ = ["EagerStage", "GraphStage", "Microbatch", "Produced", "StageContext", "StageFunctions"]
