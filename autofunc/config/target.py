"""`_target_`: import the object that a configuration names, and call it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from autofunc.config.arguments import check_arguments
from autofunc.errors import FAILURES, AutofuncError, ConfigError, full_message, in_brief, one_of
from autofunc.shown import quoted
from autofunc.source_file import load_file


def resolve_target(target: str, where: str) -> Callable[..., Any]:
    """Return the callable that a key such as `_target_` names, see `import_object`.

    Raises:
        ConfigError: if it is missing or not callable.
    """
    found = import_object(target, where)
    if not callable(found):
        raise ConfigError(f"{where}: {target!r} is {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]


def import_object(target: str, where: str) -> Any:
    """Import what a name in a configuration stands for: a dotted path, or `path/to/file.py:name`.

    Dotted paths are also looked up in the working directory, after all installed packages.

    Args:
        target: the name.
        where: the key, for messages.

    Raises:
        ConfigError: if the file, module or name is missing.
    """
    if ".py:" in target:
        file, _, name = target.partition(".py:")
        try:
            module, dotted = load_file(Path(file + ".py")), name
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    else:
        module, dotted = _import_longest(target, where)
    found: Any = module
    for part in dotted.split("."):
        if not hasattr(found, part):
            public = [known for known in dir(found) if not known.startswith("_")]
            hint = _hidden_folder_hint(target.split(".")[0])
            name = getattr(found, "__name__", type(found).__name__)
            raise ConfigError(f"{where}: {target!r}: {name} has no {part!r}; {one_of(part, public)}{hint}")
        found = getattr(found, part)
    return found


def instantiate(node: Mapping[str, Any], where: str) -> Any:
    """Call a section's target with its other keys, after instantiating nested sections with a `_target_`, in lists too.

    Args:
        node: the section.
        where: its name, for messages.

    Raises:
        ConfigError: for unknown or missing arguments, or if the call fails.
    """
    target = resolve_target(node["_target_"], f"{where}._target_")
    given = {key: _nested(value, f"{where}.{key}") for key, value in node.items() if key != "_target_"}
    return call(partial(target, **check_arguments(target, given, where, node["_target_"])), where, node["_target_"])


@contextmanager
def refusing_exit() -> Iterator[None]:
    """Wrap code that a configuration names: such code must not end the process silently.

    Raises:
        ConfigError: naming the line that called exit.
    """
    try:
        yield
    except SystemExit as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"{last.filename}:{last.lineno}, in {last.name}, would end this process ({in_brief(error)}); code that a "
            "configuration names must return, or raise an error"
        ) from error


def call(function: Callable[[], Any], where: str, name: str) -> Any:
    """Call a function that a configuration names, and return its result.

    Args:
        function: takes no arguments.
        where: the key, for messages.
        name: the function's name, for messages.

    Raises:
        ConfigError: if it raises anything, or would end the process.
    """
    try:
        return function()
    except AutofuncError as error:
        raise ConfigError(f"{where}: {full_message(error)}") from error
    except FAILURES as error:
        raise ConfigError(f"{where}: {name} failed: {in_brief(error)}") from error


def _nested(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        if "_target_" in value:
            return instantiate(value, where)
        return {key: _nested(entry, f"{where}.{key}") for key, entry in value.items()}
    if isinstance(value, list):
        return [_nested(entry, f"{where}[{number}]") for number, entry in enumerate(value)]
    return value


def _import_longest(target: str, where: str) -> tuple[Any, str]:
    """Import the longest prefix of a dotted path that is a module; return it and the rest of the path."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    parts = target.split(".")
    for count in range(len(parts) - 1, 0, -1) if all(parts) else ():
        name = ".".join(parts[:count])
        try:
            return importlib.import_module(name), ".".join(parts[count:])
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise ConfigError(f"{where}: importing {name!r} failed: {in_brief(error)}") from error
        except FAILURES as error:
            raise ConfigError(f"{where}: importing {quoted(name)} failed: {in_brief(error)}") from error
    raise ConfigError(
        f"{where}: {quoted(target)} cannot be imported: expected a dotted path to a callable, such as "
        f"'stages.gpt2.build_gpt2_model', or 'path/to/file.py:name'.{_hidden_folder_hint(parts[0])}"
    )


def _hidden_folder_hint(package: str) -> str:
    """Suggest a fix if a folder of the user's is hidden by an installed package of the same name."""
    own, installed = Path.cwd() / package, sys.modules.get(package)
    if installed is None or not own.is_dir() or str(own) in list(getattr(installed, "__path__", [])):
        return ""
    return f". Your folder {package}/ is hidden by the installed package of that name: rename it, or use 'file.py:name'."
