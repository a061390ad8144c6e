"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "autofunc").rglob("*.py"))
assert SOURCES
DISTRIBUTED_FROM = {"mesh.py", "shard", "pipe.py", "transform.py", "runtime", "train"}


def imports(path: Path) -> set[str]:
    """Names of the modules a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize(
    "statement",
    [
        "from autofunc import schedule; s = schedule.build('1f1b', num_ranks=2, num_microbatches=4);"
        "schedule.validate(schedule.lower(s)); schedule.simulate(s); schedule.draw(s)",
        "import autofunc; autofunc.__version__",
        "import autofunc.cli.main",
    ],
)
def test_needs_no_torch(statement: str) -> None:
    code = f"import sys; {statement}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_torch_distributed_from_the_mesh_on() -> None:
    for path in SOURCES:
        if path.relative_to(ROOT / "autofunc").parts[0] not in DISTRIBUTED_FROM:
            assert not any(name.startswith("torch.distributed") for name in imports(path)), path


@pytest.mark.parametrize(
    ("module", "home"),
    [("torch.utils._pytree", "tree.py"), ("torch._subclasses.fake_tensor", "fake.py")],
)
def test_private_torch_has_one_home(module: str, home: str) -> None:
    assert [path.name for path in SOURCES if module in imports(path)] == [home]


def test_config_stays_at_the_edge() -> None:
    for path in SOURCES:
        if path.relative_to(ROOT / "autofunc").parts[0] not in {"config", "train", "cli"}:
            assert not any(name.startswith("autofunc.config") for name in imports(path)), path


def test_files_stay_small() -> None:
    for path in [*SOURCES, *(ROOT / "stages").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 350, path


def test_no_submodule_has_the_name_of_a_function() -> None:
    import autofunc as af
    import autofunc.optim
    import autofunc.splitting.boundary
    import autofunc.transform

    assert callable(af.split) and callable(af.optimizer) and callable(af.pipeline)
    assert set(af.__all__) <= set(dir(af))
    with pytest.raises(AttributeError, match="no attribute 'pipelin'"):
        af.pipelin  # noqa: B018
