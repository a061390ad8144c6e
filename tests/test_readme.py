"""What the README shows must run as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from autofunc import schedule
from autofunc.config import check_arguments, load_config, parse_config, resolve_target
from autofunc.config.schema import FinetuneConfig
from autofunc.train.recipe import prepare

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import" in block]


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.strip().splitlines()[-1])
def test_python_blocks_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_yaml_blocks_are_valid(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert blocks
    for index, block in enumerate(blocks):
        (tmp_path / f"{index}.yaml").write_text(block)
        config = parse_config(load_config(tmp_path / f"{index}.yaml"))
        for node in (config.model, config.dataset):
            options = {key: value for key, value in node.items() if key != "_target_"}
            check_arguments(resolve_target(node["_target_"], "README._target_"), options, "README", node["_target_"])


def test_the_picture_is_the_demos() -> None:
    s = schedule.build("1f1b", num_ranks=2, num_microbatches=8)
    assert schedule.draw(s) in README


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_can_be_prepared(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = prepare(parse_config(load_config(example)))
    assert recipe.num_ranks == len(recipe.stages) == 2


def test_every_key_is_documented() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text()
    for name, field in FinetuneConfig.model_fields.items():
        below = getattr(field.annotation, "model_fields", None)
        for key in [f"{name}.{key}" for key in below] if below else [name]:
            assert f"`{key}`" in text or f"`{key.split('.')[-1]}`" in text, key


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
