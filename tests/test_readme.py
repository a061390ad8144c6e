"""What the README shows must run as it is printed."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from autofunc import schedule
from autofunc.config import check_arguments, load_config, parse_config, resolve_target
from autofunc.config.schema import FinetuneConfig
from autofunc.errors import ConfigError
from autofunc.train.recipe import prepare

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import" in block]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.yaml") if not path.stem.startswith("automodel"))
"""Those of AutoModel need the hub: tests/automodel/test_recipe.py runs them on small data."""
assert PYTHON and EXAMPLES


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.strip().splitlines()[-1])
def test_python_blocks_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_the_tutorial_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "schedules.md").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own, *blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(own.splitlines()) < 30
    (tmp_path / "my_schedules.py").write_text(own)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for block in blocks:
            exec(compile(block, "schedules.md", "exec"), {})
    promises = re.findall(r"^# (\w*1f1b .*)$", page, re.MULTILINE)
    assert [promise.split()[0] for promise in promises] == ["1f1b", "early_1f1b"]
    assert all(promise in out.getvalue() for promise in promises)
    assert (tmp_path / "compared.html").exists()


@pytest.mark.parametrize("own", ["my_schedules.py:turns", "turns.csv"])
def test_a_schedule_of_ones_own_in_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "my_schedules.py").write_text(
        "def turns(num_ranks, num_microbatches):\n"
        "    return [[f'{r}{k}{m}' for m in range(num_microbatches) for k in 'FB'] for r in range(num_ranks)]\n"
    )
    (tmp_path / "turns.csv").write_text("\n".join(",".join(f"{r}{k}{m}" for m in range(8) for k in "FB") for r in range(2)))
    config = load_config(ROOT / "examples" / "demo.yaml", [f"distributed.schedule={tmp_path / own}"])
    recipe = prepare(parse_config(config))
    assert recipe.schedule.name == "turns" and str(recipe.schedule[1][1]) == "1B0"
    config = load_config(
        ROOT / "examples" / "demo.yaml", [f"distributed.schedule={tmp_path / own}", "distributed.split_points=3"]
    )
    with pytest.raises(ConfigError, match=r"turns.* has 2 stages, but split_points=3 gives 3; give 1 split points"):
        prepare(parse_config(config))
    if own == "turns.csv":
        config = load_config(
            ROOT / "examples" / "demo.yaml", [f"distributed.schedule={tmp_path / own}", "distributed.pp_size=3"]
        )
        with pytest.raises(ConfigError, match=r"turns.csv: the schedule is for 2 ranks, 8 microbatches; asked for 3 ranks"):
            prepare(parse_config(config))


def test_yaml_blocks_are_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for index, block in enumerate(blocks):
        (tmp_path / f"{index}.yaml").write_text(block)
        config = parse_config(load_config(tmp_path / f"{index}.yaml"))
        for node in (config.model, config.dataset):
            options = {key: value for key, value in node.items() if key != "_target_"}
            check_arguments(resolve_target(node["_target_"], "README._target_"), options, "README", node["_target_"])


def test_make_help_names_every_target_in_80_columns() -> None:
    makefile = (ROOT / "Makefile").read_text()
    lines = re.findall(r'@echo "(make .*)"$', makefile, re.MULTILINE)
    assert max(map(len, lines)) <= 80
    phony = re.search(r"^\.PHONY: help (.*)$", makefile, re.MULTILINE)
    assert phony is not None and sorted(line.split()[1] for line in lines) == sorted(phony[1].split())


def test_the_picture_is_the_demos() -> None:
    s = schedule.build("1f1b", num_ranks=2, num_microbatches=8)
    assert schedule.draw(s) in README


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_can_be_prepared(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = prepare(parse_config(load_config(example)))
    assert recipe.axes.pp == len(recipe.stages) == 2


def test_every_key_is_documented() -> None:
    text = "".join((ROOT / "docs" / name).read_text() for name in ("configuration.md", "runs.md"))
    keys = keys_of(FinetuneConfig)
    assert len(keys) > 20
    for key in keys:
        assert f"`{key}`" in text or f"`{key.split('.')[-1]}`" in text, key


def keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys below a section, with dots."""
    found = []
    for name, field in section.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        below = [kind for kind in kinds if issubclass(kind, BaseModel)]
        found += keys_of(below[0], f"{prefix}{name}.") if below else [prefix + name]
    return found


def test_links_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    links = [(page, target) for page in pages for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text())]
    assert len(links) > len(pages), "pages lead to each other"
    assert not [f"{page.name}: {target}" for page, target in links if not (page.parent / target).exists()]
