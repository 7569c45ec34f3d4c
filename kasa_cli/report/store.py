"""Result of `kasa store ls` and `kasa store prune`."""

from dataclasses import dataclass
from typing import Any

from kasa_cli.report.base import Report


@dataclass(frozen=True)
class StoreReport(Report):
    """What the store of facts holds, or what was removed of it: one row a tensor measured."""

    command: str
    store: str
    tensors: tuple[dict[str, Any], ...]
    totals: dict[str, Any]
    notes: tuple[str, ...] = ()
