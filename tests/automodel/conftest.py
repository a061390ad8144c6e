"""A registry of its own for each test."""

from __future__ import annotations

import pytest

from autofunc.automodel.registry import ARCHITECTURES


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ARCHITECTURES, "_classes", {})
    monkeypatch.setattr(ARCHITECTURES, "_installed", None)
