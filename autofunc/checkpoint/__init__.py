"""Checkpoints: a run's state at a step, in a folder that any layout can read."""

from autofunc.checkpoint.folder import read_extra
from autofunc.checkpoint.read import Checkpoint, check_fits, load
from autofunc.checkpoint.write import Saving, begin_save, save

__all__ = ["Checkpoint", "Saving", "begin_save", "check_fits", "load", "read_extra", "save"]
