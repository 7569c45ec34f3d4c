"""Result of `kasa verify`."""

from dataclasses import dataclass, field, fields
from typing import Any

from kasa_cli.report.base import Report
from kasa_cli.report.totals import Compared


@dataclass(frozen=True)
class VerifyReport(Report):
    """Result of `kasa verify`: the checks that passed. A failed check raises an error instead."""

    command: str
    output: str
    depth: tuple[str, ...]
    files: int
    tensors: int
    bytes_hashed: int
    compared: tuple[Compared, ...] = field(default=())

    def rows(self) -> list[Any]:
        """The tensors that were recomputed; the figures of the report where none was."""
        figures = {item.name: getattr(self, item.name) for item in fields(self)}
        return list(self.compared) or [figures | {"depth": " ".join(self.depth), "compared": 0}]
