"""Picture files: SVG, PNG, traces, and the page, opened in a real browser if there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autofunc import schedule
from autofunc.errors import ScheduleError
from autofunc.schedule import Costs, Timeline, Turn
from autofunc.schedule.pictures.blocks import blocks_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SVG = "{http://www.w3.org/2000/svg}"


def two() -> list[Timeline]:
    zbv = schedule.build("zbv", num_ranks=4, num_microbatches=8)
    return [
        schedule.simulate(zbv, Costs(0.5, 0.5, 0.5)),
        schedule.simulate(schedule.build("1f1b", num_ranks=4, num_microbatches=8), Costs(comm=0.25)),
    ]


def test_png(tmp_path: Path) -> None:
    schedule.draw(two(), tmp_path / "two.png")
    content = (tmp_path / "two.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
    with pytest.raises(ScheduleError, match=r"cannot draw .*x\.pgn.*did you mean \.png"):
        schedule.draw(two(), tmp_path / "x.pgn")


def test_notebooks_show_pictures() -> None:
    for timeline in two():
        for each in (timeline, timeline.schedule):
            assert ElementTree.fromstring(each._repr_svg_()).tag == f"{SVG}svg"  # type: ignore[union-attr]
    stuck = schedule.from_text("0B0 0F0")
    large = schedule.build("1f1b", num_ranks=8, num_microbatches=2000)
    assert stuck._repr_svg_() is None and large._repr_svg_() is None  # type: ignore[attr-defined]


def test_activations_are_in_microbatches() -> None:
    zbv, plain = two()
    assert (zbv.peak_microbatches, plain.peak_microbatches) == (max(zbv.peak_activations) / 2, max(plain.peak_activations))


def test_svg_has_a_block_for_every_action(tmp_path: Path) -> None:
    schedule.draw(two(), tmp_path / "two.svg")
    root = ElementTree.parse(tmp_path / "two.svg").getroot()
    titles = [title.text for title in root.iter(f"{SVG}title")]
    assert len(titles) == 4 * 8 * 6 + 4 * 8 * 2
    assert "0F0: 0 to 0.5" in titles and "3B0: 4.75 to 6.75" in titles
    width = float(root.attrib["width"])
    for box in root.iter(f"{SVG}rect"):
        assert float(box.attrib.get("x", 0)) >= 0 and float(box.attrib.get("x", 0)) + float(box.attrib["width"]) <= width
    captions = [text.text for text in root.iter(f"{SVG}text") if text.attrib["class"] == "caption"]
    assert captions[0] == "zbv: 4 ranks, 8 stages, 8 microbatches, makespan 25.5, bubble 5.9%"


def test_trace_has_times_and_waits(tmp_path: Path) -> None:
    text = schedule.draw(two()[1], tmp_path / "one.json")
    events = json.loads((tmp_path / "one.json").read_text())["traceEvents"]
    assert json.loads(text)["traceEvents"] == events
    runs = {event["name"]: event for event in events if event["ph"] == "X"}
    assert len(runs) == 64
    assert (runs["1F0"]["tid"], runs["1F0"]["ts"], runs["1F0"]["dur"]) == (1, 1250, 1000)
    assert runs["1F0"]["args"] == {"stage": 1, "microbatch": 0, "waited": 1.25, "for": "0F0 on rank 0"}
    arrows = [event for event in events if event["ph"] in "sf"]
    assert len(arrows) % 2 == 0 and arrows[0]["tid"] != arrows[1]["tid"] and arrows[0]["ts"] <= arrows[1]["ts"]


def test_waits_follow_the_edges_that_were_simulated(tmp_path: Path) -> None:
    edges = [schedule.Edge(0, 2), schedule.Edge(1, 2)]
    s = schedule.from_text("1F0 0F0 0B0 1B0\n2F0 2B0")
    timeline = schedule.simulate(s, edges=edges)
    page = schedule.draw(timeline, tmp_path / "x.html")
    assert "2B0 on rank 1" in page and sum(schedule.explain_idle(timeline)[0]) == 3


def test_a_wait_for_transfers_names_no_action(tmp_path: Path) -> None:
    s = schedule.build("1f1b", num_ranks=3, num_microbatches=4)
    events = json.loads(schedule.draw(schedule.simulate(s, Costs(comm=1, overlap=0)), tmp_path / "x.json"))["traceEvents"]
    (found,) = [event["args"] for event in events if event["name"] == "1F2"]
    assert found["for"] == "its own transfers"


def test_actions_of_very_different_lengths(tmp_path: Path) -> None:
    s = schedule.build("1f1b", num_ranks=4, num_microbatches=8)
    text = schedule.draw(schedule.simulate(s, Costs(1e-6, 1000, 1000)))
    assert len(text) < 100_000
    tight = schedule.draw(schedule.simulate(schedule.build("zb_h1", num_ranks=2, num_microbatches=16), Costs(1.5, 1, 1)))
    assert not re.search(r"[iw]1(?![0-5])", tight.replace("i1 ", "").replace("w1 ", "")), "no part of a number"
    with pytest.raises(ScheduleError, match="nothing to draw"):
        schedule.draw([], tmp_path / "x.svg")
    with pytest.raises(ScheduleError, match="every action it runs is free"):
        schedule.simulate(s.forward_form(), Costs(F=0))


def test_unknown_suffix_suggests(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match=r"unknown suffix '\.svgg'; did you mean \.svg"):
        schedule.draw(two(), tmp_path / "x.svgg")


def test_a_measured_run_is_drawn_as_one() -> None:
    predicted = two()[1]
    late = tuple(start + 100 for start in predicted.start), tuple(end + 100 for end in predicted.end)
    measured = Timeline(predicted.schedule, *late, label="measured")
    assert schedule.draw(measured) == schedule.draw(predicted), "only differences of time count"
    assert measured.makespan == predicted.makespan


def test_an_interleaved_pair_is_drawn_turn_by_turn() -> None:
    """It shows as idle while it waits for other processes."""
    s = schedule.from_text("0F0 (0F1;0B0)OVERLAP_F_B 0B1")
    plain = schedule.simulate(s, Costs(F=2, I=1, W=1))
    turns = [(1, 2.0, 3.0, False), (2, 3.0, 4.0, False), (1, 4.0, 4.5, True), (1, 4.5, 5.0, False), (2, 5.0, 6.0, False)]
    measured = replace(plain, turns=(tuple(Turn(*turn) for turn in turns),))
    found = [(block.name, block.start, block.end) for block in blocks_of(measured)]
    assert found == [
        ("0F0", 0, 2), ("0F1", 2, 3), ("0F1", 4.5, 5), ("0B0", 3, 4), ("0B0", 5, 6), ("0B1", 6, 8),
    ]  # fmt: skip
    assert measured.makespan == plain.makespan and measured.busy == plain.busy


def browse(page: Path, script: str) -> str:
    """Open a page, run a script at its end, and return the text that the script leaves in its result."""
    text = page.read_text().replace("</body>", f"<pre id=result></pre><script>{script}</script></body>")
    page.write_text(text)
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,700", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-2000:]
    return found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&")


SCRIPT = """
const out = [], panel = panels[1], canvas = panel.canvas;
const at = (time, rank) => ({ offsetX: xOf(panel, time), offsetY: rank * 27 + 12 });
function event(kind, time, rank, more) {
  const place = at(time, rank), box = canvas.getBoundingClientRect();
  canvas.dispatchEvent(new (kind === "wheel" ? WheelEvent : PointerEvent)(kind, {
    clientX: box.left + place.offsetX, clientY: box.top + place.offsetY, bubbles: true, cancelable: true, ...more }));
}
event("pointermove", 0.5, 0);
out.push(tip.style.visibility, tip.textContent);
event("pointermove", 0.5, 1);
out.push(tip.textContent);
const before = view.to - view.from;
event("wheel", 6, 0, { deltaY: -500 });
out.push("zoomed " + (view.to - view.from < before / 2) + " around 6: " + (view.from < 6 && view.to > 6));
event("pointermove", 6, 3);
out.push(tip.textContent);
dispatchEvent(new KeyboardEvent("keydown", { key: "0" }));
out.push("all again " + (view.from === 0 && Math.abs(view.to - before) < 1e-9));
const pen = canvas.getContext("2d"), ratio = devicePixelRatio;
out.push("painted " + pen.getImageData(xOf(panel, 0.1) * ratio, 5 * ratio, 1, 1).data.slice(0, 3).join(","));
out.push([...document.querySelectorAll("h2")].map(title => title.textContent).join(" "));
document.getElementById("result").textContent = out.join("\\n");
"""


@pytest.mark.skipif(BROWSER is None, reason="no browser is installed (apt-get install chromium)")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    schedule.draw(two(), tmp_path / "two.html")
    assert "http" not in (tmp_path / "two.html").read_text(), "nothing is fetched"
    lines = browse(tmp_path / "two.html", SCRIPT).split("\n")
    assert lines[:4] == ["visible", "0F0", "forward of microbatch 0, stage 0, rank 0", "0 to 1, takes 1"]
    assert lines[4:6] == ["rank 1 idle", "waits for 0F0 on rank 0"]
    assert lines[6].startswith("in all: dependency 9, communication 4, imbalance 0")
    assert lines[7] == "zoomed true around 6: true"
    assert lines[8] == "3B0"
    assert "all again true" in lines
    assert "painted 110,168,229" in lines
    assert lines[-1] == "zbv 1f1b"


def test_large_schedules_draw_in_time(tmp_path: Path) -> None:
    """Not timed: it only must not take quadratic time."""
    s = schedule.build("interleaved_1f1b", num_ranks=32, num_microbatches=128)
    page = schedule.draw(schedule.simulate(s), tmp_path / "large.html")
    found = re.search(r"const data = (\{.*?\});\n", page)
    assert found
    blocks = json.loads(found[1])["timelines"][0]["blocks"]
    assert len(blocks) == 32 * 128 * 2 * 2 and np.all(np.diff([block[5] for block in blocks[:100]]) > 0)
