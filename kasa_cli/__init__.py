"""kasa: spectral surgery on Hugging Face checkpoints, one tensor at a time."""

__version__ = "0.1.0"
