"""Every process has its own GPU, or all compute on the CPU; missing GPUs are found before anything starts."""

from __future__ import annotations

import pytest
import torch

import autofunc as af
from autofunc.errors import MeshError
from autofunc.train.device import check_devices, take_device


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)


@pytest.mark.parametrize(("wanted", "found", "needed"), [(None, 1, 2), ("cuda", 2, 4), ("cuda", 0, 1)])
def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch, wanted: str | None, found: int, needed: int) -> None:
    gpus(monkeypatch, found)
    with pytest.raises(
        MeshError, match=f"{needed} processes need a GPU each, and this machine has {found or 'none'}.*device: cpu"
    ):
        check_devices(wanted, needed)  # type: ignore[arg-type]


@pytest.mark.parametrize(("wanted", "found", "needed"), [(None, 0, 4), ("cpu", 1, 2), (None, 4, 4), ("cuda", 2, 1)])
def test_enough_gpus(monkeypatch: pytest.MonkeyPatch, wanted: str | None, found: int, needed: int) -> None:
    gpus(monkeypatch, found)
    check_devices(wanted, needed)  # type: ignore[arg-type]


@pytest.mark.parametrize(("wanted", "found"), [(None, 0), ("cpu", 2)])
def test_the_cpu(monkeypatch: pytest.MonkeyPatch, wanted: str | None, found: int) -> None:
    gpus(monkeypatch, found)
    assert take_device(wanted) == torch.device("cpu")  # type: ignore[arg-type]


def test_a_mesh_of_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(MeshError, match=r'2 processes on this machine need a GPU each, and it has 1.*device_type="cpu"'):
        af.make_mesh(pp=2)
