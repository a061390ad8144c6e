"""Models captured from modules and functions."""

from autofunc.captured.captured import CapturedModel
from autofunc.captured.function import from_function
from autofunc.captured.module import from_module

__all__ = ["CapturedModel", "from_function", "from_module"]
