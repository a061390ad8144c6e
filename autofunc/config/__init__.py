"""Configuration: read, checked and turned into objects at the edge; nothing below `train/` sees it."""

from autofunc.config.arguments import check_arguments
from autofunc.config.read import load_config, read_config
from autofunc.config.schema import FinetuneConfig, Peft, StepScheduler, parse_config
from autofunc.config.sections import check_targets, target_and_arguments
from autofunc.config.target import call, import_object, instantiate, refusing_exit, resolve_target

__all__ = [
    "FinetuneConfig",
    "Peft",
    "StepScheduler",
    "call",
    "check_arguments",
    "check_targets",
    "import_object",
    "instantiate",
    "load_config",
    "parse_config",
    "read_config",
    "refusing_exit",
    "resolve_target",
    "target_and_arguments",
]
