"""Progress of a call, as `progress=` receives it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Progress of one stage of a call: items done, and the share of the work done (a wide layer is more work).

    `name` is the item that was just done; it is empty when the stage begins.
    """

    stage: str
    num_items: int
    num_done: int = 0
    fraction: float = 0.0
    name: str = ""
