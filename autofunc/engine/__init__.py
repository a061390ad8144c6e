"""Engines: from a pure stage to its forward and backward functions."""

from autofunc.engine.eager import EagerStage
from autofunc.engine.functions import Produced, StageFunctions

__all__ = ["EagerStage", "Produced", "StageFunctions"]
