"""Spectral facts of weights, from the store or by one decomposition."""

from kasa_cli.pipeline.measuring.facts import (
    SOLVER_EDITION,
    Bench,
    Extremes,
    Facts,
    HashedMatrix,
    header,
    open_facts,
    pack,
    pick_device,
    store_notes,
    unpack,
)
from kasa_cli.pipeline.measuring.many import Asked, ask, room
from kasa_cli.pipeline.measuring.plan import measure_plan, require_some
from kasa_cli.pipeline.measuring.weights import weigh

__all__ = [
    "SOLVER_EDITION",
    "Asked",
    "Bench",
    "Extremes",
    "Facts",
    "HashedMatrix",
    "ask",
    "header",
    "measure_plan",
    "open_facts",
    "pack",
    "pick_device",
    "require_some",
    "room",
    "store_notes",
    "unpack",
    "weigh",
]
