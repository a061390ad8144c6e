"""ARCHITECTURE.md and docs/where-is-it.md are true to the tree.

Layers are those of the import contract, tables name every module once, files exist, and answers are in the files they name.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "ARCHITECTURE.md").read_text()
AUTOFUNC = ROOT / "autofunc"
SUFFIXES = (".py", ".html", ".md", ".yml", ".yaml", ".toml", ".ipynb", "/")


def contract_layers() -> list[list[str]]:
    """The layers of the first import contract from the top, each as its modules."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contract = tomllib.load(file)["tool"]["importlinter"]["contracts"][0]
    assert contract["containers"] == ["autofunc"]
    return [re.split(r"\s*[|:]\s*", layer) for layer in contract["layers"]]


def section(heading: str) -> str:
    """The text from a heading of the second level to the next one."""
    return PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of each row of Markdown's tables, without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rules = {number for number, line in enumerate(lines) if set(line) <= set("|-")}
    for number, line in enumerate(lines):
        if not {number, number + 1} & rules:
            yield [cell.strip() for cell in line.strip("|").split("|")]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def shown_as(module: str) -> str:
    return f"`{module}/`" if (AUTOFUNC / module).is_dir() else f"`{module}`"


def test_layer_table_is_the_import_contract() -> None:
    written = list(rows(section("Layers").split("\n### ")[0]))
    titles = {name.strip("/"): title for title, modules in written for name in quoted(modules)}
    right = [[titles.get(layer[0], layer[0]), ", ".join(map(shown_as, layer))] for layer in contract_layers()]
    table = "\n".join(f"| {title} | {modules} |" for title, modules in right)
    assert written == right, f"the layers of pyproject.toml, to be put into ARCHITECTURE.md:\n{table}"


def folder_of(heading: str) -> Path:
    """The folder that a heading names, and autofunc/ if it names none."""
    named = re.match(r"`([\w/]+)/`", heading)
    return AUTOFUNC if named is None else ROOT / "stages" if named[1] == "stages" else AUTOFUNC / named[1]


def parts() -> Iterator[tuple[Path, str]]:
    """Each part under a heading of the third level of section Layers, with the folder that its names are relative to."""
    for part in section("Layers").split("\n### ")[1:]:
        heading, text = part.split("\n", 1)
        yield folder_of(heading), text


def test_tables_name_every_module_once() -> None:
    named = Counter(
        folder / name
        for folder, text in parts()
        for first, *_ in rows(text)
        for name in quoted(first)
        if name.endswith((".py", ".html")) and not (ROOT / name).is_file()
    )
    paths = [path for package in (AUTOFUNC, ROOT / "stages") for path in package.rglob("*")]
    there = {path for path in paths if path.suffix in {".py", ".html"} and path.name != "__init__.py"}
    assert len(there) > 400
    assert sorted(map(str, there - named.keys())) == [], "ARCHITECTURE.md names them in no table"
    assert sorted(map(str, named.keys() - there)) == [], "ARCHITECTURE.md names them, and they are gone"
    assert [str(path) for path, count in named.items() if count > 1] == []


def is_there(name: str, folder: Path) -> bool:
    return any(any(base.glob(name.rstrip("/"))) for base in (ROOT, AUTOFUNC, folder))


def test_named_files_and_folders_exist() -> None:
    texts = [
        (ROOT, PAGE.split("\n## Layers\n")[0]),
        *parts(),
        (ROOT, section("Layers").split("\n### ")[0]),
        (ROOT, section("Decisions")),
    ]
    names = {
        (name, folder)
        for folder, text in texts
        for name in [*quoted(text), *re.findall(r"\]\(([^)#:]+)\)", text)]
        if re.fullmatch(r"[\w./*-]+", name) and name.endswith(SUFFIXES)
    }
    assert len(names) > 400
    assert sorted(name for name, folder in names if not is_there(name, folder)) == []


@pytest.mark.parametrize("name", ["missing.py", "runtime/missing.py", "missing/"])
def test_missing_files_are_found(name: str) -> None:
    assert not is_there(name, AUTOFUNC / "runtime")


def defined_in(path: Path) -> set[str]:
    """The functions, classes and constants at the top level of a source."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_answers_are_where_the_page_says() -> None:
    answers = list(rows((ROOT / "docs" / "where-is-it.md").read_text()))
    assert len(answers) == 20
    assert len({question for question, _, _ in answers}) == len({file for _, file, _ in answers}) == 20
    for _, file, name in answers:
        path = ROOT / file.strip("`")
        assert path.is_file(), file
        assert name.strip("`") in defined_in(path), (file, name)
