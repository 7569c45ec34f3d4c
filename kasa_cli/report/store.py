"""Result of `kasa store ls` and `kasa store prune`."""

from dataclasses import dataclass
from typing import Any

from kasa_cli.report.base import Report


@dataclass(frozen=True)
class StoreReport(Report):
    """The content of the store, or the removed part of it: one row for each measured tensor."""

    command: str
    store: str
    tensors: tuple[dict[str, Any], ...]
    totals: dict[str, Any]
    notes: tuple[str, ...] = ()
