"""The rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "autofunc").rglob("*.py"))
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


# What has no public name, by file of autofunc/. Each of these files says with which version of torch it was tried.
PRIVATE_MODULES = {
    "torch._C": {"runtime/edge_groups.py"},
    "torch._guards": {"engine/compile.py"},
    "torch._inductor": {"engine/compile.py"},
    "torch._ops": {"graph/schema.py"},
    "torch._subclasses": {"fake.py"},
    "torch.fx.experimental.proxy_tensor": {"graph/trace.py"},
    "torch.fx.experimental.symbolic_shapes": {"fake.py"},
    "torch.testing._internal": {"train/rehearsal.py"},
    "torch.utils._python_dispatch": {"engine/purity.py"},
    "torch.utils._pytree": {"tree.py"},
}
PRIVATE_ATTRIBUTES = {
    "_create_internal": {"runtime/edge_groups.py"},
    "_get_backend": {"runtime/edge_groups.py", "shard/links.py"},
    "_schema": {"graph/schema.py"},
    "_timeout": {"runtime/edge_groups.py", "shard/links.py"},
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


def test_no_submodule_has_the_name_of_a_function() -> None:
    import autofunc as af
    import autofunc.optim
    import autofunc.splitting.boundary
    import autofunc.transform

    assert callable(af.split) and callable(af.optimizer) and callable(af.pipeline)
    assert set(af.__all__) <= set(dir(af))
    with pytest.raises(AttributeError, match="no attribute 'pipelin'"):
        af.pipelin  # noqa: B018
