"""An adapter on its base: read, led to the tensors that it changes, and compared with what manifests know of both."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kasa_cli.adapters.adapter import Adapter, consumed, unconsumed
from kasa_cli.adapters.parameter_placement import PlacedValue, placed_values
from kasa_cli.adapters.placement import Placed, placed
from kasa_cli.adapters.reading import open_adapter
from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.table import REFUSED
from kasa_cli.model_names.names import NameMap
from kasa_cli.pipeline.adapter_on_base import provenance
from kasa_cli.pipeline.adapter_on_base.patches import LOST
from kasa_cli.pipeline.adapter_on_base.provenance import Origin

KASA = "kasa"
RECOMPUTED = frozenset({"pissa", "olora"})
"""Starts that are no part of an adapter's file, and are found again by the same decomposition of the base."""
RESIDUAL = "residual"
"""What a manifest calls a tensor off which a start was taken."""


@dataclass(frozen=True)
class Fitted:
    """An adapter, where all that it says goes in a base, and the manifest of its output, if it is part of one."""

    adapter: Adapter
    places: tuple[Placed, ...]
    values: tuple[PlacedValue, ...]
    made_by: Mapping[str, Any] | None

    @property
    def targets(self) -> list[str]:
        """The tensors on disk that patches change, each once."""
        return targets_of(self.places)

    @property
    def cut_targets(self) -> list[str]:
        """Those off which KaSA cuts, or has cut, the smallest components; none for other kinds."""
        return self.targets if self.adapter.kind == KASA else []

    def require_base(self, base: Origin) -> None:
        """Refuse a base that the adapter was not made for, if its manifest knows that.

        Raises:
            IntegrityError: naming the first tensor that is another.
        """
        provenance.require_fit(base, self.made_by, self.targets, self.adapter.path)

    def require_start(self, base: Origin) -> None:
        """Refuse an adapter that no base fits any more, and a base that has lost already what its start takes off.

        Raises:
            InvalidInput: naming the adapter, or the tensor.
        """
        if LOST in starts_of(self.places):
            what = "an adapter that took a random or data-driven start off its base"
            raise InvalidInput(what, str(self.adapter.path), REFUSED["pissa_niter"])
        records = base.manifest["tensors"] if base.manifest else {}
        for name in targets_of(
            one for one in self.places if one.patch.settings.get("base_start") in RECOMPUTED
        ):
            if records.get(name, {}).get("role") == RESIDUAL:
                what = "a residual base, off which an adapter's start is taken already"
                raise InvalidInput(what, name, f"take the original for {self.adapter.path.name}")


def read_adapter(path: Path) -> Adapter:
    """An adapter of which every tensor is accounted for.

    Raises:
        InvalidInput, UnsafeInput: something in it is not understood, or does not fit the rest.
    """
    adapter = open_adapter(path)
    if left := sorted(adapter.container.tensors.keys() - consumed(adapter)):
        raise unconsumed(left, adapter.container)
    return adapter


def fitted(adapter: Adapter, base: Origin, names: NameMap) -> Fitted:
    """An adapter led to its base, every shape checked.

    Raises:
        InvalidInput: the base has no such module, or one that does not fit.
    """
    tensors = base.checkpoint.tensors
    places, values = placed(adapter, names, tensors), placed_values(adapter, names, tensors)
    return Fitted(adapter, places, values, provenance.adapter_manifest(adapter.path))


def targets_of(places: Iterable[Placed]) -> list[str]:
    """The tensors on disk that patches change, each once."""
    pieces = (part.piece.name for place in places for parts in place.matrices for part in parts)
    return list(dict.fromkeys(pieces))


def starts_of(places: Iterable[Placed]) -> set[str | None]:
    """What became of that which patches took off their base when they were begun; None of those that took nothing."""
    return {place.patch.settings.get("base_start") for place in places}
