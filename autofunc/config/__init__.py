"""Configuration: read, checked and turned into objects at the edge; nothing below `train/` sees it."""

from autofunc.config.read import load_config, read_config
from autofunc.config.schema import FinetuneConfig, StepScheduler, parse_config
from autofunc.config.target import check_arguments, import_object, instantiate, resolve_target

__all__ = [
    "FinetuneConfig",
    "StepScheduler",
    "check_arguments",
    "import_object",
    "instantiate",
    "load_config",
    "parse_config",
    "read_config",
    "resolve_target",
]
