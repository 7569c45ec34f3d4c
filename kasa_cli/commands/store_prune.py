"""`kasa store prune`."""

import re

from kasa_cli.commands.arguments import PathLike, optional_path
from kasa_cli.errors import UsageError
from kasa_cli.pipeline import store_contents
from kasa_cli.report import StoreReport

SIZES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
DAYS = {"d": 1.0, "h": 1 / 24, "w": 7.0}


def store_prune(
    *,
    max_size: str | None = None,
    older_than: str | None = None,
    all: bool = False,
    dry_run: bool = False,
    store: PathLike | None = None,
) -> StoreReport:
    """Remove spectra from the store: the longest unused until `max_size` holds, those `older_than`, or all.

    Raises:
        UsageError: none of the three is given, or one is not a size or a time span.
    """
    return store_contents.prune(
        optional_path(store),
        max_bytes=num_bytes(max_size),
        max_days=num_days(older_than),
        everything=all,
        dry_run=dry_run,
    )


def num_bytes(text: str | None) -> int | None:
    """A size as bytes.

    >>> num_bytes("1.5 GB"), num_bytes(None)
    (1500000000, None)

    Raises:
        UsageError: the text is not a size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if not match:
        raise UsageError(
            f"invalid size {text!r}", "--max-size", "give a number and a unit, such as 5GB or 500MB"
        )
    return int(float(match[1]) * SIZES[match[2]])


def num_days(text: str | None) -> float | None:
    """A time span in days.

    >>> num_days("36h"), num_days("2w")
    (1.5, 14.0)

    Raises:
        UsageError: the text is not a time span.
    """
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)\s*([dhw])", text.strip().lower())
    if not match:
        raise UsageError(
            f"invalid time span {text!r}", "--older-than", "give a number and a unit, such as 90d or 12h"
        )
    return float(match[1]) * DAYS[match[2]]
