"""Which classes are registered, and under which names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import autofunc as af
from autofunc.automodel import known_architectures
from autofunc.automodel.registry import ARCHITECTURES, model_type_of
from autofunc.errors import ModelError

BODY = """
from torch import nn
from torch.nn import Linear as ImportedModel

class {name}(nn.Module):
    pass

class Block(nn.Module):
    pass

class _HiddenForCausalLM(nn.Module):
    pass

class {name}PreTrainedModel(nn.Module):
    pass

class NotAModuleForCausalLM:
    pass
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("my_models", "one_module") or name.startswith("autofunc_user_"):
            del sys.modules[name]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_module(here: Path) -> None:
    write(here / "one_module.py", BODY.format(name="MyForCausalLM"))
    assert af.register_modeling_path("one_module") == ["MyForCausalLM"]
    assert af.register_modeling_path("one_module") == ["MyForCausalLM"]  # the same class again
    assert known_architectures() == ["MyForCausalLM"]


def test_a_package_with_all_its_modules(here: Path) -> None:
    write(here / "my_models/__init__.py", "from my_models.a import AForCausalLM\n")
    write(here / "my_models/a.py", BODY.format(name="AForCausalLM"))
    write(here / "my_models/deep/__init__.py", "")
    write(here / "my_models/deep/b.py", BODY.format(name="BForMaskedLM"))
    write(here / "my_models/__main__.py", "raise SystemExit('run')")
    assert af.register_modeling_path("my_models") == ["AForCausalLM", "BForMaskedLM"]
    assert af.register_modeling_path("my_models.deep.b") == ["BForMaskedLM"]


def test_a_file(here: Path) -> None:
    write(here / "folder/file.py", BODY.format(name="FileModel"))
    assert af.register_modeling_path("folder/file.py") == ["FileModel"]
    assert af.register_modeling_path(here / "folder/file.py") == ["FileModel"]


def test_model_class_and_decorated(here: Path) -> None:
    text = (
        "from torch import nn\nimport autofunc as af\n"
        "class Plain(nn.Module): pass\nModelClass = [Plain]\n"
        "@af.register_architecture\nclass Named(nn.Module): pass\n"
        "@af.register_architecture('MyArch')\nclass OtherForCausalLM(nn.Module): pass\n"
    )
    write(here / "one_module.py", text)
    assert af.register_modeling_path("one_module") == ["MyArch", "Named", "Plain"]
    found = ARCHITECTURES.find("MyArch")
    assert found is not None and found.__name__ == "OtherForCausalLM"
    assert ARCHITECTURES.name_of(found) == "MyArch"


def test_another_class_of_that_name(here: Path) -> None:
    write(here / "a.py", BODY.format(name="MyForCausalLM"))
    write(here / "b.py", BODY.format(name="MyForCausalLM") + "class NewForCausalLM(nn.Module): pass\n")
    af.register_modeling_path("a.py")
    with pytest.raises(ModelError, match="'MyForCausalLM' is already taken by autofunc_user_a_"):
        af.register_modeling_path("b.py")
    assert known_architectures() == ["MyForCausalLM"]  # all or none
    assert af.register_modeling_path("b.py", exist_ok=True) == ["MyForCausalLM", "NewForCausalLM"]

    class MyForCausalLM(nn.Module): ...

    with pytest.raises(ModelError, match="exist_ok=True"):
        af.register_architecture(MyForCausalLM)
    assert af.register_architecture(exist_ok=True)(MyForCausalLM) is MyForCausalLM


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("from torch import nn\nclass Block(nn.Module): pass\n", "named like MyCustomForCausalLM.*It defines Block"),
        ("x = 1\n", "defines no nn.Module at all"),
        ("ModelClass = 3\n", "ModelClass is 3; expected a class"),
        ("1 / 0\n", "importing one_module failed: ZeroDivisionError"),
        ("import not_there_at_all\n", "importing one_module failed: No module named 'not_there_at_all'"),
        (
            "from torch import nn\nimport autofunc as af\n@af.register_architecture\ndef f(): pass\n",
            "derived from nn.Module",
        ),
    ],
)
def test_modules_without_models(here: Path, text: str, message: str) -> None:
    write(here / "one_module.py", text)
    with pytest.raises(ModelError, match=message):
        af.register_modeling_path("one_module")


def test_what_cannot_be_imported(here: Path) -> None:
    write(here / "my_models/__init__.py", "")
    write(here / "my_models/custom_llm.py", BODY.format(name="MyForCausalLM"))
    with pytest.raises(ModelError, match=r"did you mean my_models\.custom_llm\?"):
        af.register_modeling_path("my_models.custom_lm")
    with pytest.raises(ModelError, match=r"did you mean my_models\?"):
        af.register_modeling_path("my_model.custom_llm")
    with pytest.raises(ModelError, match=r"no file 'my_models/custom_lm\.py'.*did you mean custom_llm\.py"):
        af.register_modeling_path("my_models/custom_lm.py")
    with pytest.raises(ModelError, match="expected a dotted module"):
        af.register_modeling_path("./my_models")


def install(here: Path, name: str, lines: str) -> None:
    write(here / f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    write(here / f"{name}-1.0.dist-info/entry_points.txt", f"[autofunc.architectures]\n{lines}\n")


def test_entry_points_are_loaded_when_asked_for(here: Path) -> None:
    write(here / "one_module.py", BODY.format(name="MyForCausalLM"))
    install(
        here, "plugin", "MyForCausalLM = one_module:MyForCausalLM\nBroken = one_module:Absent\nText = one_module:__name__"
    )
    assert known_architectures() == ["Broken", "MyForCausalLM", "Text"]
    assert "one_module" not in sys.modules
    found = ARCHITECTURES.find_by_type("my")
    assert found is not None and found.__module__ == "one_module"
    with pytest.raises(ModelError, match="entry point Broken = 'one_module:Absent' of plugin cannot be loaded"):
        ARCHITECTURES.find("Broken")
    with pytest.raises(ModelError, match="must name a class"):
        ARCHITECTURES.find("Text")


def test_two_packages_with_one_name(here: Path) -> None:
    install(here, "plugin", "MyArch = one_module:A")
    install(here, "rival", "MyArch = one_module:B")
    with pytest.raises(ModelError, match="share a name; uninstall one"):
        known_architectures()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MyCustomForCausalLM", "my_custom"), ("GPT2LMHeadModel", "gpt2"), ("LlamaModel", "llama"), ("MyArch", "my_arch"),
        ("ViTForImageClassification", "vi_t"),
    ],
)  # fmt: skip
def test_model_types(name: str, expected: str) -> None:
    assert model_type_of(name) == expected
