"""Import a user's file by its path."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from autofunc.errors import FAILURES, AutofuncError, ConfigError, in_brief, one_of


def load_file(path: Path) -> ModuleType:
    """Import a Python file once, however its path is written.

    Raises:
        ConfigError: if it is missing or fails.
    """
    full = path.expanduser().resolve()
    if not full.is_file():
        beside = sorted(each.name for each in full.parent.glob("*.py")) if full.parent.is_dir() else []
        raise ConfigError(
            f"there is no file {str(path)!r} (looked for {full}); "
            + (one_of(path.name, beside) if beside else "its folder holds no Python files")
        )
    name = f"autofunc_user_{full.stem}_{hashlib.blake2b(str(full).encode(), digest_size=4).hexdigest()}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, full)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except AutofuncError:
            del sys.modules[name]
            raise
        except FAILURES as error:
            del sys.modules[name]
            raise ConfigError(f"running {path} failed: {in_brief(error)}") from error
    return sys.modules[name]
