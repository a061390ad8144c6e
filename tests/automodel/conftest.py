"""A registry of its own for each test, folders that transformers wrote, and what is read from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autofunc.automodel.registry import ARCHITECTURES
from autofunc.captured.stored_tensors import StoredTensors
from tests.captured.zoo import ZOO


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ARCHITECTURES, "_classes", {})
    monkeypatch.setattr(ARCHITECTURES, "_installed", None)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[nn.Module, Path]]:
    """A model of the zoo and a folder that transformers wrote, once for all tests."""
    known: dict[Any, tuple[nn.Module, Path]] = {}

    def save(name: str, shards: str = "5GB", dtype: torch.dtype | None = None) -> tuple[nn.Module, Path]:
        if (name, shards, dtype) not in known:
            module: Any = ZOO[name][0]().to(dtype)
            folder = tmp_path_factory.mktemp(name)
            module.save_pretrained(folder, max_shard_size=shards)
            known[name, shards, dtype] = module, folder
        return known[name, shards, dtype]

    return save


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stored names, in the order in which they were read."""
    found: list[str] = []
    original = StoredTensors.read

    def read(self: StoredTensors, names: Iterable[str]) -> dict[str, Tensor]:
        listed = list(names)
        found.extend(listed)
        return original(self, listed)

    monkeypatch.setattr(StoredTensors, "read", read)
    return found
