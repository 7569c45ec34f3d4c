"""`kasa store ls` and `kasa store prune`: what is remembered of spectra, and forgetting it."""

import time
from pathlib import Path
from typing import Any

from kasa_cli.checkpoint.store import Entry, Store, existing
from kasa_cli.errors import UsageError, printable
from kasa_cli.pipeline.facts import header
from kasa_cli.report import StoreReport

DAY = 24 * 3600
UNKNOWN: dict[str, Any] = {"name": "?", "dtype": "?", "shape": [0, 0]}


def ls(store: Path | None = None) -> StoreReport:
    """Every tensor measured, the one used last first."""
    opened = existing(store)
    entries = opened.entries()
    return StoreReport(
        command="store ls",
        store=str(opened.root),
        tensors=tuple(_row(opened, entry) for entry in entries),
        totals={"tensors": len(entries), "bytes": sum(entry.num_bytes for entry in entries)},
    )


def prune(
    store: Path | None = None,
    *,
    max_bytes: int | None = None,
    max_days: float | None = None,
    everything: bool = False,
    dry_run: bool = False,
) -> StoreReport:
    """Forget what was used the longest ago, until what is left fits; or what is older; or all.

    Raises:
        UsageError: nothing says what to forget.
    """
    if max_bytes is None and max_days is None and not everything:
        raise UsageError("nothing says what to forget", "", "give --max-size, --older-than or --all")
    opened = existing(store)
    entries = opened.entries()
    doomed = entries if everything else _doomed(entries, max_bytes, max_days)
    rows = tuple(_row(opened, entry) for entry in doomed)
    if not dry_run:
        for entry in doomed:
            opened.remove(entry.content)
        opened.sweep()
    return StoreReport(
        command="store prune",
        store=str(opened.root),
        tensors=rows,
        totals={
            "removed": len(doomed),
            "bytes_removed": sum(entry.num_bytes for entry in doomed),
            "kept": len(entries) - len(doomed),
            "bytes_kept": sum(entry.num_bytes for entry in entries)
            - sum(entry.num_bytes for entry in doomed),
            "dry_run": dry_run,
        },
    )


def _doomed(entries: list[Entry], max_bytes: int | None, max_days: float | None) -> list[Entry]:
    """Of entries, the last used first: those too old, and those that no longer fit."""
    doomed, room, now = [], max_bytes, time.time()
    for entry in entries:
        is_old = max_days is not None and now - entry.last_used > max_days * DAY
        if is_old or (room is not None and entry.num_bytes > room):
            doomed.append(entry)
            room = 0 if room is not None and not is_old else room  # all that is older goes too
        elif room is not None:
            room -= entry.num_bytes
    return doomed


def _row(opened: Store, entry: Entry) -> dict[str, Any]:
    """What a person can recognise a tensor by: the name it was first measured under, and its shape."""
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
    """What a fact is about, if it is one as this version of kasa keeps them."""
    try:
        about: dict[str, Any] = UNKNOWN | header(payload)["about"]
    except (KeyError, TypeError, ValueError):
        return UNKNOWN
    return about
