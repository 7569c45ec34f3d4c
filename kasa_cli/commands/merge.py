"""`kasa merge`: adapters into their base, one tensor at a time, each rounded once."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kasa_cli.checkpoint import card, manifest
from kasa_cli.checkpoint.adapter import consumed, unconsumed
from kasa_cli.checkpoint.adapter_files import open_adapter
from kasa_cli.checkpoint.adapter_places import Placed, placed
from kasa_cli.checkpoint.adapter_value_places import placed_values
from kasa_cli.checkpoint.durable import write_file
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.names import NameMap
from kasa_cli.checkpoint.sheets import CARD, Sheet, base_sheets, copy_companions, write_index
from kasa_cli.checkpoint.staging import MANIFEST, Staging, check_apart, require_space
from kasa_cli.errors import AlreadyMerged, InvalidInput, UsageError
from kasa_cli.linalg.rounding import ROUNDINGS
from kasa_cli.methods.adapters import REFUSED
from kasa_cli.pipeline import lineage, planning
from kasa_cli.pipeline.cuts import Cuts, known_cuts
from kasa_cli.pipeline.job import DTYPES, Running, Where, check_running
from kasa_cli.pipeline.lineage import BASES, Origin
from kasa_cli.pipeline.merging import Merger, Merging, Orders, orders_of
from kasa_cli.pipeline.operate import Written, write_base
from kasa_cli.pipeline.operation import Merged
from kasa_cli.pipeline.outline import Outline, outline
from kasa_cli.pipeline.papers import file_records
from kasa_cli.pipeline.workers import Silent, Watcher, blas_threads
from kasa_cli.report import AdapterRow, MergedRow, MergeReport

__all__ = ["Options", "Running", "Where", "merge"]

RECOMPUTED = frozenset({"pissa", "olora"})
"""Starts that are no part of an adapter's file, and are found again by the same decomposition of the base."""
OWN_FACTORS = "its own factors"
RESIDUAL = "residual"
"""What a manifest calls a tensor off which a start was taken."""


@dataclass(frozen=True)
class Options:
    """The options of `kasa merge`. No weights: each adapter counts once."""

    weights: tuple[float, ...] = ()
    base_is: str = "auto"
    force_base: bool = False
    untie: bool = False
    dtype: str = "auto"
    rounding: str = "nearest"
    max_shard_size: str | None = None
    overwrite: bool = False
    restart: bool = False


def merge(
    adapters: Sequence[Path],
    where: Where,
    output: Path,
    options: Options | None = None,
    running: Running | None = None,
    watcher: Watcher | None = None,
) -> MergeReport:
    """Merge adapters, in their order, into a copy of their base, which appears only when it is complete.

    Raises:
        KasaError: by the kind of trouble; nothing is lost, and the same call goes on where this one stopped.
    """
    options, running, watcher = options or Options(), running or Running(), watcher or Silent()
    check(adapters, options)
    check_running(running)
    source, checkpoint, names = planning.survey(where)
    check_apart(output, [source.root, *adapters])
    base = lineage.origin(checkpoint)
    rows, mergings, base_is = _opened(adapters, base, names, options)
    made, mergings = outline(base, names, mergings, options.untie)
    orders = orders_of(mergings)
    sheets = _sheets(checkpoint, made, orders, options)
    require_space(output.parent, sum(sheet.form.size for sheet in sheets))
    facts = planning.open_facts(running)
    record = {
        "command": "merge",
        "environment": manifest.numeric_environment(running.threads_per_worker, "cpu"),
        "source": {"commit": source.commit, "repo": source.repo},
        **_recorded(options, rows, base_is),
        "merged_before": sorted(lineage.merged_before(base)),
    }
    headers = [[file, shard.identity.size] for file, shard in checkpoint.shards.items()]
    job = {**record, "inputs": headers}
    staging = Staging(output, fingerprint=job, overwrite=options.overwrite, restart=options.restart)
    merger = Merger(checkpoint, orders, facts, options.rounding, made.sources)
    with staging, blas_threads(running.threads_per_worker), merger:
        base_written = write_base(checkpoint, merger, sheets, staging.out, running.num_workers, watcher)
        written = base_written.tensors
        copy_companions(checkpoint, staging.out, options.dtype, made.config)
        write_index(checkpoint, sheets, staging.out)
        record = {**record, "model_class": names.model_class, "tensors": _records(sheets, written)}
        sealed = _write_papers(checkpoint, staging.out, record, rows, running.num_workers, base_written.sha256)
        staging.publish()
    return MergeReport(
        command="merge",
        model=where.model,
        model_class=names.model_class,
        base_is=base_is,
        dtype=options.dtype,
        rounding=options.rounding,
        tensors=_rows(orders, written),
        adapters=rows,
        totals=_totals(written, sheets),
        output={"directory": str(output), "manifest_sha256": hashlib.sha256(sealed).hexdigest()},
        notes=tuple(_notes(names, [*made.notes, *_start_notes(mergings), *planning.store_notes(facts)])),
    )


def _sheets(
    checkpoint: Checkpoint, made: Outline, orders: Mapping[str, Orders], options: Options
) -> list[Sheet]:
    """The files of the merged model."""
    dtype = DTYPES[options.dtype]
    before = {name: checkpoint.tensors[made.sources.get(name, name)].dtype for name in orders}
    dtypes = {name: dtype for name in orders if dtype is not None and dtype != before[name]}
    return base_sheets(checkpoint, dtypes, options.max_shard_size, made.shapes, made.sources)


def _write_papers(
    checkpoint: Checkpoint,
    folder: Path,
    record: Mapping[str, Any],
    rows: Sequence[AdapterRow],
    num_workers: int,
    known: Mapping[str, str],
) -> bytes:
    """The card, then the manifest, which is last: whoever finds it finds all else."""
    carried = card.source_facts(checkpoint.root, checkpoint.companions)
    write_file(
        folder / CARD, [card.card(record["source"]["repo"], carried, "A merged model", _card_body(rows))]
    )
    sealed = manifest.seal(
        {
            **record,
            "files": file_records(folder, num_workers, known),
            "left_out": {left.name: left.reason for left in checkpoint.left_out},
            "schema": manifest.SCHEMA,
        }
    )
    write_file(folder / MANIFEST, [sealed])
    return sealed


def check(adapters: Sequence[Path], options: Options) -> None:
    """Refuse what no base can satisfy.

    Raises:
        UsageError: saying which option.
    """
    if not adapters:
        raise UsageError("no adapter to merge")
    if options.weights and len(options.weights) != len(adapters):
        raise UsageError(
            f"{len(options.weights)} weights for {len(adapters)} adapters", "", "give one each, or none"
        )
    for name, known, what in (
        (options.base_is, BASES, "kind of base"),
        (options.dtype, tuple(DTYPES), "dtype"),
        (options.rounding, tuple(ROUNDINGS), "rounding"),
    ):
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}", "", f"known: {', '.join(known)}")


def _opened(
    paths: Sequence[Path], base: Origin, names: NameMap, options: Options
) -> tuple[tuple[AdapterRow, ...], list[Merging], str | None]:
    """Every adapter read, placed and fit for this base."""
    before, rows, mergings, told = lineage.merged_before(base), [], [], None
    for path, weight in zip(paths, options.weights or [1.0] * len(paths), strict=True):
        adapter = open_adapter(path)
        digest = lineage.digest(path, adapter.container.path)
        if digest in before:
            raise AlreadyMerged("merged already", str(path), "an adapter is merged once")
        before.add(digest)
        places = placed(adapter, names, base.checkpoint.tensors)
        values = placed_values(adapter, names, base.checkpoint.tensors)
        _refuse(path, places, base)
        made_by = lineage.adapter_manifest(path)
        cutting = [
            part.piece.name
            for p in places
            if p.patch.kind == "kasa"
            for parts in p.matrices
            for part in parts
        ]
        if cutting:
            told = lineage.base_is(options.base_is, base, made_by, cutting)
        if not options.force_base:
            lineage.require_fit(base, made_by, [name for name, _ in _tensors(places)], path)
        cuts_base = bool(cutting) and told == lineage.ORIGINAL
        cuts = known_cuts(path, base) if cuts_base else Cuts()
        mergings.append(Merging(adapter, places, values, weight, cuts_base, cuts))
        used, there = consumed(adapter), adapter.container.tensors
        if left := sorted(there.keys() - used):
            raise unconsumed(left, adapter.container)
        rows.append(AdapterRow(str(path), adapter.kind, weight, digest, len(used), len(there)))
    return tuple(rows), mergings, told


def _tensors(places: Sequence[Placed]) -> list[tuple[str, str]]:
    """The tensors on disk that patches change, with their kinds."""
    return [
        (part.piece.name, place.patch.kind) for place in places for parts in place.matrices for part in parts
    ]


def _refuse(path: Path, places: Sequence[Placed], base: Origin) -> None:
    """Refuse an adapter whose start is lost, and a base that has lost it already."""
    starts = {place.patch.settings.get("base_start") for place in places}
    if "lost" in starts:
        what = "an adapter that took a random or data-driven start off its base"
        raise InvalidInput(what, str(path), REFUSED["pissa_niter"])
    records = base.manifest["tensors"] if base.manifest else {}
    for name, _ in _tensors([one for one in places if one.patch.settings.get("base_start") in RECOMPUTED]):
        if records.get(name, {}).get("role") == RESIDUAL:
            what = "a residual base, off which an adapter's start is taken already"
            raise InvalidInput(what, name, f"merge {path.name} into the original")


def _start_notes(mergings: Sequence[Merging]) -> list[str]:
    """What an adapter took off its base, and where that is known from."""
    notes = []
    for merging in mergings:
        starts = {place.patch.settings.get("base_start") for place in merging.placed}
        name = merging.adapter.path.name
        if not starts.isdisjoint(RECOMPUTED):
            notes.append(f"{name}: its start is computed anew from this base: was it trained on it?")
        if OWN_FACTORS in starts:
            notes.append(
                f"{name}: what it took off its base is rebuilt from its own tensors, as rounded there"
            )
    return notes


def _recorded(options: Options, rows: Sequence[AdapterRow], base_is: str | None) -> dict[str, Any]:
    """What the bytes depend on beside the base: no path."""
    adapters = [{name: value for name, value in asdict(row).items() if name != "path"} for row in rows]
    recorded = {
        "dtype": options.dtype,
        "max_shard_size": options.max_shard_size,
        "rounding": options.rounding,
        "untie": options.untie,
    }
    return {"adapters": adapters, "base_is": base_is, "options": recorded}


def _records(sheets: Sequence[Sheet], written: Sequence[Written[Merged]]) -> dict[str, Any]:
    shapes = {name: entry.shape for sheet in sheets for name, entry in sheet.form.tensors.items()}
    sources = {name: source for sheet in sheets for name, source in sheet.sources.items()}
    return {
        one.name: {
            "file": one.file,
            "dtype": one.dtype,
            "sha256": one.sha256,
            "shape": list(shapes[one.name]),
            "role": "merged" if one.outcome else "copied",
            **({"made_from": sources[one.name]} if one.name in sources else {}),
            **(asdict(one.outcome) if one.outcome else {}),
        }
        for one in written
    }


def _rows(orders: dict[str, Orders], written: Sequence[Written[Merged]]) -> tuple[MergedRow, ...]:
    """Changed tensors, in the order of the base's headers."""
    outcomes = {one.name: one for one in written if one.outcome}
    return tuple(
        MergedRow(name, ", ".join(order.modules), outcomes[name].dtype, order.num_terms, **asdict(found))
        for name, order in orders.items()
        if (found := outcomes[name].outcome)
    )


def _totals(written: Sequence[Written[Merged]], sheets: Sequence[Sheet]) -> dict[str, Any]:
    merged = [one.outcome for one in written if one.outcome]
    return {
        "tensors_merged": len(merged),
        "tensors_copied": len(written) - len(merged),
        "files": len(sheets),
        "max_abs_change": max((one.max_abs_change for one in merged), default=None),
        "max_rounding_error": max((one.rounding_error for one in merged), default=None),
    }


def _card_body(rows: Sequence[AdapterRow]) -> str:
    lines = [f"- {row.kind}, weight {row.weight:g}, {row.tensors_total} tensors" for row in rows]
    head = (
        f"Made by kasa: {len(rows)} adapter{'s' if len(rows) > 1 else ''} merged, every tensor rounded once."
    )
    tail = f"- `{MANIFEST}`: what was done to every tensor, with hashes; `kasa verify` checks it."
    return "\n".join([head, "", *lines, tail])


def _notes(names: NameMap, more: Sequence[str]) -> list[str]:
    return [*([names.note] if names.note else []), *more]
