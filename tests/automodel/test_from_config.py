"""Which class a config is for, and what it is built with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import autofunc as af
from autofunc import tree
from autofunc.errors import ModelError
from tests.automodel.models import TinyConfig, TinyForCausalLM, ids
from tests.captured.zoo import ZOO

TINY = {"architectures": ["TinyForCausalLM"], "model_type": "tiny", "hidden_size": 4, "dtype": "float32"}
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 48,
    "vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture
def tiny() -> None:
    af.register_architecture(TinyForCausalLM)


def built(config: Any, **options: Any) -> Any:
    module = af.AutoModel.from_config(config, **options)
    assert all(leaf.is_meta for leaf in module.parameters() if leaf.dim() > 1)
    return module


@pytest.mark.usefixtures("tiny")
def test_by_architecture_then_by_model_type(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    for config in (TINY, str(tmp_path), tmp_path, tmp_path / "config.json"):
        assert built(config).config == TinyConfig(hidden_size=4)
    assert built({"model_type": "tiny"}).config == TinyConfig()
    assert built({**TINY, "architectures": ["Unknown"]}).config.hidden_size == 4
    assert built(TinyConfig(num_layers=1), architectures=["TinyForCausalLM"]).config == TinyConfig(num_layers=1)
    assert built(TINY, hidden_size=6).config == TinyConfig(hidden_size=6)


@pytest.mark.usefixtures("tiny")
def test_it_can_be_trained_from_scratch() -> None:
    module = built(TINY)
    model = af.from_module(module, ids())
    one, other = model.init(3), model.init(3)
    assert torch.equal(one["embed", "weight"], other["embed", "weight"])
    logits = model(one, ids())
    assert logits.shape == (4, 6, 20) and logits.isfinite().all()
    assert model.config == TinyConfig(hidden_size=4)


def test_registered_before_transformers() -> None:
    @af.register_architecture("LlamaForCausalLM")
    class Mine(nn.Module):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            self.config, self.weight = config, nn.Linear(config.hidden_size, config.vocab_size)

    module = built(LLAMA, hidden_size=16)
    assert type(module) is Mine and module.config.hidden_size == 16 and module.config.model_type == "llama"


def test_a_registered_model_type_does_not_hide_a_named_architecture() -> None:
    @af.register_architecture
    class LlamaForMaskedLM(nn.Module): ...

    assert type(built(LLAMA)).__module__.startswith("transformers.")


def test_transformers() -> None:
    import transformers

    assert type(built(LLAMA)) is transformers.LlamaForCausalLM
    assert (
        type(built({key: value for key, value in LLAMA.items() if key != "architectures"})) is transformers.LlamaForCausalLM
    )
    assert type(built({**LLAMA, "architectures": ["LlamaModel"]})) is transformers.LlamaModel
    config = ZOO["t5"][0]().config
    module = built(config, num_layers=1, architectures=["T5ForConditionalGeneration"], attn_implementation="eager")
    assert module.config.num_layers == 1 and config.num_layers == 2
    assert module.config._attn_implementation == "eager"
    half = built(LLAMA, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype is torch.bfloat16 and half.config.dtype is torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype is torch.float32


def test_llama_without_values_equals_llama_with_them() -> None:
    """What is not a parameter is as in a module that was built as usual."""
    import transformers

    usual = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(LLAMA))
    batch = {"input_ids": torch.arange(8).view(2, 4) + 3}
    model = af.from_module(built(LLAMA), batch)
    params = model.init(0)
    usual.load_state_dict(tree.flatten(params))
    assert torch.allclose(model(params, batch).logits, usual(**batch).logits, atol=1e-6)


class OfConfigClass(nn.Module):
    class config_class:
        model_type = "odd_name"

        def __init__(self, width: int = 1) -> None:
            self.width = width

        @classmethod
        def from_dict(cls, values: dict[str, Any]) -> OfConfigClass.config_class:
            return cls(values["width"])

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.layer = config, nn.Linear(config.width, 1)


@dataclass(frozen=True)
class Frozen:
    width: int


class OfFrozen(nn.Module):
    def __init__(self, config: Frozen) -> None:
        super().__init__()
        self.config, self.layer = config, nn.Linear(config.width, 1)


class OfDict(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.layer = config, nn.Linear(config["width"], 1)


class OfNamespace(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.layer = config, nn.Linear(config.width, 1)


@pytest.mark.parametrize("cls", [OfConfigClass, OfFrozen, OfDict, OfNamespace])
def test_kinds_of_configs(cls: type[nn.Module]) -> None:
    af.register_architecture(cls)
    config = {"architectures": [cls.__name__], "width": 3}
    assert built(config).layer.weight.shape == (1, 3)
    assert built(config, width=5).layer.weight.shape == (1, 5)
    if cls is not OfDict:
        with pytest.raises(ModelError, match="has no 'widht'; did you mean width"):
            built(config, widht=5)
    with pytest.raises(ModelError, match=r"KeyError|missing 1 required|no attribute 'width'"):
        built({"architectures": [cls.__name__]})


def test_a_frozen_config_is_copied() -> None:
    af.register_architecture(OfFrozen)
    given = Frozen(3)
    assert built(given, architectures=["OfFrozen"], width=5).layer.weight.shape == (1, 5) and given.width == 3


def test_by_the_model_type_of_a_config_class() -> None:
    af.register_architecture(OfConfigClass)
    assert type(built({"model_type": "odd_name", "width": 3})) is OfConfigClass


@pytest.mark.usefixtures("tiny")
def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has neither architectures nor model_type"):
        built({"hidden_size": 3})
    with pytest.raises(
        ModelError, match=r"no architecture 'LlamaForCausalLn': registered are TinyForCausalLM .*LlamaForCausalLM"
    ):
        built({**LLAMA, "architectures": ["LlamaForCausalLn"]})
    with pytest.raises(ModelError, match=r"no model_type 'lama'.*did you mean .*llama"):
        built({"model_type": "lama"})
    with pytest.raises(ModelError, match="LlamaConfig has no 'num_hiden_layers'; did you mean num_hidden_layers"):
        built(LLAMA, num_hiden_layers=3)
    with pytest.raises(ModelError, match="dtype 'float23' is not a floating-point dtype; did you mean float32"):
        built(LLAMA, dtype="float23")
    with pytest.raises(ModelError, match="the config of TinyForCausalLM has no 'hiden_size'; did you mean hidden_size"):
        built({**TINY, "hiden_size": 3})
    with pytest.raises(ModelError, match="TinyForCausalLM cannot be built from its config: "):
        built(TINY, hidden_size="wide")
    with pytest.raises(ModelError, match="cannot be trained"):
        built(LLAMA, quantization_config={"bits": 4})
    with pytest.raises(ModelError, match=r"expected a config .* got int"):
        built(3)
    with pytest.raises(ModelError, match=r"there is no .*config\.json"):
        built(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        built(tmp_path)
    with pytest.raises(ModelError, match="neither a folder nor a model in the Hugging Face cache"):
        built("nobody/nothing")
    with pytest.raises(ModelError, match="has no instances"):
        af.AutoModel()


def test_several_registered_classes_of_a_type() -> None:
    class TinyForMaskedLM(TinyForCausalLM): ...

    class TinyForTokenClassification(TinyForCausalLM): ...

    af.register_architecture(TinyForMaskedLM)
    af.register_architecture(TinyForTokenClassification)
    with pytest.raises(ModelError, match="fits several registered classes"):
        built({"model_type": "tiny"})
    af.register_architecture(TinyForCausalLM)
    assert type(built({"model_type": "tiny"})) is TinyForCausalLM


def test_code_that_comes_with_a_model(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from transformers import PreTrainedModel, PreTrainedConfig\nfrom torch import nn\n"
        "class OwnConfig(PreTrainedConfig):\n    model_type = 'own_thing'\n"
        "    width: int = 2\n"
        "class OwnThing(PreTrainedModel):\n    config_class = OwnConfig\n"
        "    def __init__(self, config):\n        super().__init__(config)\n"
        "        self.layer = nn.Linear(config.width, 3)\n        self.post_init()\n"
    )
    config = {
        "architectures": ["OwnThing"], "model_type": "own_thing", "width": 2,
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnThing"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"brings its own code \(own.OwnConfig, own.OwnThing\)"):
        built(tmp_path)
    assert built(tmp_path, trust_remote_code=True, width=4).layer.weight.shape == (3, 4)
    for place in ("org/other--own.OwnThing", "../own.OwnThing"):
        (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": place}}))
        with pytest.raises(ModelError, match=f"auto_map names '{place}', code that is not next to the config.json"):
            built(tmp_path, trust_remote_code=True)
