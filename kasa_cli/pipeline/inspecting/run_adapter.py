"""Inspects an adapter: every update, from its own file and, where that is needed, from its base."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kasa_cli.adapters import Adapter
from kasa_cli.checkpoint import OpenFiles, TruncateManifest
from kasa_cli.errors import UsageError
from kasa_cli.methods import Layer, penalties
from kasa_cli.pipeline.adapter_on_base import (
    BASES,
    ORIGINAL,
    TRUNCATED,
    AdapterOnBase,
    Origin,
    known_truncations,
    on_base,
    provenance,
    read_adapter,
)
from kasa_cli.pipeline.inspecting.adapter import InspectedPatch, MeasuredPatch, OpenAdapter, module_rows
from kasa_cli.pipeline.inspecting.share_in_cut import (
    NO_BASE,
    NOT_RECORDED,
    TRUNCATED_ALREADY,
    TruncatedDirections,
    state_of_base,
)
from kasa_cli.pipeline.measuring import Facts, open_facts, store_notes
from kasa_cli.pipeline.opening import ModelLocation, survey
from kasa_cli.pipeline.workers import (
    RunOptions,
    Silent,
    Task,
    Watcher,
    blas_threads,
    check_running,
    run_stage,
)
from kasa_cli.report import AdapterReport, AdapterTotals, ModuleRow, ValueRow

__all__ = ["ModelLocation", "RunOptions", "adapter"]

COMMAND = "inspect adapter"
BETA, GAMMA = 1e-4, 1e-3
"""PEFT's defaults, for a `kasa_config` without them."""
ADDED_BIAS = "lora_B.bias"


@dataclass(frozen=True)
class PlacedAdapter:
    """A base, and the adapter placed on it."""

    origin: Origin
    fitted: AdapterOnBase
    facts: Facts
    notes: tuple[str, ...]


def adapter(
    path: Path,
    where: ModelLocation | None = None,
    base_is: str = "auto",
    running: RunOptions | None = None,
    watcher: Watcher | None = None,
) -> AdapterReport:
    """Measure an adapter: scaling, norm, singular values, diagonal, orthogonality, penalties, share in the cut.

    `where` is the base, needed only for some kinds and for the share in the cut (the truncated directions). `base_is`
    says whether this base is truncated.

    Raises:
        KasaError: a subclass that fits the failure.
    """
    running, watcher = running or RunOptions(), watcher or Silent()
    check_running(running)
    if base_is not in BASES:
        raise UsageError(f"unknown kind of base {base_is!r}", "", f"known: {', '.join(BASES)}")
    if where is None and base_is != "auto":
        raise UsageError("--base-is needs a base", base_is, "give the base with --base")
    adapter_file = read_adapter(path)
    base = _base(adapter_file, where, running) if where else None
    base_state = _base_is(base_is, base) if base else None
    directions = _truncated_directions(path, base, base_state)
    with OpenFiles() as files:
        source = OpenAdapter(adapter_file, base.origin.checkpoint if base else None, files)
        measured = _measure(source, base, directions, running, watcher)
    rows = tuple(measurement.row for measurement in measured)
    return AdapterReport(
        command=COMMAND,
        adapter=str(path),
        kind=adapter_file.kind,
        base=where.model if where else None,
        base_is=base_state,
        modules=rows,
        values=_values(adapter_file),
        penalties=_penalties(
            adapter_file, [measurement.layer for measurement in measured if measurement.layer]
        ),
        totals=_totals(adapter_file, rows),
        notes=(*_notes(rows), *(base.notes if base else ())),
    )


def _base(adapter_file: Adapter, where: ModelLocation, running: RunOptions) -> PlacedAdapter:
    """The base, with the adapter placed on it; every tensor must fit."""
    facts = open_facts(running)
    _, checkpoint, names = survey(where, facts.store)
    origin = provenance.origin(checkpoint)
    placed = on_base(adapter_file, origin, names)
    placed.require_base(origin)
    return PlacedAdapter(origin, placed, facts, (*([names.note] if names.note else []), *store_notes(facts)))


def _base_is(requested: str, base: PlacedAdapter) -> str | None:
    """Whether the base is truncated, for adapters that depend on it; None where that is unknown."""
    names = base.fitted.truncated_targets
    return state_of_base(requested, base.origin, base.fitted.made_by, names) if names else None


def _truncated_directions(
    path: Path, base: PlacedAdapter | None, base_state: str | None
) -> TruncatedDirections:
    truncations = known_truncations(path, base.origin if base else None)
    if base is None:
        made_by = provenance.adapter_manifest(path)
        known = made_by.truncations if isinstance(made_by, TruncateManifest) else {}
        names = {module: name for name, (module, _) in known.items()}
        return TruncatedDirections(truncations, names, None, NO_BASE)
    if base_state == ORIGINAL:
        return TruncatedDirections(truncations, {}, (base.origin.checkpoint, base.facts))
    return TruncatedDirections(
        truncations, {}, None, TRUNCATED_ALREADY if base_state == TRUNCATED else NOT_RECORDED
    )


def _measure(
    source: OpenAdapter,
    base: PlacedAdapter | None,
    directions: TruncatedDirections,
    running: RunOptions,
    watcher: Watcher,
) -> list[MeasuredPatch]:
    """Measure every patch, in the order of the layers."""
    items = [InspectedPatch(place.patch, place) for place in base.fitted.places] if base else []
    items = items or [InspectedPatch(patch) for patch in source.adapter.patches]
    items.sort(key=lambda item: _natural(item.name))
    task: Task[InspectedPatch, list[MeasuredPatch]] = Task(
        lambda item: module_rows(source, item, directions),
        name=lambda item: item.name,
        memory=lambda item: item.num_bytes,
    )
    with blas_threads(running.threads_per_worker):
        measured = run_stage("look", task, items, running.num_workers, watcher)
    return [row for rows in measured for row in rows]


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key under which layer 2 comes before layer 10.

    >>> sorted(["layers.10.q", "layers.2.q"], key=_natural)
    ['layers.2.q', 'layers.10.q']
    """
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _values(adapter_file: Adapter) -> tuple[ValueRow, ...]:
    """The trained values in the file that are not updates: whole parameters, rows of embeddings, added biases."""

    def row(parameter: str, tensor: str, why: str) -> ValueRow:
        entry = adapter_file.container.tensors[tensor]
        return ValueRow(parameter, tensor, entry.shape, entry.dtype, why)

    rows = [
        row(replacement.parameter, replacement.tensor, replacement.why)
        for replacement in adapter_file.replacements
    ]
    rows += [
        row(token_row.parameter, token_row.tensor, "trained rows") for token_row in adapter_file.token_rows
    ]
    biases = [
        row(f"{patch.module}.bias", patch.tensors[ADDED_BIAS], "added to the bias")
        for patch in adapter_file.patches
        if ADDED_BIAS in patch.tensors
    ]
    return tuple(sorted((*rows, *biases), key=lambda row: _natural(row.parameter)))


def _penalties(adapter_file: Adapter, layers: Sequence[Layer]) -> dict[str, Any] | None:
    """KaSA's penalties for the whole adapter; None for other kinds."""
    if not layers:
        return None
    settings = adapter_file.config.get("kasa_config") or {}
    beta, gamma = float(settings.get("beta", BETA)), float(settings.get("gamma", GAMMA))
    by_convention = {name: asdict(penalty) for name, penalty in penalties(layers, beta, gamma).items()}
    return {"beta": beta, "gamma": gamma, **by_convention}


def _totals(adapter_file: Adapter, rows: Sequence[ModuleRow]) -> AdapterTotals:
    norms = [row.norm for row in rows if row.norm is not None]
    entries = adapter_file.container.tensors.values()
    return {
        "modules": len(rows),
        "modules_without_norm": len(rows) - len(norms),
        "norm": math.hypot(*norms) if len(norms) == len(rows) else None,
        "tensors": len(entries),
        "parameters": sum(math.prod(entry.shape) for entry in entries),
    }


def _notes(rows: Iterable[ModuleRow]) -> list[str]:
    """The reasons for missing figures, each once."""
    listed = list(rows)
    whys = Counter(row.why for row in listed if row.why)
    cuts = Counter(row.in_cut_why for row in listed if row.in_cut_why)
    return [
        *(f"{number} of {len(listed)} updates: {why}" for why, number in whys.items()),
        *(f"share in the cut, {number} of {len(listed)}: {why}" for why, number in cuts.items()),
    ]
