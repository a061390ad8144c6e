"""Every fault is found by the right check, at the right class, and the module is unchanged."""

from __future__ import annotations

import inspect
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import autofunc as af
from autofunc.checks.run import UNFINISHED
from autofunc.checks.verdict import TITLES
from tests.captured.laws import assert_unchanged, contents
from tests.checks import faults
from tests.checks.faults import FAULTS


@pytest.mark.parametrize("name", FAULTS)
def test_found(name: str) -> None:
    fault = FAULTS[name]
    module = fault.build()
    before, generators = contents(module), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    report = af.check(module, fault.batch, **fault.options)
    found = [each for each in report.of(fault.code) if each.status == fault.status and fault.message in each.message]
    assert found, "\n".join(f"{each.code} {each.status} {each.message}" for each in report.verdicts)
    if fault.cls is not None:
        place = found[0].where
        assert place is not None and place.class_name == fault.cls.__name__
        assert place.file is not None and Path(place.file) == Path(faults.__file__)
        assert place.line == inspect.getsourcelines(fault.cls)[1]
    assert report.ok == (fault.status != "fail" and not any(each.status == "fail" for each in report.verdicts))
    assert {each.code for each in report.verdicts} == TITLES.keys()
    assert not [each.message for each in report.verdicts if UNFINISHED in each.message]
    assert_unchanged(before, module)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == generators[1:]


@pytest.mark.parametrize("name", ["no initialiser", "elsewhere", "summed", "tokens", "positions"])
def test_a_warning_is_not_a_failure(name: str) -> None:
    fault = FAULTS[name]
    assert af.check(fault.build(), fault.batch, **fault.options).ok


def test_a_parameter_kept_twice_has_its_registered_name() -> None:
    report = af.check(FAULTS["aliased"].build(), FAULTS["aliased"].batch)
    assert len(report.of("C2")) == 2 and [each.status for each in report.of("C4")] == ["skip"]


def test_a_failing_check_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(subject: object) -> None:
        raise ZeroDivisionError("never thought of")

    monkeypatch.setattr("autofunc.checks.run.check_ties", broken)
    report = af.check(faults.Sound(), {"x": faults.rows(6)})
    [verdict] = report.of("P2")
    assert verdict.status == "fail" and verdict.message.startswith(UNFINISHED + "ZeroDivisionError: never thought of")
    assert [each.code for each in report.verdicts if each.status == "fail"] == ["P2"]


def test_objects_that_cannot_be_checked() -> None:
    with pytest.raises(af.errors.ModelError, match=r"expected an nn.Module or an af.Model, got int"):
        af.check(3, {"x": faults.rows(6)})  # type: ignore[arg-type]
    with af.empty_weights(), pytest.raises(af.errors.ModelError, match="meta device"):
        af.check(faults.Sound(), {"x": faults.rows(6)})
    with pytest.raises(af.errors.BatchError, match="rows=4"):
        af.check(faults.Sound(), FAULTS["positions"].batch)
    with pytest.raises(af.errors.BatchError, match="no tensor in the batch has rows"):
        af.check(faults.Sound(), {})
