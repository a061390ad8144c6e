"""Tensors whose stored form differs from a transformers module's: converted by its rules when they are read.

For example, a Mixtral's experts are stored separately and are one tensor in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autofunc.captured.pretrained import ConvertedForm
from autofunc.captured.stored_tensors import StoredTensors
from autofunc.errors import in_brief
from autofunc.model.stored import CONVERTED


@dataclass
class _Group:
    """Stored tensors that are converted together."""

    rule: Any  # a converter of transformers
    sources: list[tuple[str, str]] = field(default_factory=list)  # (stored name, the rule's pattern that it matches)


class ConvertedTensors(StoredTensors):
    """Stored tensors under the names and with the shapes that a transformers module has.

    Args:
        stored: the tensors as stored in the files.
        module: of the model; it may be on the meta device.

    Raises:
        ConvertedForm: if transformers' rules cannot be applied to one tensor at a time.
    """

    def __init__(self, stored: StoredTensors, module: nn.Module) -> None:
        self.path, self.by_transformers = stored.path, False
        self._stored, self._module = stored, module
        self._names: dict[str, str] = {}  # tensors that are only renamed: new name -> stored name
        self._groups: dict[str, _Group] = {}  # by the first name in a group's result
        self._group_of: dict[str, str] = {}
        try:
            self._sort()
            self.shapes = {name: stored.shapes[old] for name, old in self._names.items()}
            self.dtypes = {name: stored.dtypes[old] for name, old in self._names.items()}
            for first, group in self._groups.items():
                like = {name: torch.empty(stored.shapes[name], device="meta") for name, _ in group.sources}
                for name, made in self._converted(first, like).items():
                    self._group_of[name] = first
                    self.shapes[name] = tuple(made.shape)
                    # a dtype that cannot be converted decides whether the group can be read
                    dtypes = [stored.dtypes[source] for source, _ in group.sources]
                    self.dtypes[name] = next((dtype for dtype in dtypes if dtype not in CONVERTED), dtypes[0])
        except Exception as error:
            raise ConvertedForm(
                f"the rules of transformers for {type(module).__name__} cannot be applied to one tensor at a time "
                f"({in_brief(error)})"
            ) from error

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """See `StoredTensors.read`; tensors that are converted together are read together."""
        wanted = dict.fromkeys(names)
        groups = dict.fromkeys(self._group_of[name] for name in wanted if name in self._group_of)
        found: dict[str, Tensor] = {}
        for first in groups:
            values = self._stored.read(name for name, _ in self._groups[first].sources)
            made = self._converted(first, values)
            found.update({name: leaf for name, leaf in made.items() if name in wanted})
        plain = {name: self._names[name] for name in wanted if name in self._names}
        values = self._stored.read(plain.values())
        return {**found, **{name: values[old] for name, old in plain.items()}}

    def _sort(self) -> None:
        """Separate renamed from converted tensors as transformers does (`core_model_loading`, tried with 5.23)."""
        from transformers import conversion_mapping, core_model_loading

        rules = conversion_mapping.get_model_conversion_mapping(self._module)
        renamings = [rule for rule in rules if isinstance(rule, core_model_loading.WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        own = self._module.state_dict()
        prefix: Any = self._module.base_model_prefix
        for name in sorted(self._stored.shapes, key=core_model_loading.dot_natural_key):  # orders experts by number
            target, pattern = core_model_loading.rename_source_key(name, renamings, converters, prefix, own)
            if target not in own:
                target, pattern = name, None
            if pattern is None:
                self._names[target] = name
            else:
                self._groups.setdefault(target, _Group(by_pattern[pattern])).sources.append((name, pattern))

    def _converted(self, first: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        group = self._groups[first]
        rule = copy.deepcopy(group.rule)  # a rule accumulates tensors
        for name, pattern in group.sources:
            rule.add_tensor(first, name, pattern, values[name])
        made = rule.convert(first, model=self._module, config=self._module.config)
        return {name: leaf[0] if isinstance(leaf, list) else leaf for name, leaf in made.items()}
