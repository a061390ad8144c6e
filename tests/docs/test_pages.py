"""What the pages show runs as it is printed: Python, configurations and commands."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

import autofunc as af
from autofunc.config import load_config, parse_config
from autofunc.config.sections import problems_of_known
from autofunc.config.yaml_text import load_yaml
from tests.docs.blocks import LANGUAGES, OTHER_PROGRAMS, ROOT, Block, blocks_of, run_page
from tests.docs.command_line import parsed
from tests.pool import WorkerPool

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_BLOCKS = [page for page in PAGES if blocks_of(page)]
assert len(WITH_BLOCKS) > 10


def named(page: Path) -> str:
    return page.relative_to(ROOT).with_suffix("").as_posix()


def blocks(*languages: str) -> list[Any]:
    """Parameters of a test: every block in one of these languages."""
    found = [(page, block) for page in WITH_BLOCKS for block in blocks_of(page) if block.language in languages]
    assert found
    return [pytest.param(block, id=f"{named(page)}:{block.line}") for page, block in found]


@pytest.mark.parametrize("page", [page for page in WITH_BLOCKS if page.name != "README.md"], ids=named)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, full=False)


FULL = [page for page in WITH_BLOCKS if any(block.mark.startswith(("full", "ranks")) for block in blocks_of(page))]
AS_A_NOTEBOOK = "docs/tutorial"
"""Where notebooks can be run, test_made.py runs this page as one, with all it does."""


@pytest.mark.full
@pytest.mark.parametrize("page", FULL, ids=named)
def test_all_blocks_run(page: Path, tmp_path: Path, pools: Callable[[int], WorkerPool]) -> None:
    if named(page) == AS_A_NOTEBOOK and all(importlib.util.find_spec(name) for name in ("nbclient", "ipykernel")):
        pytest.skip("runs as a notebook")
    run_page(page, tmp_path, full=True, workers=pools)


@pytest.fixture
def pools() -> Any:
    """Gloo processes, as many as a block asks for; they end with the test."""
    made: dict[int, WorkerPool] = {}

    def pool(size: int) -> WorkerPool:
        if size not in made:
            made[size] = WorkerPool(size)
        return made[size]

    yield pool
    for each in made.values():
        each.close()


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=named)
def test_blocks_say_what_they_are(page: Path) -> None:
    fences = page.read_text().count("\n```")
    visible = [block for block in blocks_of(page) if f"```{block.language}\n{block.text}```" in page.read_text()]
    assert fences == 2 * len(visible), "every fence belongs to a block"
    for block in blocks_of(page):
        mark, _, detail = block.mark.partition(": ")
        assert block.language in LANGUAGES, f"line {block.line}: a block of {block.language or 'no language'}"
        assert mark in ("", "full", "ranks", "not run", "output"), f"line {block.line}: {block.mark}"
        assert (mark in ("ranks", "not run")) == bool(detail), f"line {block.line}: {mark} says how many, or why"


@pytest.mark.parametrize("block", blocks("bash"))
def test_commands_are_understood(block: Block, tmp_path: Path) -> None:
    if "#SBATCH" in block.text or "$(" in block.text:
        return  # a script
    for words in block.commands:
        if "autofunc" not in words:
            assert words[0] in OTHER_PROGRAMS, words
            continue
        context = parsed(words[words.index("autofunc") :])
        if context.args and context.command.allow_extra_args:
            base = load_config(ROOT / "examples" / "demo.yaml", [])
            (tmp_path / "base.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(with_sections(base)))))
            parse_config(load_config(tmp_path / "base.yaml", context.args))


def with_sections(base: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the sections that keys of fragments need beside them."""
    return {**base, "checkpoint": {}}


def read(text: str) -> Any:
    """A configuration as the project reads YAML: 1e-3 is a number."""
    return OmegaConf.to_container(load_yaml(text), resolve=False)


def on_top(base: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the keys of a fragment in the place of its own."""
    merged = dict(base)
    for key, value in given.items():
        known = merged.get(key)
        merge = isinstance(known, dict) and isinstance(value, dict) and not {"_target_"} & value.keys()
        merged[key] = on_top(known, value) if merge else value
    return merged


@pytest.mark.parametrize("block", blocks("yaml"))
def test_configurations_are_valid(block: Block, tmp_path: Path) -> None:
    given = read(block.text)
    whole = {"model", "dataset", "optimizer"} <= given.keys()
    base = read((ROOT / "examples" / "demo.yaml").read_text())
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given if whole else on_top(with_sections(base), given)))
    parse_config(load_config(tmp_path / "run.yaml"))
    assert problems_of_known(given) == []


def test_every_public_name_is_in_the_reference() -> None:
    shown = [
        name
        for page in sorted((ROOT / "docs/api").glob("*.md"))
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    ]
    assert len(shown) == len(set(shown))
    modules = {"errors", "losses", "random", "schedule", "tree"}
    public = {f"autofunc.{name}" for name in set(af.__all__) - modules}
    public |= {f"autofunc.schedule.{name}" for name in af.schedule.__all__}
    assert public - set(shown) == set()
    assert {name for name in shown if name.count(".") == 1} <= public


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    for page in (ROOT / "docs").rglob("*.md"):
        assert f" {page.relative_to(ROOT / 'docs').as_posix()}\n" in menu, page
