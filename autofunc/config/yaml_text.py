"""The YAML of configurations: text, numbers, true, false, lists and mappings, checked before objects are built from it."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

from autofunc.errors import ConfigError
from autofunc.shown import quoted

MOST_BYTES, MOST_DEEP, MOST_DIGITS = 1 << 18, 32, 100
"""Limits: bytes of a file, depth of nesting, digits of a number."""

_NUMBER = re.compile(r"[-+]?(0[xX][0-9a-fA-F_]+|0[bB][01_]+|[0-9_]+(\.[0-9_]*)?([eE][-+]?[0-9]+)?)")
_TAG = "tag:yaml.org,2002:"
_SCALARS = {f"{_TAG}{name}" for name in ("int", "float", "bool", "null")}
_TAGS = {f"{_TAG}{name}" for name in ("str", "seq", "map")} | _SCALARS
_NOTHING = ("", "~", "null", "Null", "NULL")
_WIDE = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "", codecs.BOM_UTF16_BE: ""}


def read_text(path: Path) -> str:
    """Read a file in UTF-8, or in UTF-16 if it starts with a byte order mark.

    Raises:
        ConfigError: if it cannot be read, is too large, or has another encoding.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ConfigError(f"{path} has {size >> 10:,} KiB; a configuration may have at most {MOST_BYTES >> 10} KiB")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    mark = next((mark for mark in _WIDE if content.startswith(mark)), b"")
    name = _WIDE.get(mark, "UTF-16 without its first two bytes" if content[1:4:2] == b"\0\0" else "")
    if name:
        raise ConfigError(f"{path} is {name}; save it as UTF-8")
    try:
        text = content.decode("utf-16" if mark else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path} is not {error.encoding} (line {line}: {error.reason}); save it as UTF-8") from error
    if "\0" in text:
        raise ConfigError(f"{path} is not text: line {text[: text.index(chr(0))].count(chr(10)) + 1} has a zero byte")
    return text


def load_yaml(text: str, key: str = "") -> Any:
    """Load a YAML text for OmegaConf to resolve; for an override, its one value.

    Args:
        text: a mapping; or, with `key`, any value.
        key: the override's key, for messages.

    Raises:
        ConfigError: if the text is not YAML, is nested too deeply, or has values that configurations cannot have.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    whole = f"value: {text}" if key else text
    try:
        _check_depth(whole, key)
        root = yaml.compose(whole, Loader=_base_loader())
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError("the file is not a mapping of sections; expected keys such as model:, dataset:, optimizer:")
        if root is not None:
            _check_values(root.value[0][1] if key else root, key)
        made = OmegaConf.load(StringIO(whole))
        return OmegaConf.to_container(made, resolve=False)["value"] if key else made  # type: ignore[call-overload, index]
    except yaml.YAMLError as error:
        if key:
            in_quotes = f"'\"{quoted(text)[1:-1]}\"'"
            raise ConfigError(
                f"override {key}={quoted(text)} is not YAML; put it in quotes inside quotes: {in_quotes}"
            ) from error
        raise ConfigError(_in_words(error, text)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(in_one_line(error, key)) from error


def in_one_line(error: Exception, key: str = "") -> str:
    """Describe an OmegaConf error in one line: the key, and what is wrong."""
    return f"{key or getattr(error, 'full_key', None) or 'it'}: {_short(str(error).splitlines()[0])}"


def _base_loader() -> Any:
    """Return the loader that reads every value without a tag as text."""
    import yaml

    return getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def _check_depth(text: str, key: str) -> None:
    """Refuse values nested too deeply before anything recurses into them; an alias is as deep as what it stands for."""
    import yaml

    heights: dict[str, int] = {}
    opened: list[tuple[str | None, int]] = []  # anchor, and the height of its contents so far
    for event in yaml.parse(text, Loader=_base_loader()):
        height = heights.get(event.anchor or "", 0) if isinstance(event, yaml.AliasEvent) else 0
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, 0))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, height = opened.pop()
            height += 1
            heights |= {anchor: height} if anchor else {}
        if len(opened) + height > MOST_DEEP:
            where = f"{key}: " if key else f"line {event.start_mark.line + 1}: "
            raise ConfigError(f"{where}values are nested more than {MOST_DEEP} deep")
        if opened:
            opened[-1] = (opened[-1][0], max(opened[-1][1], height))


def _check_values(root: Any, key: str) -> None:
    """Refuse tags of other types, numbers with more digits than any key takes, and zero bytes in text."""
    import yaml

    for path, node in _nodes(root, key):
        line = f"line {node.start_mark.line + 1}"
        where = path if key else f"{path} ({line})" if path else line
        if node.tag not in _TAGS:
            tag = node.tag.replace(_TAG, "!!")
            raise ConfigError(f"{where}: the tag {tag}; a configuration has text, numbers, true, false, lists and mappings")
        if isinstance(node, yaml.MappingNode):
            for name, _ in node.value:
                if not isinstance(name, yaml.ScalarNode) or (not name.style and name.value in _NOTHING):
                    raise ConfigError(f"{where}: a key is not text, in line {name.start_mark.line + 1}")
        if not isinstance(node, yaml.ScalarNode):
            continue
        if "\0" in node.value:
            raise ConfigError(f"{where}: {quoted(node.value)} has a zero byte")
        if not node.style and len(node.value) > MOST_DIGITS and _NUMBER.fullmatch(node.value):
            raise ConfigError(f"{where}: a number of {len(node.value.strip('+-'))} digits")
        if node.tag in _SCALARS:
            try:
                yaml.constructor.SafeConstructor().construct_object(node)
            except (ValueError, LookupError, AttributeError, yaml.YAMLError) as error:
                kind = node.tag.removeprefix(_TAG)
                raise ConfigError(f"{where}: {quoted(node.value)} is not a valid {kind}") from error


def _nodes(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield all values with their dotted paths; a value with several paths, through aliases, once with the first."""
    import yaml

    waiting, seen = [(path, node)], set()
    while waiting:
        path, node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield path, node
        if isinstance(node, yaml.SequenceNode):
            waiting += [(f"{path}[{number}]", each) for number, each in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            names = [(name.value if isinstance(name, yaml.ScalarNode) else "?", each) for name, each in node.value]
            waiting += [(f"{path}.{name}" if path else str(name), each) for name, each in names]


def _in_words(error: Any, text: str) -> str:
    """Describe a PyYAML error in one line: where it is, and what is wrong."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        context = f" {error.context}" if error.context else ""
        return f"line {mark.line + 1} cannot be read: {_short(error.problem or '')}{_short(context)}"
    position = getattr(error, "position", None)
    before = text.encode()[:position] if position is not None else b""
    return f"line {before.count(bytes([10])) + 1} cannot be read: {str(error).splitlines()[0]}"


def _short(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:300]}..."
