"""The tree of errors, each leaf with the exit code that scripts rely on.

KasaError
├── UsageError           2   the command line asks for something impossible
├── InvalidInput         3   a file is corrupt, incomplete or not what it claims to be
├── UnsafeInput          4   a file is refused as unsafe
├── IntegrityError       5   bytes differ from those on record
├── OutputExists         6   the output exists already
├── AlreadyMerged        6   the base already contains the adapter
├── Locked               7   another run holds the output
├── ResourceError        8   disk, memory or permission
├── NumericalError       9   a number is not finite, or a decomposition misses its accuracy
├── NetworkError        10   the Hub cannot be reached, or refuses
└── BelowStandard       11   the output is complete, but below what `strict` asks
"""

from enum import IntEnum
from typing import Any

__all__ = [
    "AlreadyMerged",
    "BelowStandard",
    "ExitCode",
    "IntegrityError",
    "InvalidInput",
    "KasaError",
    "Locked",
    "NetworkError",
    "NumericalError",
    "OutputExists",
    "ResourceError",
    "UnsafeInput",
    "UsageError",
]


class ExitCode(IntEnum):
    """Exit codes of the command line; scripts treat an unknown one as a failure."""

    DONE = 0
    INTERNAL = 1
    USAGE = 2
    INVALID = 3
    UNSAFE = 4
    INTEGRITY = 5
    EXISTS = 6
    LOCKED = 7
    RESOURCE = 8
    NUMERIC = 9
    NETWORK = 10
    BELOW_STANDARD = 11
    INTERRUPTED = 130
    TERMINATED = 143


def printable(text: str) -> str:
    """Escape every character that a terminal would interpret, so that an untrusted name stays text.

    >>> printable("layer\\x1b[2J")
    'layer\\\\x1b[2J'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class KasaError(Exception):
    """An error of kasa, in one line: what, where, what to do.

    >>> str(KasaError("truncated file", "model.safetensors", "download it again"))
    'truncated file: model.safetensors: download it again'
    """

    exit_code = ExitCode.INTERNAL

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        super().__init__(": ".join(printable(part) for part in (what, where, remedy) if part))
        self.what, self.where, self.remedy = what, where, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.where, self.remedy)


class UsageError(KasaError):
    """The command line asks for something impossible."""

    exit_code = ExitCode.USAGE


class InvalidInput(KasaError):
    """A file is corrupt, incomplete or not what it claims to be."""

    exit_code = ExitCode.INVALID


class UnsafeInput(KasaError):
    """A file is refused as unsafe."""

    exit_code = ExitCode.UNSAFE


class IntegrityError(KasaError):
    """Bytes differ from those on record."""

    exit_code = ExitCode.INTEGRITY


class OutputExists(KasaError):
    """The output exists already."""

    exit_code = ExitCode.EXISTS


class AlreadyMerged(KasaError):
    """The base already contains the adapter."""

    exit_code = ExitCode.EXISTS


class Locked(KasaError):
    """Another run holds the output."""

    exit_code = ExitCode.LOCKED


class ResourceError(KasaError):
    """Disk, memory or permission does not suffice."""

    exit_code = ExitCode.RESOURCE


class NumericalError(KasaError):
    """A number is not finite, or a decomposition does not reach its accuracy."""

    exit_code = ExitCode.NUMERIC


class NetworkError(KasaError):
    """The Hub cannot be reached, or refuses."""

    exit_code = ExitCode.NETWORK


class Interrupted(KeyboardInterrupt):
    """Ctrl-C on the command line: the process ends at once, and waits for no worker."""


class BelowStandard(KasaError):
    """The output is complete, but below what `strict` asks; `report` is the result."""

    exit_code = ExitCode.BELOW_STANDARD

    def __init__(self, what: str, where: str, remedy: str, report: Any) -> None:
        super().__init__(what, where, remedy)
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.where, self.remedy, self.report)
