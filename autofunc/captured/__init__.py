"""Models captured from modules and from functions."""

from autofunc.captured.captures import Branches
from autofunc.captured.empty import empty_weights
from autofunc.captured.function import from_function
from autofunc.captured.model import CapturedModel
from autofunc.captured.module import capture_module, with_values
from autofunc.captured.outer_module import INSIDE, capture_around
from autofunc.captured.pretrained import Pretrained
from autofunc.captured.stored_tensors import StoredTensors

__all__ = [
    "INSIDE",
    "Branches",
    "CapturedModel",
    "Pretrained",
    "StoredTensors",
    "capture_around",
    "capture_module",
    "empty_weights",
    "from_function",
    "with_values",
]
