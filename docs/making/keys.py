"""The tables of docs/configuration.md: `python docs/making/keys.py` brings them up to date with the schema.

A comment `<!-- keys: distributed seed -->` stands above each table and says which keys it has. Keys, types and defaults
come from the schema. Meanings are written by hand and stay; a new key begins with its description there. A default that
the schema leaves open (null) may be put into words by hand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from autofunc.config import FinetuneConfig

PAGE = Path(__file__).parents[1] / "configuration.md"

_TABLE = re.compile(r"(^<!-- keys: ([\w ]+) -->\n)((?:^\|.*\n)*)", re.MULTILINE)
_ROW = re.compile(r"^\| `([\w.]+)` \| (.*?) \| (.*?) \| (.*) \|$", re.MULTILINE)
_HEAD = "| key | type | default | meaning |\n|---|---|---|---|\n"
_LARGE = 10_000  # limits above are there to refuse mistakes; nobody plans with them


class Key(NamedTuple):
    """A key as the schema has it. `default` is None where the schema leaves it open."""

    name: str
    kind: str
    default: str | None
    required: bool
    description: str


def keys() -> dict[str, list[Key]]:
    """All keys with their dotted names, by the first part of the name."""
    schema = FinetuneConfig.model_json_schema()
    found: dict[str, list[Key]] = {}
    for key in _below(schema, schema, ""):
        found.setdefault(key.name.split(".")[0], []).append(key)
    return found


def _below(section: Mapping[str, Any], schema: Mapping[str, Any], prefix: str) -> Iterator[Key]:
    required = section.get("required", ())
    for name, given in section["properties"].items():
        forms = [each for each in _forms(given, schema) if each.get("type") != "null"]
        inside = [each for each in forms if "properties" in each]
        opens = any("_target_" in each["properties"] for each in inside)
        if inside and not opens:
            if any(each is not inside[0] for each in forms):
                yield _key(prefix + name, given, forms, name in required)
            yield from _below(inside[0], schema, f"{prefix}{name}.")
        else:
            yield _key(prefix + name, given, forms, name in required)
            for each in inside[:1]:
                below = _below(each, schema, f"{prefix}{name}.")
                yield from (key for key in below if not key.name.endswith("._target_"))


def _key(name: str, given: Mapping[str, Any], forms: list[Any], required: bool) -> Key:
    default = given.get("default")
    empty = default is None or default in ([], {})
    kind = " or ".join(dict.fromkeys(_kind(form) for form in forms))
    return Key(name, kind, None if empty else _literal(default), required, given.get("description", ""))


def _literal(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _forms(given: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Any]:
    """The alternatives of a value, with references followed."""
    if "$ref" in given:
        return _forms(schema["$defs"][given["$ref"].rpartition("/")[2]], schema)
    for of in ("anyOf", "oneOf"):
        if of in given:
            return [form for each in given[of] for form in _forms(each, schema)]
    return [given]


def _kind(form: Mapping[str, Any]) -> str:
    """A form in words."""
    if "enum" in form or "const" in form:
        return ", ".join(_literal(value) for value in form.get("enum", [form.get("const")]))
    kind = form.get("type", "any")
    if kind in ("integer", "number"):
        return {"integer": "int", "number": "float"}[kind] + _limits(form)
    words = {"string": "text", "boolean": "`true`, `false`", "array": "list"}
    return words.get(kind, "section with `_target_`" if "_target_" in form.get("properties", {}) else "mapping")


def _limits(form: Mapping[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {form[name]:g}" for name, sign in signs.items() if name in form and abs(form[name]) <= _LARGE]
    return " " + ", ".join(limits) if limits else ""


def current(text: str) -> str:
    """The page with its tables as the schema has them.

    Raises:
        ValueError: when a key is in no table, or in two.
    """
    known, shown = keys(), []
    kept = {match[1]: (match[3], match[4]) for match in _ROW.finditer(text)}

    def table(match: re.Match[str]) -> str:
        names = match[2].split()
        shown.extend(names)
        rows = [_row(key, *kept.get(key.name, ("none", key.description))) for name in names for key in known[name]]
        return match[1] + _HEAD + "".join(rows)

    text = _TABLE.sub(table, text)
    if sorted(shown) != sorted(known):
        wrong = sorted(set(known) ^ set(shown)) or sorted(name for name in shown if shown.count(name) > 1)
        raise ValueError(f"keys that are in no table, or in two: {wrong}")
    return text


def _row(key: Key, default: str, meaning: str) -> str:
    shown = "required" if key.required else key.default or default
    return f"| `{key.name}` | {key.kind} | {shown} | {meaning} |\n"


if __name__ == "__main__":
    PAGE.write_text(current(PAGE.read_text()))
