"""All findings of a check, as plain data and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from autofunc.checks.text import summary, table
from autofunc.checks.verdict import Verdict, Where


@dataclass(frozen=True, repr=False)
class Report:
    """All findings about one module: at least one for each check, in the order of the checks.

    `print(report)` shows them as a table.
    """

    subject: str
    verdicts: tuple[Verdict, ...]

    @property
    def ok(self) -> bool:
        """True if nothing failed."""
        return not any(verdict.status == "fail" for verdict in self.verdicts)

    def __repr__(self) -> str:
        return f"Report({summary(self.subject, self.verdicts)})"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """Return the table as a notebook shows it."""
        return f"<pre>{escape(self.table())}</pre>"

    def table(self, colour: bool = False) -> str:
        """Return the report as text, at most 80 columns wide: the findings, then the cut points and what crosses there.

        Args:
            colour: paint the statuses with ANSI colours.
        """
        return table(self.subject, self.verdicts, colour)

    def of(self, code: str) -> tuple[Verdict, ...]:
        """Return the findings of one check, such as "P3"."""
        return tuple(verdict for verdict in self.verdicts if verdict.code == code)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-compatible data; `from_dict` is the inverse."""
        return {"subject": self.subject, "ok": self.ok, "verdicts": [asdict(verdict) for verdict in self.verdicts]}

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> Report:
        """Rebuild a report from `to_dict`'s data; KeyError or TypeError for anything else."""
        verdicts = (
            Verdict(**{**each, "where": Where(**each["where"]) if each["where"] else None}) for each in known["verdicts"]
        )
        return cls(known["subject"], tuple(verdicts))
