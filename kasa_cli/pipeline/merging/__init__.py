"""A base with adapters added to it, each tensor rounded once."""

from kasa_cli.pipeline.merging import run

__all__ = [
    "run",
]
