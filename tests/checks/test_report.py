"""A report as data and as text."""

from __future__ import annotations

import json
import re

import pytest

import autofunc as af
from autofunc.checks import Report, Verdict, Where
from autofunc.checks.verdict import TITLES
from tests.captured.zoo import ZOO
from tests.checks.faults import FAULTS


@pytest.fixture(scope="module")
def report() -> Report:
    build, batch = ZOO["gpt2"]
    return af.check(build(), batch())


def test_json(report: Report) -> None:
    text = json.dumps(report.to_dict())
    assert Report.from_dict(json.loads(text)) == report
    assert json.loads(text)["ok"] is True


@pytest.mark.parametrize("name", ["stores", "through data", "mixed", "plain float"])
def test_table_of_faults(name: str) -> None:
    fault = FAULTS[name]
    report = af.check(fault.build(), fault.batch)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert f"{fault.code}  {fault.status}" in text
    assert re.match(r"\w+: [123] failed, ", text)


def test_table(report: Report) -> None:
    text = str(report)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "GPT2LMHeadModel: 0 failed, 1 warnings, 13 passed, 1 skipped"
    assert re.search(r"at GPT2LMHeadModel,\s+transformers/models/gpt2/modeling_gpt2\.py:\d+", text)
    flat = " ".join(text.split())
    assert all(f"{code} " in text and f"{title}: " in flat for code, title in TITLES.items()), "it says what codes mean"
    assert re.search(r"transformer\.h\.1 +1 +6,144", text)
    assert report._repr_html_().startswith("<pre>GPT2LMHeadModel: 0 failed")
    coloured = report.table(colour=True)
    assert re.sub(r"\x1b\[\d+m", "", coloured) == text and coloured != text
    assert repr(report) == f"Report({lines[0]})"


def test_long_names_fit() -> None:
    place = Where("C" * 100, "/far/away/" + "x" * 100 + ".py", 12, "a." * 60)
    points = [{"names": ["p" * 90], "layer": True, "values": 1, "bytes": 10**12}]
    report = Report("M", (Verdict("P1", "warn", "word " * 40, place, {"split_points": points}),))
    assert max(map(len, str(report).splitlines())) <= 80
