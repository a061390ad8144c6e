"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "autofunc").rglob("*.py"))
assert SOURCES
DISTRIBUTED_FROM = {"mesh.py", "shard", "compatible.py", "pipe.py", "transform.py", "runtime", "train"}


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


def taken_from_modules(facade: str) -> set[str]:
    """What a package offers that its modules define, as opposed to the modules that it offers as such."""
    imported: dict[bool, set[str]] = {True: set(), False: set()}
    for node in ast.walk(ast.parse(ROOT.joinpath(*facade.split("."), "__init__.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            imported[node.module == facade] |= {alias.name for alias in node.names}
    names = set(importlib.import_module(facade).__all__)
    assert names <= imported[True] | imported[False], "every name is imported in the package's own file"
    return names & imported[False]


@pytest.mark.parametrize(("facade", "modules"), [("autofunc", "*"), ("autofunc.schedule", "**/*")])
def test_no_module_hides_what_its_facade_offers(facade: str, modules: str) -> None:
    """The import system sets a submodule as an attribute of its package, in place of a function of that name."""
    folder = ROOT.joinpath(*facade.split("."))
    found = [path for path in folder.glob(modules) if path.suffix == ".py" or (path / "__init__.py").is_file()]
    offered = taken_from_modules(facade)
    assert len(found) > 10 and len(offered) > 10
    assert [str(path) for path in found if path.stem in offered] == []


def test_no_submodule_has_the_name_of_a_function() -> None:
    import autofunc as af
    import autofunc.optim
    import autofunc.splitting.boundary
    import autofunc.transform

    assert callable(af.split) and callable(af.optimizer) and callable(af.pipeline)
    with pytest.raises(AttributeError, match="no attribute 'pipelin'"):
        af.pipelin  # noqa: B018


@pytest.mark.parametrize("name", ["autofunc", "autofunc.schedule"])
def test_dir_shows_what_users_import_and_nothing_else(name: str) -> None:
    module = importlib.import_module(name)
    assert [each for each in dir(module) if not each.startswith("__")] == sorted(module.__all__)
    assert all(getattr(module, each) is not None for each in dir(module))


def test_classes_and_modules_have_one_home() -> None:
    import autofunc as af
    from autofunc.optim import Optimizer
    from autofunc.pipe import Pipeline
    from autofunc.splitting import Stage

    assert (af.Pipeline, af.Stage, af.Optimizer) == (Pipeline, Stage, Optimizer)
    assert af.AutofuncError is af.errors.AutofuncError and af.tree.join("a", "b") == "a.b"


def test_help_leads_to_what_a_pipeline_can_do() -> None:
    import autofunc as af

    text = inspect.getdoc(af.pipeline) or ""
    methods = {name for name in vars(af.Pipeline) if not name.startswith("_")}
    missing = sorted(name for name in methods - {"run"} if f"{name}(" not in text)
    assert "help(af.Pipeline)" in text and not missing, missing
    assert methods >= set(re.findall(r"`(\w+)\(", "\n".join(line for line in text.splitlines() if line.startswith("- "))))


@pytest.mark.parametrize("name", ["pipeline", "value_and_grad", "split", "from_module", "from_function"])
def test_docstrings_are_whole(name: str) -> None:
    import autofunc as af

    text = inspect.getdoc(getattr(af, name)) or ""
    assert [part for part in ("Args:", "Returns:", "Raises:", "Example:") if f"\n{part}\n" not in text] == []
