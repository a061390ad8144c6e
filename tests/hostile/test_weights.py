"""Folders of weights that are wrong or hostile: nothing is executed, and nothing outside of them is read."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import autofunc as af
from autofunc.automodel.registry import ARCHITECTURES
from autofunc.captured import StoredTensors
from autofunc.errors import ModelError
from tests.hostile.configs import ADAPTER, CONFIGS, PICKLES, adapter
from tests.hostile.judge import faults
from tests.hostile.weights import CONFIG, FILES, INDEX, INDICES, PLAIN, SINGLE, PlainForCausalLM, values


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ARCHITECTURES, "_classes", {"PlainForCausalLM": PlainForCausalLM})
    monkeypatch.setattr(ARCHITECTURES, "_installed", {})


assert LlamaForCausalLM  # imported here: that takes seconds, and is no part of a case


def read(folder: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a whole model is loaded
        pretrained = af.AutoModel.from_pretrained(folder)
    names = [name for name, _ in (*pretrained.module.named_parameters(), *pretrained.module.named_buffers())]
    pretrained.weights.read(name for name in names if name in pretrained.weights)


def test_files(tmp_path: Path) -> None:
    found = faults(FILES, read, tmp_path)
    assert not found, "\n".join(found)


def test_indices(tmp_path: Path) -> None:
    found = faults(INDICES, read, tmp_path)
    assert not found, "\n".join(found)


def test_configs(tmp_path: Path) -> None:
    found = faults(CONFIGS, read, tmp_path)
    assert not found, "\n".join(found)


def test_what_torch_saves(tmp_path: Path) -> None:
    assert len([*FILES, *INDICES, *CONFIGS, *PICKLES]) >= 100
    found = faults(PICKLES, read, tmp_path)
    assert not found, "\n".join(found)
    assert not list(tmp_path.rglob("executed"))


def test_links_to_files_are_read(tmp_path: Path) -> None:
    """As in a cache of the hub, whose folders have links to blobs elsewhere."""
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    (blobs / "0").write_text(json.dumps(PLAIN))
    save_file(values(), blobs / "1")
    (folder / CONFIG).symlink_to("../blobs/0")
    (folder / SINGLE).symlink_to("../blobs/1")
    read(folder)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(values(), "a.safetensors")}))
    (folder / "a.safetensors").symlink_to(blobs / "1")
    read(folder)


def test_weights_beside_an_adapter_are_refused(tmp_path: Path) -> None:
    save_file(values(), tmp_path / SINGLE)
    assert StoredTensors(tmp_path).shapes
    adapter("../base")(tmp_path / ADAPTER)
    with pytest.raises(ModelError, match=r"has adapter_config.json: PEFT adapters for '\.\./base', and nothing outside"):
        StoredTensors(tmp_path)


def test_the_folder_of_a_run_with_adapters_is_told(tmp_path: Path) -> None:
    """It holds no weights but those of the adapter, in a folder of its own."""
    (tmp_path / "adapter").mkdir()
    adapter("../base")(tmp_path / "adapter" / ADAPTER)
    with pytest.raises(ModelError, match=r"adapter has adapter_config.json: .* autofunc export for a run's own"):
        StoredTensors(tmp_path)
