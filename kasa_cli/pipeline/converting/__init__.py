"""Converts an adapter into a plain LoRA."""

from kasa_cli.pipeline.converting import run

__all__ = [
    "run",
]
