"""The speed and memory of a step: FLOP/s against the device's peak, and bytes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autofunc.engine import device_speed
from autofunc.errors import ModelError
from autofunc.train import speed
from tests.cli.here import run_here
from tests.train.test_weighing import finetune

OPERATIONS_OF_A_ROW = 3 * 2 * (4 * 8 + 8 * 4)
"""FLOPs of `test_weighing`'s model: two products, three times as many in a step."""


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]


def test_every_step_reports_its_speed(tmp_path: Path) -> None:
    *_, out = finetune(tmp_path, peak_tflops=1e-6)
    first, last, _ = lines_of(tmp_path)
    for line, rows in ((first, 8), (last, 7)):
        assert line["rows_per_second"] == pytest.approx(rows / line["step_time_ms"] * 1e3)
        assert line["mfu"] == pytest.approx(OPERATIONS_OF_A_ROW * line["rows_per_second"] / 1e6)
        assert 1 << 20 < line["peak_memory_bytes"] < 1 << 40
    assert "MFU" in out and "peak memory " in out
    done = run_here(tmp_path, "finetune", "llm", "-c", "run.yaml", "--overwrite", "--peak_tflops", "null")
    assert "mfu" not in lines_of(tmp_path)[0] and "MFU" not in done.out, "no peak is known of a CPU"


def test_peaks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989.5e12, "NVIDIA A100-SXM4-80GB": 312e12, "Other": None}
    for name, peak in names.items():
        monkeypatch.setattr(device_speed, "_name_of", lambda _, name=name: name)
        assert speed.peak_flops(torch.device("cuda", 0), None) == peak
        assert speed.peak_flops(torch.device("cuda", 0), 2.0) == 2e12, "what is given counts"


def test_operations_are_counted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counted: list[Any] = []
    monkeypatch.setattr(
        speed, "count_operations", lambda *given: counted.append(given) or {"": SimpleNamespace(flops=1)}
    )  # fmt: skip
    finetune(tmp_path, peak_tflops=1.0)
    assert len(counted) == 1 and len(lines_of(tmp_path)) == 3

    def refuse(*_: Any) -> None:
        raise ModelError("the model cannot run on this batch")

    monkeypatch.setattr(speed, "count_operations", refuse)
    done = run_here(tmp_path, "finetune", "llm", "-c", "run.yaml", "--overwrite")
    assert done.status == 0 and "no mfu, because the operations of a step cannot be counted: the model" in done.out
    assert "mfu" not in lines_of(tmp_path)[0]
