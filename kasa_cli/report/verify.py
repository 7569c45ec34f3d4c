"""Result of `kasa verify`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class VerifyReport:
    """What `kasa verify` checked; it raises on the first class of problem, so a report means all is well."""

    command: str
    output: str
    depth: tuple[str, ...]
    files: int
    tensors: int
    bytes_hashed: int
    compared: tuple[dict[str, Any], ...] = field(default=())
