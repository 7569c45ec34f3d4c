"""An adapter on its base: the tensors that it changes, and the checks against the manifests of both."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kasa_cli.adapters import (
    Adapter,
    Placed,
    PlacedValue,
    consumed,
    open_adapter,
    placed,
    placed_values,
    unconsumed,
)
from kasa_cli.checkpoint import Manifest
from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds import BaseChange, initialisation_of
from kasa_cli.model_names import NameMap
from kasa_cli.pipeline.adapter_on_base import provenance
from kasa_cli.pipeline.adapter_on_base.provenance import Origin

RESIDUAL = "residual"
"""The role, in manifests, of a tensor that an initialisation was subtracted from."""


@dataclass(frozen=True)
class AdapterOnBase:
    """An adapter, the places of its parts in a base, and the manifest of the output that it belongs to, if any."""

    adapter: Adapter
    places: tuple[Placed, ...]
    values: tuple[PlacedValue, ...]
    made_by: Manifest | None

    @property
    def targets(self) -> list[str]:
        """The tensors on disk that patches change, each once."""
        return targets_of(self.places)

    @property
    def truncated_targets(self) -> list[str]:
        """The targets whose smallest components KaSA drops; none for other kinds."""
        return self.targets if self.adapter.row.truncates_base else []

    def require_base(self, base: Origin) -> None:
        """Refuse a base that the manifest of the adapter shows to be the wrong one.

        Raises:
            IntegrityError: naming the first tensor that differs.
        """
        provenance.require_fit(base, self.made_by, self.targets, self.adapter.path)

    def require_initialisation(self, base: Origin) -> None:
        """Refuse an adapter whose changed base is lost, and a base that its initialisation has changed already.

        Raises:
            InvalidInput: naming the adapter, or the tensor.
        """
        changes = base_changes(self.places)
        init = initialisation_of(self.adapter.config)
        if BaseChange.LOST in changes and init:
            raise InvalidInput(init.refusal, str(self.adapter.path), init.remedy)
        if BaseChange.RECOMPUTED in changes and self.adapter.row.truncates_base:
            problem = (
                "PEFT truncates this base after its initialisation is subtracted, "
                "and adds it back without the diagonal"
            )
            raise InvalidInput(problem, str(self.adapter.path), "merge it with PEFT")
        records = base.manifest.tensors if base.manifest else {}
        recomputed = (place for place in self.places if place.patch.base_change is BaseChange.RECOMPUTED)
        for name in targets_of(recomputed):
            if name in records and records[name].role == RESIDUAL:
                problem = "the initialisation of an adapter is subtracted from this base already"
                raise InvalidInput(problem, name, f"give the original base for {self.adapter.path.name}")


def read_adapter(path: Path) -> Adapter:
    """Read an adapter, and check that every tensor is used.

    Raises:
        InvalidInput, UnsafeInput: a field, a name or a shape is unknown, or contradicts another.
    """
    adapter = open_adapter(path)
    if unused := sorted(adapter.container.tensors.keys() - consumed(adapter)):
        raise unconsumed(unused, adapter.container)
    return adapter


def on_base(adapter: Adapter, base: Origin, names: NameMap) -> AdapterOnBase:
    """An adapter on its base, every shape checked.

    Raises:
        InvalidInput: the base lacks a module, or a shape does not fit.
    """
    tensors = base.checkpoint.tensors
    places, values = placed(adapter, names, tensors), placed_values(adapter, names, tensors)
    return AdapterOnBase(adapter, places, values, provenance.adapter_manifest(adapter.path))


def targets_of(places: Iterable[Placed]) -> list[str]:
    """The tensors on disk that patches change, each once."""
    pieces = (part.piece.name for place in places for parts in place.matrices for part in parts)
    return list(dict.fromkeys(pieces))


def base_changes(places: Iterable[Placed]) -> set[BaseChange]:
    """How the initialisation of each patch changed the base."""
    return {place.patch.base_change for place in places}
