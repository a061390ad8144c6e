"""The code of a page: its fenced blocks, what comments say of them, and how they run.

Blocks of Python run from top to bottom in one namespace, in a folder of their own. A comment right above a block says more:

    <!-- full -->              takes seconds: runs in the full tier only
    <!-- ranks: 4 -->          runs on so many gloo processes, in the full tier only
    <!-- not run: why -->      is only parsed
    <!-- output -->            text: what the block above it prints

and `<!-- run` or `<!-- run full`, lines of code, `-->` is code that readers do not see. A block whose first line is
`# name.py` or `# name.yaml` is a file of that name, which later blocks use. Where blocks run on ranks, each rank first
runs the code that the page has put into `on_each_rank`, as text.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cli.here import run_here

ROOT = Path(__file__).parents[2]
LANGUAGES = {"python", "yaml", "bash", "text"}
OTHER_PROGRAMS = {"make", "torchrun", "torchfrtrace", "srun", "source", "python", "pip", "tensorboard"}
SECONDS_FOR_A_COMMAND = 300.0

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$"
    r"|^<!-- run(?P<tier> full)?\n(?P<hidden>.*?)^-->$",
    re.MULTILINE | re.DOTALL,
)
_FILE = re.compile(r"# ([\w./-]+\.(?:py|yaml))\n")


class Block(NamedTuple):
    """A fenced block. `mark` is what the comment above it says; empty without one."""

    language: str
    text: str
    mark: str
    line: int

    @property
    def file(self) -> str | None:
        """The file that this block is; None for code to run."""
        found = _FILE.match(self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a shell block, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        words = [shlex.split(line, comments=True) for line in lines]
        return [each for each in words if each]


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page, in order, hidden ones included."""
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        hidden = match["hidden"]
        if hidden is not None:
            found.append(Block("python", hidden, (match["tier"] or "").strip(), line))
        else:
            found.append(Block(match["language"], match["text"], match["mark"] or "", line))
    return found


def run_page(page: Path, folder: Path, *, full: bool, workers: Any = None) -> list[str]:
    """Run the blocks of a page in a folder; returns what each printed.

    Args:
        page: a Markdown file.
        folder: an empty one; becomes the working directory, and what blocks import comes from there first.
        full: whether blocks of the full tier run too.
        workers: a function of the number of ranks that gives a `tests.pool.WorkerPool`.
    """
    printed: list[str] = []
    with _in_folder(folder):
        space: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks_of(page):
            printed.append(_run(block, page.name, folder, space, printed, full, workers))
    return printed


def _run(
    block: Block, page: str, folder: Path, space: dict[str, Any], printed: list[str], full: bool, workers: Any
) -> str:  # fmt: skip
    mark, _, detail = block.mark.partition(": ")
    where = f"{page}, line {block.line}"
    if block.file is not None:
        path = folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        return ""
    if mark == "output":
        if printed and printed[-1] != _SKIPPED:
            assert block.text.rstrip() in printed[-1], f"{where}: not what was printed:\n{printed[-1]}"
        return printed[-1]
    if mark == "not run" or (mark in ("full", "ranks") and not full) or block.language in ("text", "yaml"):
        return _SKIPPED
    assert block.language in ("python", "bash"), f"{where}: a block of {block.language or 'no language'}"
    out = io.StringIO()
    code = "\n" * block.line + block.text
    if block.language == "bash":
        for words in block.commands:
            out.write(_command(words, folder, mark == "full"))
    elif mark == "ranks":
        workers(int(detail)).run(_on_a_rank, space.get("on_each_rank", ""), code, where, str(folder))
    else:
        with contextlib.redirect_stdout(out):
            exec(compile(code, where, "exec"), space)
    return out.getvalue()


_SKIPPED = "(not run)"


def _command(words: list[str], folder: Path, as_process: bool) -> str:
    """A command of the page. Those on schedules are cheap, and run in this process in both tiers."""
    if words[:2] == ["autofunc", "schedule"]:
        done = run_here(folder, *words[1:])
        assert done.status == 0, done.err
        return done.out
    if not as_process:
        return ""
    program = {"autofunc": ["-m", "autofunc"], "torchrun": ["-m", "torch.distributed.run"], "python": []}[words[0]]
    done = subprocess.run(
        [sys.executable, *program, *words[1:]], cwd=folder, capture_output=True, text=True,
        timeout=SECONDS_FOR_A_COMMAND, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(words)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _on_a_rank(setup: str, code: str, where: str, folder: str) -> None:
    """Run a block on this rank of a pool, after what its page sets up for each rank."""
    with _in_folder(Path(folder)):
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(setup, space)
        exec(compile(code, where, "exec"), space)


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    """Work in a folder, from which modules are imported first; examples and models of the repository are there too."""
    known = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        for name in ("examples", "stages"):
            with contextlib.suppress(FileExistsError):
                (folder / name).symlink_to(ROOT / name)
        yield
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
            del sys.modules[name]
