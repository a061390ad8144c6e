"""Names that would do something to a terminal, a picture or a page do nothing: they are shown."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import autofunc as af
from autofunc import schedule
from autofunc.checks.text import table
from autofunc.checks.verdict import Verdict
from autofunc.errors import AutofuncError
from autofunc.schedule.limits import MOST_NAME
from tests.cli.here import Done, run_here
from tests.hostile.names import NAMES, files


def unfit(text: str) -> str | None:
    """A line of a text that is not for terminals."""
    return next((line[:200] for line in text.split("\n") if not line.isprintable() or len(line) > 2000), None)


def faults_of(done: Done) -> Iterator[str]:
    """What is wrong with what a command left: it works, or refuses with status 2."""
    if done.status not in (0, 2):
        yield f"has status {done.status}: {done.err:.200}"
    for text in (done.out, done.err):
        if unfit(text) is not None:
            yield f"writes {unfit(text)!r}"


def faults_of_pictures(folder: Path) -> Iterator[str]:
    """SVG is well-formed and holds no element that others do not; a page has one script, which holds the data."""
    root = ElementTree.fromstring((folder / "out.svg").read_bytes())
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    if tags - {"svg", "style", "rect", "text", "g", "title", "line"}:
        yield f"draws {tags}"
    page = _Page()
    text = (folder / "out.html").read_text(encoding="utf-8")
    page.feed(text)
    if page.tags.count("script") != 1 or "img" in page.tags or page.tags.count("b") > 0:
        yield f"has a page of {page.tags}"
    found = re.search(r"^const data = (\{.*\});$", text, re.MULTILINE)
    names = [each["name"] for each in json.loads(found[1])["timelines"]] if found else ["\0"]
    for name in [*names, *(element.text or "" for element in root.iter() if "caption" in element.attrib.get("class", ""))]:
        if not name.isprintable() or len(name) > 500:
            yield f"is called {name[:200]!r} in a picture"


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


def faults_of_schedules(folder: Path, names: list[str]) -> Iterator[str]:
    """What is wrong with figures, text and pictures of schedules in files."""
    for command in ("compare", "draw"):
        yield from faults_of(run_here(folder, "schedule", command, *names))
    for name in names:
        s = schedule.read_file(folder / name)
        for picture in ("out.svg", "out.html", "out.json"):
            schedule.draw(s, folder / picture)
        yield from (f"{name!r:.100} {each}" for each in faults_of_pictures(folder))


def test_names_in_schedules(tmp_path: Path) -> None:
    """The name that a JSON file gives; one that is too long is refused."""
    s = schedule.build("1f1b", num_ranks=2, num_microbatches=2)
    files = []
    for number, name in enumerate(NAMES.values()):
        file = f"{number}.json"
        schedule.to_json(schedule.Schedule(name, s.placement, 2, s.rows), tmp_path / file)
        if len(name) <= MOST_NAME:
            files.append(file)
        else:
            done = run_here(tmp_path, "schedule", "show", file)
            assert done.status == 2 and "its name has" in done.err and not list(faults_of(done))
    found = list(faults_of_schedules(tmp_path, files))
    assert len(NAMES) >= 40 and len(files) >= 40
    assert not found, "\n".join(found)


def test_names_of_files(tmp_path: Path) -> None:
    """A schedule's file, one that is not there, what is written, a configuration, and words that are no options."""
    found, paths = [], []
    (tmp_path / "[").mkdir()  # for the one with a slash
    for number, (what, name) in enumerate([*files().items(), ("closed", "[/x]")]):
        path = f"{name}.csv"
        paths.append(path)
        (tmp_path / path).write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1")
        words = (
            ["schedule", "show", f"{name}.json"], ["schedule", "show", name], ["schedule", "show", "1f1b", "-o", path],
            ["schedule", "draw", "1f1b", "-o", f"{name}.pdf"], ["schedule", "simulate", "1f1b", "--costs", path], [name],
            ["schedule", "show", "1f1b", f"--{name}"], ["config", "validate", "-c", f"{name}.yaml"],
        )  # fmt: skip
        for chosen in (words[(number + more) % len(words)] for more in range(2)):
            found += [f"{what} {chosen} {each}" for each in faults_of(run_here(tmp_path, *chosen))]
    found += faults_of_schedules(tmp_path, paths)
    assert not found, "\n".join(found)


def chain(names: list[str]) -> nn.Sequential:
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(4, 4))
    return model


def test_names_of_layers() -> None:
    """In `explain`, and in errors."""
    names = [name.replace(".", "_") for what, name in NAMES.items() if not what.startswith("long")]
    model = af.from_module(chain(names), {"input": torch.ones(4, 4)})
    assert list(model.layers) == names
    stages = af.split(model, names[1:])
    told = af.pipeline(stages, schedule.build("gpipe", num_ranks=len(stages), num_microbatches=1)).explain()
    assert unfit(told) is None and "<script>" in told
    for point in (*NAMES.values(), "nowhere"):
        with pytest.raises(AutofuncError) as raised:
            af.split(model, [point + "?"])
        assert unfit(str(raised.value)) is None


def test_names_in_checks() -> None:
    for name in NAMES.values():
        points = [{"names": [name], "layer": True, "values": 1, "bytes": 1}]
        told = table(name, [Verdict("P1", "fail", f"{name} is shared", data={"split_points": points})])
        assert unfit(told) is None
