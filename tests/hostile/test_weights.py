"""Folders of weights that are wrong or hostile: nothing is executed, and nothing outside of them is read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

import autofunc as af
from autofunc.automodel.registry import ARCHITECTURES
from tests.hostile.configs import CONFIGS, PICKLES
from tests.hostile.judge import faults
from tests.hostile.weights import FILES, INDICES, PlainForCausalLM


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
