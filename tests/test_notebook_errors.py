"""Errors in a notebook: one message with the user's lines, through the hook that IPython calls."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

import autofunc as af
from autofunc.errors import AutofuncError

CELL = """
def layer(params, x, batch):
    return batch["x"] @ params["nothing"]

model = af.Model({"first": af.Layer(init=lambda key: {"w": torch.ones(2, 2)}, apply=layer)})
pipe = af.pipeline(af.split(model), af.schedule.build("gpipe", num_ranks=1, num_microbatches=1), loss=lambda o, b: o.sum())
pipe(pipe.init(seed=0), {"x": torch.ones(2, 2)})
"""


def raised() -> AutofuncError:
    """Raised by a model with a mistake, in a cell."""
    try:
        exec(compile(CELL, "<ipython-input-3-abc>", "exec"), {"af": af, "torch": torch})
    except AutofuncError as error:
        return error
    raise AssertionError("the model has a mistake")


def test_one_message_with_the_users_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOFUNC_DEBUG", raising=False)
    error = raised()
    error.add_note("a note")
    lines = error._render_traceback_()
    text = "\n".join(lines)
    assert lines[0].startswith(f"{type(error).__name__}: ") and str(error).splitlines()[0] in lines[0]
    assert "a note" in text
    assert "  <ipython-input-3-abc>, line 7, in <module>:" in text, "the call"
    assert "  <ipython-input-3-abc>, line 3, in layer:" in text, "and where the mistake is"
    assert "pipe.py" not in text and "torch/" not in text
    assert lines[-1] == "(the whole traceback: AUTOFUNC_DEBUG=1)" and len(text.splitlines()) < 20


@pytest.mark.parametrize("words", ["1", "1,nan", "nan, 1"])
def test_the_whole_traceback(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOFUNC_DEBUG", raising=False)
    error = raised()
    monkeypatch.setenv("AUTOFUNC_DEBUG", words)
    text = "\n".join(error._render_traceback_())
    assert text.startswith("Traceback") or "The above exception was the direct cause" in text
    assert "autofunc/pipe.py" in text


def test_an_error_that_was_never_raised() -> None:
    assert AutofuncError("said")._render_traceback_() == ["AutofuncError: said", "(the whole traceback: AUTOFUNC_DEBUG=1)"]


@pytest.mark.skipif(importlib.util.find_spec("IPython") is None, reason="IPython is not installed")
def test_ipython_calls_it(capsys: pytest.CaptureFixture[str]) -> None:
    shell: Any = importlib.import_module("IPython.core.interactiveshell").InteractiveShell.instance()
    shell.run_cell("import autofunc as af, torch\n" + CELL)
    said = capsys.readouterr()
    assert "pipe.py" not in said.out + said.err and "in layer:" in said.out + said.err
