"""Truncated base, fresh adapter and tail."""

from kasa_cli.pipeline.truncating import run

__all__ = [
    "run",
]
