"""`_target_` names, overrides and instantiation."""

from __future__ import annotations

from pathlib import Path

import pytest

from autofunc.config import instantiate, load_config, parse_config, resolve_target
from autofunc.errors import ConfigError

MINIMAL = {
    "model": {"_target_": "stages.gpt2.build_gpt2_model"},
    "dataset": {"_target_": "autofunc.data.TextFolder"},
    "optimizer": {"_target_": "torch.optim.AdamW"},
}


def test_a_file_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("class Thing: pass\n")
    monkeypatch.chdir(tmp_path)
    first = resolve_target("mine.py:Thing", "model")
    assert first is resolve_target(f"{tmp_path}/mine.py:Thing", "model")


def test_dotted_paths_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_models_here").mkdir()
    (tmp_path / "my_models_here" / "tiny.py").write_text("class Builder:\n    @staticmethod\n    def build(): return 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # restored afterwards, with what is added below
    assert resolve_target("my_models_here.tiny.Builder.build", "model")() == 7


def test_an_import_that_fails_inside_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs.py").write_text("import not_installed_anywhere\n")
    with pytest.raises(ConfigError, match=r"running .*needs.py failed: ModuleNotFoundError: .*not_installed_anywhere"):
        resolve_target(f"{tmp_path}/needs.py:f", "model")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"importing 'needs' failed: .*not_installed_anywhere"):
        resolve_target("needs.f", "model")


def test_a_folder_that_hides_ours_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "mine.py").write_text("def build(): ...\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="Your folder stages/ is hidden by the installed package of that name"):
        resolve_target("stages.mine.build", "model")


def make(inner: object = None, *, items: list[int] | None = None) -> tuple[object, list[int] | None]:
    return inner, items


def test_nested_targets() -> None:
    name = f"{__name__}.make"
    node = {"_target_": name, "inner": {"_target_": name, "items": [1]}, "items": [2]}
    assert instantiate(node, "model") == ((None, [1]), [2])


def test_missing_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"missing key 'dataset.path_or_dataset': autofunc.data.HellaSwag needs"):
        instantiate({"_target_": "autofunc.data.HellaSwag"}, "dataset")


@pytest.mark.parametrize("form", [["--a.b", "3"], ["--a.b=3"], ["a.b=3"]])
def test_override_forms(tmp_path: Path, form: list[str]) -> None:
    (tmp_path / "c.yaml").write_text("a: {b: 1, c: 1e-4}\nd: ${a.c}\n")
    assert load_config(tmp_path / "c.yaml", form) == {"a": {"b": 3, "c": 1e-4}, "d": 1e-4}


@pytest.mark.parametrize(
    ("value", "expected"), [("[x, y]", ["x", "y"]), ("null", None), ("1e-3", 1e-3), ("-1", -1), ("a=b", "a=b")]
)
def test_override_values_are_yaml(tmp_path: Path, value: str, expected: object) -> None:
    (tmp_path / "c.yaml").write_text("a: 1\n")
    assert load_config(tmp_path / "c.yaml", [f"a={value}"])["a"] == expected
    assert load_config(tmp_path / "c.yaml", ["--a", value])["a"] == expected


def test_defaults() -> None:
    config = parse_config(MINIMAL)
    assert config.distributed.pp_size == 1 and config.distributed.schedule == "1f1b"
    assert config.step_scheduler.global_batch_size == 32 and config.seed == 42


def test_targets_in_lists() -> None:
    made = instantiate({"_target_": "builtins.dict", "items": [{"_target_": "builtins.dict", "a": 1}, [2, {"b": 3}]]}, "it")
    assert made == {"items": [{"a": 1}, [2, {"b": 3}]]}
    with pytest.raises(ConfigError, match=r"it.items\[1\]"):
        instantiate({"_target_": "builtins.dict", "items": [1, {"_target_": "builtins.nothing"}]}, "it")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "cfg.yaml").write_text("name: grün\n", encoding=encoding)
    assert load_config(tmp_path / "cfg.yaml") == {"name": "grün"}


@pytest.mark.parametrize(
    ("content", "message"), [("a: 1\nname: grün".encode("latin-1"), "line 2"), (b"\xff\xfea", "utf-16")]
)
def test_other_encodings(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "cfg.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=f"{message}.*save it as UTF-8"):
        load_config(tmp_path / "cfg.yaml")


def test_a_string_for_a_number_suggests_decode() -> None:
    sections = {name: {"_target_": "builtins.dict"} for name in ("model", "dataset", "optimizer")}
    for key in (
        {"step_scheduler": {"max_steps": "5"}},
        {"dataloader": {"shuffle": "true"}},
        {"clip_grad_norm": {"max_norm": "1"}},
    ):
        with pytest.raises(ConfigError, match=r"oc.decode:\$\{oc.env:NAME\}"):
            parse_config({**sections, **key})
