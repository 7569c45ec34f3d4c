"""Base of the results of verbs."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Report:
    """A result. It prints as its table, in a terminal and in a notebook; `repr` shows its fields."""

    def rows(self) -> list[Any]:
        """The rows that CSV lists: one for each tensor, unless the report lists something else."""
        return list(getattr(self, "tensors", ()))

    def __str__(self) -> str:
        from kasa_cli.render.tables import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from kasa_cli.render.formats import as_html

        return as_html(self)
