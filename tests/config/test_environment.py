"""`${oc.env:NAME}`, and odd-looking values that are accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autofunc.config import check_arguments, instantiate, load_config, parse_config, read_config
from autofunc.config.environment import FromEnvironment

MINIMAL = "model: {_target_: builtins.dict}\ndataset: {_target_: builtins.dict}\noptimizer: {_target_: builtins.dict}\n"


def takes(number: int, text: str, either: str | None = None, rate: float = 1.0, anything: Any = None, bare=None, **more):
    return number, text, either, rate, anything, bare, more


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {"N": "5", "RATE": "1e-3", "NO": "false", "ZEROS": "007", "WORD": "abc"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "cfg.yaml"


def test_arguments_of_a_target(file: Path) -> None:
    """Text if the signature asks for text, else a number."""
    name = f"{__name__}.takes"
    keys = "number: '${oc.env:N}', text: '${oc.env:N}', either: '${oc.env:ZEROS}', rate: '${oc.env:RATE}'"
    rest = "anything: '${oc.env:NO}', bare: ['${oc.env:N}', x], more: {n: '${oc.env:N}', w: '${oc.env:WORD}'}"
    file.write_text(f"it: {{_target_: {name}, {keys}, {rest}}}\n")
    made = instantiate(load_config(file)["it"], "it")
    assert made == (5, "5", "007", 1e-3, False, [5, "x"], {"more": {"n": 5, "w": "abc"}})
    assert type(made[1]) is str


def test_a_callable_without_a_signature() -> None:
    assert check_arguments(dict, {"n": FromEnvironment("5")}, "it", "dict") == {"n": 5}


def test_types_of_keys(file: Path) -> None:
    file.write_text(
        f"{MINIMAL}seed: ${{oc.env:N}}\noutput_dir: ${{oc.env:N}}\nclip_grad_norm: {{max_norm: '${{oc.env:RATE}}'}}\n"
        "dataloader: {shuffle: '${oc.env:NO}'}\ndistributed: {memory_budget: '${oc.env:N}', tp_plan: '${oc.env:N}'}\n"
    )
    config, _ = read_config(file)
    assert (config.seed, config.output_dir, config.dataloader.shuffle) == (5, "5", False)
    assert config.clip_grad_norm is not None and config.clip_grad_norm.max_norm == 1e-3
    assert (config.distributed.memory_budget, config.distributed.tp_plan) == (5, "5")


def test_prints_what_it_reads(file: Path) -> None:
    file.write_text(MINIMAL.replace("builtins.dict}", "builtins.dict, n: '${oc.env:N}'}", 1))
    assert read_config(file)[0].model_dump()["model"] == {"_target_": "builtins.dict", "n": 5}


def test_sections_without_keys(file: Path) -> None:
    file.write_text(f"{MINIMAL}distributed:\n#  pp_size: 2\ndataloader: ~\nclip_grad_norm: ~\n")
    config, _ = read_config(file)
    assert config == parse_config(load_config(file)) and config.distributed.pp_size == 1 and config.clip_grad_norm is None


def test_aliases_and_tags(file: Path) -> None:
    file.write_text("c: &c {d: 1}\na: [*c, *c]\ne: {<<: *c, f: !!float 3, g: !!str 4}\n")
    assert load_config(file) == {"c": {"d": 1}, "a": [{"d": 1}] * 2, "e": {"d": 1, "f": 3.0, "g": "4"}}
