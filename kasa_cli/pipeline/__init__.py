"""The only place where bytes and maths meet, and the only loops over tensors."""

from kasa_cli.pipeline import store_contents
from kasa_cli.pipeline.opening import Where
from kasa_cli.pipeline.workers import Silent, Watcher

__all__ = [
    "Silent",
    "Watcher",
    "Where",
    "store_contents",
]
