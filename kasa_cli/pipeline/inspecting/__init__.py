"""Figures of spectra, adapters and differences between checkpoints."""

from kasa_cli.pipeline.inspecting import run_adapter, run_diff, run_spectrum

__all__ = [
    "run_adapter",
    "run_diff",
    "run_spectrum",
]
