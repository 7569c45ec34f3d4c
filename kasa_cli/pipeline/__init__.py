"""The only place where bytes and maths meet, and the only loops over tensors."""

from kasa_cli.pipeline import store_contents
from kasa_cli.pipeline.opening import ModelLocation
from kasa_cli.pipeline.workers import Silent, Watcher

__all__ = [
    "ModelLocation",
    "Silent",
    "Watcher",
    "store_contents",
]
