"""`kasa convert`: an adapter as the plain LoRA that every server reads."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kasa_cli.adapters import consumed
from kasa_cli.checkpoint import OpenFiles
from kasa_cli.files import Staging
from kasa_cli.pipeline.adapter_on_base import TRUNCATED, label
from kasa_cli.pipeline.converting.case import ConvertCase, ConvertRequest, check, opened_case
from kasa_cli.pipeline.converting.factors import (
    Converted,
    Converter,
    convert_all,
    is_decomposed,
    loss_of_all,
    working_room,
    write_factors,
)
from kasa_cli.pipeline.converting.records import (
    config_facts,
    entries_of,
    recorded,
    write_config,
    write_records,
)
from kasa_cli.pipeline.costs import decomposition_cost
from kasa_cli.pipeline.measuring import open_facts, store_notes
from kasa_cli.pipeline.opening import ModelLocation
from kasa_cli.pipeline.workers import RunOptions, Silent, Watcher, blas_threads, check_running
from kasa_cli.report import ConvertPlan, ConvertReport, ConvertTotals, ToChange

__all__ = ["ConvertRequest", "ModelLocation", "RunOptions", "convert", "plan"]

HALVES = ("BF16", "F16")


def plan(
    adapter: Path,
    where: ModelLocation,
    output: Path,
    options: ConvertRequest | None = None,
    running: RunOptions | None = None,
) -> ConvertPlan:
    """What `convert` would do.

    Raises:
        KasaError: whatever `convert` would refuse before it reads a weight.
    """
    options, running = options or ConvertRequest(), running or RunOptions()
    check(options)
    check_running(running)
    case = opened_case(adapter, where, output, options)
    tensors = [
        ToChange(
            ", ".join(dict.fromkeys(part.piece.name for parts in place.matrices for part in parts)),
            label(place.patch),
            place.sides,
            "F32",
            (place.patch.kind,),
        )
        for place in case.places
    ]
    decomposed = [place for place in case.places if is_decomposed(place, case.truncation)]
    rooms = [working_room(case.checkpoint, place) for place in decomposed]
    return ConvertPlan(
        command="convert",
        model=where.model,
        to=options.to,
        on=case.on,
        base_is=case.base_is,
        tensors=tuple(tensors),
        totals={
            "weights": len(tensors),
            "tensors_to_write": 2 * sum(len(entries) for entries in entries_of(case)),
            "bytes_to_write": None,
            **decomposition_cost([place.shape for place in decomposed], rooms, running.num_workers),
        },
        notes=tuple(_notes(case)),
    )


def convert(
    adapter: Path,
    where: ModelLocation,
    output: Path,
    options: ConvertRequest | None = None,
    running: RunOptions | None = None,
    watcher: Watcher | None = None,
) -> ConvertReport:
    """Convert an adapter into a plain LoRA, or lora-lite's, which appears only when it is complete.

    Raises:
        KasaError: by the kind of trouble; nothing is lost, and the same call goes on where this one stopped.
    """
    options, running, watcher = options or ConvertRequest(), running or RunOptions(), watcher or Silent()
    check(options)
    check_running(running)
    facts = open_facts(running)
    case = opened_case(adapter, where, output, options, facts)
    checkpoint, entries = case.checkpoint, entries_of(case)
    record = recorded(case, running)
    job = {
        **record.content(),
        "inputs": [[file, shard.identity.size] for file, shard in checkpoint.shards.items()],
    }
    staging = Staging(output, fingerprint=job, overwrite=options.overwrite, restart=options.restart)
    with staging, blas_threads(running.threads_per_worker), OpenFiles() as files:
        converter = Converter(case.adapter, files, checkpoint, facts, staging, options.limit, case.truncation)
        done = convert_all(converter, case.places, running.num_workers, watcher)
        config = config_facts(case, done)
        file, metadata = write_config(case, staging.out, entries, config)
        items, run_on = list(zip(done, entries, strict=True)), (running.num_workers, watcher)
        records = write_factors(staging.out / file, metadata, items, config.rank, staging, run_on)
        record = replace(record, adapter=replace(record.adapter, file=file, tensors=records))
        sealed = write_records(case, staging.out, record, done, config)
        staging.publish()
    return ConvertReport(
        command="convert",
        model=where.model,
        model_class=case.names.model_class,
        kind=case.adapter.kind,
        to=options.to,
        on=case.on,
        base_is=case.base_is,
        names=None if options.is_lite else options.names,
        rank=max(result.rank for result in done),
        padded_rank=config.rank,
        tensors=tuple(result.row for result in done),
        totals=_totals(case, done, len(records)),
        output={
            "directory": str(output),
            "file": file,
            "manifest_sha256": hashlib.sha256(sealed).hexdigest(),
        },
        notes=(*_notes(case), *store_notes(facts)),
    )


def _totals(case: ConvertCase, done: Sequence[Converted], num_written: int) -> ConvertTotals:
    return {
        "weights": len(done),
        "tensors_consumed": len(consumed(case.adapter)),
        "tensors_total": len(case.adapter.container.tensors),
        "largest_loss": max(result.loss for result in done),
        "loss": loss_of_all(done),
        "tensors_written": num_written,
    }


def _notes(case: ConvertCase) -> list[str]:
    """What a user should know before serving the LoRA."""
    notes = [case.names.note] if case.names.note else []
    if not case.fits_given and case.on == TRUNCATED and not case.truncate_manifests:
        notes.append(
            "no manifest knows the truncated base, so none is on record as the one that this LoRA fits"
        )
    dtypes = {case.checkpoint.tensors[name].dtype for name in case.on_base.targets}
    if case.truncation and dtypes.intersection(HALVES):
        notes.append(
            "the cut is exact here; a truncated base in half precision holds it rounded, "
            "and an adapter trained on that one answers a little differently on this"
        )
    return notes
