"""What a run leaves to look at: curves of its metrics, and a self-contained page."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from autofunc import schedule
from autofunc.train import lead, page
from autofunc.train.curves import draw_curves
from tests.train.test_weighing import finetune


def size_of(png: bytes) -> tuple[int, int]:
    height, width = matplotlib.image.imread(io.BytesIO(png)).shape[:2]
    return width, height


def test_panels_match_the_metrics(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    heights = []
    for values in ({}, {"loss": 1.0}, {"loss": None, "lr": 0.1}, {"loss": 1.0, "lr": 0.1, "rows_per_second": 5.0}):
        file.write_text("".join(json.dumps({"step": step, **values}) + "\n" for step in (1, 2)))
        width, height = size_of(draw_curves(file))
        heights.append(height)
        assert width == 960
    assert heights[0] == heights[1] < heights[2] < heights[3]
    file.write_text("no json")
    with pytest.raises(ValueError, match="Expecting value"):
        draw_curves(file)


def test_the_page_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With names that look like markup, and as if ranks had been separate processes."""
    s = schedule.build("1f1b", num_ranks=2, num_microbatches=4)
    timeline = replace(schedule.simulate(s, schedule.Costs(1, 1, 2)), label="measured")
    train = lead.train
    monkeypatch.setattr(lead, "train", lambda *given: replace(train(*given), timeline=timeline))
    folder = "o<b>&\"'</script>"
    (tmp_path / "out").symlink_to(tmp_path / folder)
    finetune(tmp_path, output_dir=folder)
    text = (tmp_path / folder / "run.html").read_text()
    assert folder not in text and f"<h1>{folder}</h1>" in html.unescape(text)

    picture = base64.b64decode(text.partition("data:image/png;base64,")[2].partition('"')[0])
    assert picture == (tmp_path / folder / "loss.png").read_bytes()
    inside = html.unescape(re.search(r'srcdoc="([^"]*)"', text).group(1))  # type: ignore[union-attr]
    drawn = json.loads(re.search(r"const data = (\{.*\});", inside).group(1))["timelines"]  # type: ignore[union-attr]
    assert [each["ranks"] for each in drawn] == [2, 2] and "measured" in drawn[1]["name"]
    assert drawn[0]["makespan"] == pytest.approx(timeline.makespan), "predicted from what was measured"

    rows = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", text))
    last = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
    assert rows["steps"] == "2 (done)" and rows["validation loss"] == f"{last[-1]['validation_loss']:.4f}"
    assert rows["bubble"] == f"{timeline.bubble_fraction:.1%} measured" and rows["torch"].startswith("2.")
    assert "_target_: torch.optim.SGD" in text
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text + inside), "no network"


def test_an_unwritable_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> str:
        raise OSError("no space")

    monkeypatch.setattr(lead, "make_page", refuse)
    *_, out = finetune(tmp_path)
    assert "run.html could not be written: no space" in out and "run.html" not in out.partition("written to")[2]
    assert page.make_page is not refuse
