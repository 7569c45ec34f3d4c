"""Lists and prunes the store of measured spectra and module names."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kasa_cli.errors import UsageError, printable
from kasa_cli.files.store import FACTS, NAMES, Entry, Store, existing
from kasa_cli.pipeline.measuring.facts import header
from kasa_cli.report import StoreReport
from kasa_cli.report.totals import StoreRow

DAY = 24 * 3600
UNKNOWN: dict[str, Any] = {"name": "?", "dtype": "?", "shape": [0, 0]}
Held = tuple[Store, Entry]
"""An entry, and the store that holds it."""


def ls(store: Path | None = None) -> StoreReport:
    """Every measured tensor, the one used last first, and the number of models whose names are known."""
    opened = existing(store)
    held = _held(opened)
    tensors, models = _parted(held)
    return StoreReport(
        command="store ls",
        store=str(opened.root),
        tensors=tuple(_row(opened, entry) for entry in tensors),
        totals={"tensors": len(tensors), "models": len(models), "bytes": _num_bytes(held)},
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
        raise UsageError("nothing is chosen for removal", "", "give --max-size, --older-than or --all")
    opened = existing(store)
    held = _held(opened)
    doomed = held if everything else _doomed(held, max_bytes, max_days)
    tensors, models = _parted(doomed)
    rows = tuple(_row(opened, entry) for entry in tensors)
    if not dry_run:
        for shelf, entry in doomed:
            shelf.remove(entry.content)
        for shelf in _shelves(opened):
            shelf.sweep()
    all_tensors, all_models = _parted(held)
    return StoreReport(
        command="store prune",
        store=str(opened.root),
        tensors=rows,
        totals={
            "removed": len(tensors),
            "models_removed": len(models),
            "bytes_removed": _num_bytes(doomed),
            "kept": len(all_tensors) - len(tensors),
            "models_kept": len(all_models) - len(models),
            "bytes_kept": _num_bytes(held) - _num_bytes(doomed),
            "dry_run": dry_run,
        },
    )


def _shelves(opened: Store) -> tuple[Store, Store]:
    return opened.shelf(FACTS), opened.shelf(NAMES)


def _held(opened: Store) -> list[Held]:
    """All entries, the last used first."""
    held = [(shelf, entry) for shelf in _shelves(opened) for entry in shelf.entries()]
    return sorted(held, key=lambda one: (-one[1].last_used, one[1].content))


def _parted(held: Iterable[Held]) -> tuple[list[Entry], list[Entry]]:
    """The measured tensors, and the models whose names are known."""
    parts: dict[str, list[Entry]] = {FACTS: [], NAMES: []}
    for shelf, entry in held:
        parts[shelf.layout].append(entry)
    return parts[FACTS], parts[NAMES]


def _num_bytes(held: Iterable[Held]) -> int:
    return sum(entry.num_bytes for _, entry in held)


def _doomed(held: list[Held], max_bytes: int | None, max_days: float | None) -> list[Held]:
    """The entries that are too old or no longer fit; `held` has the last used first."""
    doomed, room, now = [], max_bytes, time.time()
    for one in held:
        entry = one[1]
        is_old = max_days is not None and now - entry.last_used > max_days * DAY
        if is_old or (room is not None and entry.num_bytes > room):
            doomed.append(one)
            room = 0 if room is not None and not is_old else room  # all that is older goes too
        elif room is not None:
            room -= entry.num_bytes
    return doomed


def _row(opened: Store, entry: Entry) -> StoreRow:
    """A row for a person: the name under which the tensor was first measured, its shape and use."""
    payload = opened.any_fact(entry.content, "extremes") or next(
        (found for question in entry.questions if (found := opened.any_fact(entry.content, question))), None
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
