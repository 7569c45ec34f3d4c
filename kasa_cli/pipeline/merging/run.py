"""`kasa merge`: merges adapters into their base, one tensor at a time, and rounds each tensor once."""

import hashlib
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from kasa_cli.checkpoint import DTYPES, Merged, OpenFiles, Sheet, base_sheets, copy_companions, write_index
from kasa_cli.files import Staging, require_space
from kasa_cli.pipeline.base_writer import WrittenTensor, write_base
from kasa_cli.pipeline.costs import streaming_cost
from kasa_cli.pipeline.measuring import open_facts, store_notes
from kasa_cli.pipeline.merging.case import MergeCase, MergeRequest, check, opened_case
from kasa_cli.pipeline.merging.edits import TensorEdits
from kasa_cli.pipeline.merging.merger import Merger
from kasa_cli.pipeline.merging.records import recorded, write_records
from kasa_cli.pipeline.opening import ModelLocation
from kasa_cli.pipeline.workers import RunOptions, Silent, Watcher, blas_threads, check_running
from kasa_cli.report import MergedRow, MergePlan, MergeReport, MergeTotals, ToChange

__all__ = ["MergeRequest", "ModelLocation", "RunOptions", "merge", "plan"]


def plan(
    adapters: Sequence[Path],
    where: ModelLocation,
    output: Path,
    options: MergeRequest | None = None,
    running: RunOptions | None = None,
) -> MergePlan:
    """The plan of `merge`: the changed tensors and the cost.

    Raises:
        KasaError: the errors that `merge` raises before it changes a weight.
    """
    options, running = options or MergeRequest(), running or RunOptions()
    check(adapters, options)
    check_running(running)
    case = opened_case(adapters, where, output, options)
    sheets = _sheets(case)
    entries = {name: entry for sheet in sheets for name, entry in sheet.layout.tensors.items()}
    tensors = tuple(
        ToChange(
            name,
            ", ".join(tensor_edits.modules),
            entries[name].shape,
            entries[name].dtype,
            tensor_edits.kinds,
        )
        for name, tensor_edits in case.edits.items()
    )
    num_bytes = sum(sheet.layout.size for sheet in sheets)
    num_held = [
        tensor_edits.bytes_held(prod(entries[name].shape), options.rounding)
        for name, tensor_edits in case.edits.items()
    ]
    return MergePlan(
        command="merge",
        model=where.model,
        base_is=case.base_is,
        tensors=tensors,
        totals={
            "tensors_merged": len(tensors),
            "tensors_copied": len(entries) - len(tensors),
            "bytes_to_write": num_bytes,
            **streaming_cost(num_bytes, max(num_held, default=0), running.num_workers),
        },
        notes=case.notes,
    )


def merge(
    adapters: Sequence[Path],
    where: ModelLocation,
    output: Path,
    options: MergeRequest | None = None,
    running: RunOptions | None = None,
    watcher: Watcher | None = None,
) -> MergeReport:
    """Merge adapters, in their order, into a copy of their base, which appears only when it is complete.

    Raises:
        KasaError: a subclass that fits the failure. Finished parts are kept, and the same call resumes.
    """
    options, running, watcher = options or MergeRequest(), running or RunOptions(), watcher or Silent()
    check(adapters, options)
    check_running(running)
    facts = open_facts(running)
    case = opened_case(adapters, where, output, options, facts)
    checkpoint, edits, layout = case.checkpoint, case.edits, case.layout
    sheets = _sheets(case)
    require_space(output.parent, sum(sheet.layout.size for sheet in sheets))
    record = recorded(case, running)
    job = {
        **record.content(),
        "inputs": [[file, shard.identity.size] for file, shard in checkpoint.shards.items()],
    }
    staging = Staging(output, fingerprint=job, overwrite=options.overwrite, restart=options.restart)
    with staging, blas_threads(running.threads_per_worker), OpenFiles() as files:
        merger = Merger(checkpoint, edits, facts, files, options.rounding, layout.sources)
        written = write_base(checkpoint, merger, sheets, staging.out, running.num_workers, watcher)
        copy_companions(checkpoint, staging.out, options.dtype, layout.config)
        write_index(checkpoint, sheets, staging.out)
        sealed = write_records(case, staging.out, record, sheets, written, running.num_workers)
        staging.publish()
    return MergeReport(
        command="merge",
        model=where.model,
        model_class=case.names.model_class,
        base_is=case.base_is,
        dtype=options.dtype,
        rounding=options.rounding,
        tensors=_rows(edits, written.tensors),
        adapters=case.adapters,
        totals=_totals(written.tensors, sheets),
        output={"directory": str(output), "manifest_sha256": hashlib.sha256(sealed).hexdigest()},
        notes=(*case.notes, *store_notes(facts)),
    )


def _sheets(case: MergeCase) -> list[Sheet]:
    """The files of the merged model."""
    checkpoint, layout, dtype = case.checkpoint, case.layout, DTYPES[case.options.dtype]
    before = {name: checkpoint.tensors[layout.sources.get(name, name)].dtype for name in case.edits}
    dtypes = {name: dtype for name in case.edits if dtype is not None and dtype != before[name]}
    return base_sheets(checkpoint, dtypes, case.options.max_shard_size, layout.shapes, layout.sources)


def _rows(
    edits: Mapping[str, TensorEdits], written: Sequence[WrittenTensor[Merged]]
) -> tuple[MergedRow, ...]:
    """A row for each changed tensor, in the order of the base's headers."""
    outcomes = {tensor.name: tensor for tensor in written if tensor.checks}
    return tuple(
        MergedRow(
            name,
            ", ".join(tensor_edits.modules),
            outcomes[name].dtype,
            tensor_edits.num_terms,
            checks.max_abs_change,
            checks.rounding_error,
        )
        for name, tensor_edits in edits.items()
        if (checks := outcomes[name].checks)
    )


def _totals(written: Sequence[WrittenTensor[Merged]], sheets: Sequence[Sheet]) -> MergeTotals:
    merged = [tensor.checks for tensor in written if tensor.checks]
    return {
        "tensors_merged": len(merged),
        "tensors_copied": len(written) - len(merged),
        "files": len(sheets),
        "max_abs_change": max((check.max_abs_change for check in merged), default=None),
        "max_rounding_error": max((check.rounding_error for check in merged), default=None),
    }
