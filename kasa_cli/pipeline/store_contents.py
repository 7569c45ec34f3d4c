"""Lists and prunes the store of measured spectra and module names."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kasa_cli.errors import UsageError, printable
from kasa_cli.files import FACTS, NAMES, Store, StoreEntry, existing
from kasa_cli.pipeline.measuring import header
from kasa_cli.report import StoreReport, StoreRow

DAY = 24 * 3600
UNKNOWN: dict[str, Any] = {"name": "?", "dtype": "?", "shape": [0, 0]}
ShelfEntry = tuple[Store, StoreEntry]
"""An entry, and the store that holds it."""


def ls(store: Path | None = None) -> StoreReport:
    """Every measured tensor, the one used last first, and the number of models whose names are known."""
    facts_store = existing(store)
    entries = _entries(facts_store)
    tensors, models = _by_shelf(entries)
    return StoreReport(
        command="store ls",
        store=str(facts_store.root),
        tensors=tuple(_row(facts_store, entry) for entry in tensors),
        totals={"tensors": len(tensors), "models": len(models), "bytes": _num_bytes(entries)},
    )


def prune(
    store: Path | None = None,
    *,
    max_bytes: int | None = None,
    max_days: float | None = None,
    everything: bool = False,
    dry_run: bool = False,
) -> StoreReport:
    """Remove the entries used longest ago until the rest fits, those that are older, or all.

    Raises:
        UsageError: none of the three is given.
    """
    if max_bytes is None and max_days is None and not everything:
        raise UsageError("no entries are selected for removal", "", "give --max-size, --older-than or --all")
    facts_store = existing(store)
    entries = _entries(facts_store)
    to_remove = entries if everything else _to_remove(entries, max_bytes, max_days)
    tensors, models = _by_shelf(to_remove)
    rows = tuple(_row(facts_store, entry) for entry in tensors)
    if not dry_run:
        for shelf, entry in to_remove:
            shelf.remove(entry.content)
        for shelf in _shelves(facts_store):
            shelf.sweep()
    all_tensors, all_models = _by_shelf(entries)
    return StoreReport(
        command="store prune",
        store=str(facts_store.root),
        tensors=rows,
        totals={
            "removed": len(tensors),
            "models_removed": len(models),
            "bytes_removed": _num_bytes(to_remove),
            "kept": len(all_tensors) - len(tensors),
            "models_kept": len(all_models) - len(models),
            "bytes_kept": _num_bytes(entries) - _num_bytes(to_remove),
            "dry_run": dry_run,
        },
    )


def _shelves(facts_store: Store) -> tuple[Store, Store]:
    return facts_store.shelf(FACTS), facts_store.shelf(NAMES)


def _entries(facts_store: Store) -> list[ShelfEntry]:
    """All entries, the last used first."""
    entries = [(shelf, entry) for shelf in _shelves(facts_store) for entry in shelf.entries()]
    return sorted(entries, key=lambda pair: (-pair[1].last_used, pair[1].content))


def _by_shelf(entries: Iterable[ShelfEntry]) -> tuple[list[StoreEntry], list[StoreEntry]]:
    """The measured tensors, and the models whose names are known."""
    parts: dict[str, list[StoreEntry]] = {FACTS: [], NAMES: []}
    for shelf, entry in entries:
        parts[shelf.layout].append(entry)
    return parts[FACTS], parts[NAMES]


def _num_bytes(entries: Iterable[ShelfEntry]) -> int:
    return sum(entry.num_bytes for _, entry in entries)


def _to_remove(entries: list[ShelfEntry], max_bytes: int | None, max_days: float | None) -> list[ShelfEntry]:
    """The entries that are too old or no longer fit; `entries` has the last used first."""
    to_remove, room, now = [], max_bytes, time.time()
    for pair in entries:
        entry = pair[1]
        is_old = max_days is not None and now - entry.last_used > max_days * DAY
        if is_old or (room is not None and entry.num_bytes > room):
            to_remove.append(pair)
            room = 0 if room is not None and not is_old else room  # older entries are removed too
        elif room is not None:
            room -= entry.num_bytes
    return to_remove


def _row(facts_store: Store, entry: StoreEntry) -> StoreRow:
    """A row of the report: the name under which the tensor was first measured, its shape and its last use."""
    payload = facts_store.any_fact(entry.content, "extremes") or next(
        (fact for question in entry.questions if (fact := facts_store.any_fact(entry.content, question))),
        None,
    )
    about = _about(payload) if payload else UNKNOWN
    return {
        "name": printable(str(about["name"])),
        "shape": list(about["shape"]),
        "dtype": printable(str(about["dtype"])),
        "facts": list(entry.questions),
        "bytes": entry.num_bytes,
        "last_used": time.strftime("%Y-%m-%d %H:%M", time.gmtime(entry.last_used)),
        "content": entry.content,
    }


def _about(payload: bytes) -> dict[str, Any]:
    """The tensor of a fact; unknown values for a fact of another version of kasa."""
    try:
        about: dict[str, Any] = UNKNOWN | header(payload)["about"]
    except (KeyError, TypeError, ValueError):
        return UNKNOWN
    return about
