"""`kasa convert`: converts an adapter into a plain LoRA, which every server reads."""

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
    """The plan of `convert`: the weights to convert and the cost.

    Raises:
        KasaError: the errors that `convert` raises before it reads a weight.
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
    """Convert an adapter into a plain LoRA in PEFT's or lora-lite's format; it appears only when it is complete.

    Raises:
        KasaError: a subclass that fits the failure. Finished parts are kept, and the same call resumes.
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
        results = convert_all(converter, case.places, running.num_workers, watcher)
        config = config_facts(case, results)
        file, metadata = write_config(case, staging.out, entries, config)
        items, run_on = list(zip(results, entries, strict=True)), (running.num_workers, watcher)
        records = write_factors(staging.out / file, metadata, items, config.rank, staging, run_on)
        record = replace(record, adapter=replace(record.adapter, file=file, tensors=records))
        sealed = write_records(case, staging.out, record, results, config)
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
        rank=max(result.rank for result in results),
        padded_rank=config.rank,
        tensors=tuple(result.row for result in results),
        totals=_totals(case, results, len(records)),
        output={
            "directory": str(output),
            "file": file,
            "manifest_sha256": hashlib.sha256(sealed).hexdigest(),
        },
        notes=(*_notes(case), *store_notes(facts)),
    )


def _totals(case: ConvertCase, results: Sequence[Converted], num_written: int) -> ConvertTotals:
    return {
        "weights": len(results),
        "tensors_consumed": len(consumed(case.adapter)),
        "tensors_total": len(case.adapter.container.tensors),
        "largest_loss": max(result.loss for result in results),
        "loss": loss_of_all(results),
        "tensors_written": num_written,
    }


def _notes(case: ConvertCase) -> list[str]:
    """Notes for the user before serving the LoRA."""
    notes = [case.names.note] if case.names.note else []
    if not case.fits_given and case.on == TRUNCATED and not case.truncate_manifests:
        notes.append(
            "no manifest records the truncated base, so the output does not name the base that this LoRA fits"
        )
    dtypes = {case.checkpoint.tensors[name].dtype for name in case.on_base.targets}
    if case.truncation and dtypes.intersection(HALVES):
        notes.append(
            "the truncation is exact in this LoRA but rounded in a truncated base in half precision: "
            "the outputs differ slightly from those on the base that the adapter was trained on"
        )
    return notes
