"""Checks of an output: files against the manifest, tensors against their base."""

from kasa_cli.pipeline.verifying import run

__all__ = [
    "run",
]
