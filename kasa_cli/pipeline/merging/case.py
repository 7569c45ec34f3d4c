"""The input of `kasa merge`: the checked options, and the adapters placed on their base."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kasa_cli.adapters import Adapter, consumed
from kasa_cli.checkpoint import DTYPES, Checkpoint, Source
from kasa_cli.errors import AlreadyMerged, UsageError
from kasa_cli.files import check_apart
from kasa_cli.linalg import ROUNDINGS
from kasa_cli.methods.adapter_kinds import BaseChange
from kasa_cli.model_names import NameMap
from kasa_cli.pipeline.adapter_on_base import (
    BASES,
    AdapterOnBase,
    Origin,
    Truncations,
    base_changes,
    known_truncations,
    on_base,
    provenance,
    read_adapter,
)
from kasa_cli.pipeline.measuring import Facts
from kasa_cli.pipeline.merging.edits import Merging, TensorEdits, edits_by_tensor
from kasa_cli.pipeline.merging.layout import MergedLayout, settle_layout
from kasa_cli.pipeline.opening import ModelLocation, survey
from kasa_cli.report import AdapterRow


@dataclass(frozen=True)
class MergeRequest:
    """The options of `kasa merge`. Without `weights`, each adapter has weight 1."""

    weights: tuple[float, ...] = ()
    base_is: str = "auto"
    force_base: bool = False
    untie: bool = False
    dtype: str = "auto"
    rounding: str = "nearest"
    max_shard_size: str | None = None
    overwrite: bool = False
    restart: bool = False


@dataclass(frozen=True)
class MergeCase:
    """Adapters and their base, the edits of each tensor, and the layout of the result.

    `base_is`: whether the base of KaSA adapters is the original or truncated; None without such adapters.
    """

    options: MergeRequest
    source: Source
    base: Origin
    names: NameMap
    adapters: tuple[AdapterRow, ...]
    base_is: str | None
    layout: MergedLayout
    edits: dict[str, TensorEdits]
    notes: tuple[str, ...]

    @property
    def checkpoint(self) -> Checkpoint:
        """The base's files."""
        return self.base.checkpoint


def check(adapters: Sequence[Path], options: MergeRequest) -> None:
    """Refuse options that are invalid for every base.

    Raises:
        UsageError: naming the option.
    """
    if not adapters:
        raise UsageError("no adapter to merge: give at least one")
    if options.weights and len(options.weights) != len(adapters):
        raise UsageError(
            f"{len(options.weights)} weights for {len(adapters)} adapters",
            "",
            "give one weight for each adapter, or none",
        )
    if not all(map(math.isfinite, options.weights)):
        raise UsageError("a weight must be a finite number", "--weight")
    for name, known, label in (
        (options.base_is, BASES, "kind of base"),
        (options.dtype, tuple(DTYPES), "dtype"),
        (options.rounding, tuple(ROUNDINGS), "rounding"),
    ):
        if name not in known:
            raise UsageError(f"unknown {label} {name!r}", "", f"known: {', '.join(known)}")


def opened_case(
    paths: Sequence[Path],
    where: ModelLocation,
    output: Path,
    options: MergeRequest,
    facts: Facts | None = None,
) -> MergeCase:
    """Read the base and every adapter, check that they fit, and collect the edits of each tensor.

    Raises:
        KasaError: a subclass that fits the failure; nothing was written.
    """
    source, checkpoint, names = survey(where, facts.store if facts else None)
    check_apart(output, [source.root, *paths])
    base = provenance.origin(checkpoint)
    merged, rows, mergings, base_is = provenance.merged_before(base), [], [], None
    for path, weight in zip(paths, options.weights or [1.0] * len(paths), strict=True):
        placed_adapter = on_base(read_adapter(path), base, names)
        digest = provenance.digest(path, placed_adapter.adapter.container.path)
        if digest in merged:
            raise AlreadyMerged("the base already contains this adapter", str(path), "leave it out")
        merged.add(digest)
        merging, own = _merging(placed_adapter, base, weight, options)
        mergings.append(merging)
        rows.append(_row(path, placed_adapter.adapter, weight, digest))
        base_is = own or base_is
    layout, mergings = settle_layout(base, names, mergings, options.untie)
    notes = (*([names.note] if names.note else []), *layout.notes, *_initialisation_notes(mergings))
    return MergeCase(
        options, source, base, names, tuple(rows), base_is, layout, edits_by_tensor(mergings), notes
    )


def _merging(
    match: AdapterOnBase, base: Origin, weight: float, options: MergeRequest
) -> tuple[Merging, str | None]:
    """An adapter that is checked against its base, and, for KaSA, whether the base is the original or truncated."""
    match.require_initialisation(base)
    targets = match.truncated_targets
    base_is = provenance.base_is(options.base_is, base, match.made_by, targets) if targets else None
    if not options.force_base:
        match.require_base(base)
    truncates_base = base_is == provenance.ORIGINAL
    truncations = known_truncations(match.adapter.path, base) if truncates_base else Truncations()
    truncations.require_no_experts(match.adapter.path)
    return Merging(match.adapter, match.places, match.values, weight, truncates_base, truncations), base_is


def _row(path: Path, adapter: Adapter, weight: float, digest: str) -> AdapterRow:
    return AdapterRow(
        str(path), adapter.kind, weight, digest, len(consumed(adapter)), len(adapter.container.tensors)
    )


def _initialisation_notes(mergings: Sequence[Merging]) -> list[str]:
    """Notes on the initialisations that changed the base: each is recomputed, from the base or from the adapter."""
    notes = []
    for merging in mergings:
        changes, name = base_changes(merging.placed), merging.adapter.path.name
        if BaseChange.RECOMPUTED in changes:
            notes.append(
                f"{name}: its initialisation is recomputed from this base; the result is right only if it was "
                "trained on this base"
            )
        if BaseChange.IN_FACTORS in changes:
            notes.append(f"{name}: its initialisation is recomputed from its own tensors, which are rounded")
    return notes
