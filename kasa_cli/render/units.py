"""Numbers as people read them."""

import math


def number(value: float) -> str:
    """Three significant digits.

    >>> [number(x) for x in (0.99999, 1252.6, 7.1e6, math.inf, 0.0)]
    ['1.000', '1,253', '7.1e+06', '∞', '0']
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else str(value)
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6 or size < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if size >= 100 else f"{value:.3f}" if size < 10 else f"{value:.1f}"


def percent(share: float) -> str:
    """A share of one, as per cent.

    >>> percent(0.136), percent(2.26e-6)
    ('13.6 %', '0.00023 %')
    """
    return f"{100 * share:.1f} %" if share >= 0.01 or share == 0 else f"{100 * share:.2g} %"


def big(num_bytes: float) -> str:
    """Bytes in decimal units, as disks are sold.

    >>> big(90_868_376), big(512)
    ('90.9 MB', '512 B')
    """
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """A time span in its two largest units.

    >>> duration(0.4), duration(75), duration(7320)
    ('1 s', '1 min 15 s', '2 h 2 min')
    """
    whole = max(1, math.ceil(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    parts = [(hours, "h"), (minutes, "min"), (left, "s")]
    shown = [f"{count} {unit}" for count, unit in parts if count]
    return " ".join(shown[:2])
