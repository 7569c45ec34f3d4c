"""Candidates ranked by a criterion, and the selection exported for trainers."""

from kasa_cli.pipeline.selecting import run

__all__ = [
    "run",
]
