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
DISTRIBUTED_FROM = {
    "benchmark",
    "mesh.py",
    "checkpoint",
    "optim",
    "shard",
    "compatible.py",
    "pipe.py",
    "held.py",
    "transform.py",
    "runtime",
    "train",
}


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
    heavy = {"torch", "numpy", "autofunc.schedule"} if "cli" in statement else {"torch"}  # a command's help takes no time
    code = f"import sys; {statement}; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_torch_distributed_from_the_mesh_on() -> None:
    for path in SOURCES:
        if path.relative_to(ROOT / "autofunc").parts[0] not in DISTRIBUTED_FROM:
            assert not any(name.startswith("torch.distributed") for name in imports(path)), path


# What has no public name, by file of autofunc/. Each of these files says with which version of torch it was tried.
PRIVATE_MODULES = {
    "torch._C": {"runtime/cuda_graphs.py", "runtime/pair_groups.py", "train/flight_recorder.py"},
    "torch._foreach_copy_": {"runtime/fixed.py"},
    "torch._foreach_div_": {"runtime/finish.py"},
    "torch._foreach_mul": {"shard/norm.py"},
    "torch._foreach_norm": {"shard/norm.py"},
    "torch._guards": {"engine/compile.py"},
    "torch._inductor": {"engine/compile.py"},
    "torch._ops": {"graph/schema.py"},
    "torch._subclasses": {"fake.py"},
    "torch.fx.experimental.proxy_tensor": {"graph/trace.py"},
    "torch.fx.experimental.symbolic_shapes": {"fake.py"},
    "torch.distributed.tensor.debug._clear_sharding_prop_cache": {"shard/masks.py"},
    "torch.testing._internal": {"train/tensor_parallel_check.py"},
    "torch.utils._python_dispatch": {"engine/purity.py", "splitting/outside.py"},
    "torch.utils._pytree": {"tree.py"},
}
PRIVATE_ATTRIBUTES = {
    "_create_internal": {"runtime/pair_groups.py"},
    "_get_backend": {"mesh.py"},
    "_schema": {"graph/schema.py"},
    "_timeout": {"mesh.py", "runtime/pair_groups.py"},
}


def dotted(node: ast.AST) -> str:
    """`torch._ops.OpOverload` of a chain of attributes; "" for anything else."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}" if dotted(node.value) else ""
    return node.id if isinstance(node, ast.Name) else ""


def private_modules(tree: ast.AST) -> set[str]:
    """The private or experimental modules of torch that a source imports or reaches by attributes.

    Operators (`torch.ops.aten._softmax`) are none: an underscore in their names says nothing.
    """
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(dotted(node))
    found = set()
    for parts in (name.split(".") for name in names):
        if parts[0] != "torch" or parts[1:2] == ["ops"]:
            continue
        private = [number for number, part in enumerate(parts) if part.startswith("_") and not part.startswith("__")]
        if private:
            found.add(".".join(parts[: private[0] + 1]))
        elif parts[1:3] == ["fx", "experimental"]:
            found.add(".".join(parts[:4]))
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from torch import _guards", {"torch._guards"}),
        ("import torch._inductor.config as config", {"torch._inductor"}),
        ("def late():\n    from torch._dynamo.utils import counters", {"torch._dynamo"}),
        ("from torch.utils import _pytree", {"torch.utils._pytree"}),
        ("from torch.fx.experimental import symbolic_shapes", {"torch.fx.experimental.symbolic_shapes"}),
        ("isinstance(x, torch._ops.OpOverload)", {"torch._ops"}),
        ("torch.ops._c10d_functional.wait_tensor, torch.__version__, torch.fx.Node, self._ops", set()),
    ],
)
def test_private_modules_are_found(source: str, found: set[str]) -> None:
    assert private_modules(ast.parse(source)) == found


def test_private_torch_is_used_in_the_listed_files_only() -> None:
    modules: dict[str, set[str]] = {}
    attributes: dict[str, set[str]] = {}
    for path in SOURCES:
        file, tree = path.relative_to(ROOT / "autofunc").as_posix(), ast.parse(path.read_text())
        for name in private_modules(tree):
            modules.setdefault(name, set()).add(file)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in PRIVATE_ATTRIBUTES:
                attributes.setdefault(node.attr, set()).add(file)
    assert modules == PRIVATE_MODULES
    assert attributes == PRIVATE_ATTRIBUTES


@pytest.mark.parametrize("file", sorted(set().union(*PRIVATE_MODULES.values(), *PRIVATE_ATTRIBUTES.values())))
def test_private_torch_says_the_version_that_was_tried(file: str) -> None:
    assert re.search(r"tried with (torch )?2\.\d+\.\d+", (ROOT / "autofunc" / file).read_text())


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


@pytest.mark.parametrize("name", ["pipeline", "value_and_grad", "split", "from_module", "from_function", "lora", "bench"])
def test_docstrings_are_whole(name: str) -> None:
    import autofunc as af

    text = inspect.getdoc(getattr(af, name)) or ""
    assert [part for part in ("Args:", "Returns:", "Raises:", "Example:") if f"\n{part}\n" not in text] == []
