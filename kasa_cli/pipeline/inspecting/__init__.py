"""Figures of spectra, adapters and differences between checkpoints."""
