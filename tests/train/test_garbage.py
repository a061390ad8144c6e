"""When a run collects garbage."""

from __future__ import annotations

import gc

import pytest

from autofunc.train.garbage import collecting_between


def test_collects_at_fixed_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[object] = []
    monkeypatch.setattr(gc, "collect", lambda: happened.append("collected"))
    for step in collecting_between(range(5), 2):
        happened.append(step)
        assert not gc.isenabled()
    assert happened == [0, 1, "collected", 2, 3, "collected", 4] and gc.isenabled()
    assert list(collecting_between(range(3), None)) == [0, 1, 2]


def test_python_decides_again_after_an_error() -> None:
    def fail() -> None:
        for step in collecting_between(range(5), 1):
            assert not gc.isenabled()
            if step == 1:
                raise KeyError(step)

    with pytest.raises(KeyError):
        fail()
    assert gc.isenabled()
