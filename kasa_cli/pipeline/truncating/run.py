"""`kasa truncate`: drop the smallest singular components, write the base, a fresh KaSA adapter and the tail."""

import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

from kasa_cli.adapters import peft
from kasa_cli.checkpoint import DTYPES, Sheet, base_sheets, copy_companions, manifest, write_index
from kasa_cli.files import Staging, check_apart, make_folder, require_space
from kasa_cli.linalg import ROUNDINGS, Outcome
from kasa_cli.methods import kasa
from kasa_cli.pipeline.base_writer import WrittenBase, write_base
from kasa_cli.pipeline.costs import memory_needed, seconds_needed
from kasa_cli.pipeline.measuring import Facts, open_facts, pick_device, store_notes
from kasa_cli.pipeline.opening import ModelLocation
from kasa_cli.pipeline.truncating.adapter_and_tail import write_adapter, write_tail
from kasa_cli.pipeline.truncating.factors import MeasuredTarget, Measurer, measure
from kasa_cli.pipeline.truncating.options import PARTS, TruncateRequest, check, recorded
from kasa_cli.pipeline.truncating.plan import Plan, make_plan, require_rank
from kasa_cli.pipeline.truncating.records import write_records
from kasa_cli.pipeline.truncating.rewrite import SumsByTarget, Truncated, Truncation, shares_of
from kasa_cli.pipeline.workers import Silent, Watcher, blas_threads
from kasa_cli.report import (
    PlannedParts,
    PlanReport,
    TensorRow,
    ToTruncate,
    TruncateOutput,
    TruncateReport,
    TruncateTotals,
)
from kasa_cli.targets import Patterns, Target

__all__ = ["ModelLocation", "Patterns", "TruncateRequest", "plan", "truncate"]


def plan(where: ModelLocation, options: TruncateRequest) -> PlanReport:
    """The plan of `truncate`, from headers alone.

    Raises:
        KasaError: the errors that `truncate` raises before it reads a weight.
    """
    check(options)
    whole_plan = _plan(where, options)
    targets = whole_plan.selection.targets
    sheets = _sheets(whole_plan, options)
    return PlanReport(
        command="truncate",
        model=where.model,
        rank=options.rank,
        truncation_rank=options.dropped,
        tensors=tuple(_planned(target) for target in targets),
        skipped=whole_plan.selection.skipped,
        totals={
            "tensors_operated": len(targets),
            "tensors_skipped": len(whole_plan.selection.skipped),
            "bytes_to_write": _bytes_to_write(whole_plan, options, sheets),
            "memory_bytes": memory_needed(targets, options.num_workers),
            "seconds": round(seconds_needed(targets, options.num_workers), 1),
        },
        output=PlannedParts(
            base="base" in options.emit,
            adapter="adapter" in options.emit and bool(whole_plan.selection.modules),
            tail="tail" in options.emit,
        ),
        notes=_notes(whole_plan, options),
    )


def truncate(
    where: ModelLocation, output: Path, options: TruncateRequest | None = None, watcher: Watcher | None = None
) -> TruncateReport:
    """Truncate a checkpoint into `output`, which appears only when it is complete.

    Raises:
        KasaError: a subclass that fits the failure. Finished parts are kept, and the same call resumes.
    """
    options, watcher = options or TruncateRequest(), watcher or Silent()
    check(options)
    device = pick_device(options.device)
    facts = open_facts(options.running)
    whole_plan = _plan(where, options, facts)
    sheets = _sheets(whole_plan, options)
    check_apart(output, [whole_plan.source.root])
    require_space(output.parent, _bytes_to_write(whole_plan, options, sheets))
    environment = manifest.numeric_environment(options.threads_per_worker, device.type)
    job = _job(whole_plan, options, environment)
    staging = Staging(output, fingerprint=job, overwrite=options.overwrite, restart=options.restart)
    with staging, blas_threads(options.threads_per_worker):
        measurer = Measurer(whole_plan.checkpoint, staging, facts, device)
        measured = measure(measurer, whole_plan.selection.targets, options.num_workers, watcher)
        result = Truncated(measured, _write_parts(whole_plan, options, sheets, staging, measured, watcher))
        sealed = write_records(whole_plan, options, staging, environment, result)
        staging.publish()
    report = _report(where, output, options, whole_plan, result, sealed)
    return replace(report, notes=(*report.notes, *store_notes(facts)))


def _plan(where: ModelLocation, options: TruncateRequest, facts: Facts | None = None) -> Plan:
    rule = kasa.COMPATS[options.compat]
    whole_plan = make_plan(
        where,
        options.patterns,
        options.targets_from,
        lambda outs, ins: rule(options.dropped, outs, ins),
        facts,
    )
    require_rank(whole_plan.selection.targets, options.dropped, "the truncation rank")
    if "adapter" in options.emit:
        require_rank(whole_plan.selection.modules, options.rank, "the rank")
    return whole_plan


def _sheets(whole_plan: Plan, options: TruncateRequest) -> list[Sheet]:
    """The files of the base; none when no base is emitted."""
    if "base" not in options.emit:
        return []
    dtype = DTYPES[options.dtype]
    tensors = whole_plan.checkpoint.tensors
    names = {piece.name for target in whole_plan.selection.targets for piece in target.matrix.pieces}
    changing = {name: dtype for name in sorted(names) if dtype and tensors[name].dtype != dtype}
    return base_sheets(whole_plan.checkpoint, changing, options.max_shard_size)


def _bytes_to_write(whole_plan: Plan, options: TruncateRequest, sheets: Sequence[Sheet]) -> int:
    """Bytes of the output, and of the parts in staging."""
    root, targets = whole_plan.checkpoint.root, whole_plan.selection.targets
    sides = sum(sum(target.shape) for target in targets)
    module_sides = sum(sum(target.shape) for target in whole_plan.selection.modules)
    parts = sum(8 * target.dropped * sum(target.shape) for target in targets)
    base = sum(sheet.layout.size for sheet in sheets)
    base += sum((root / name).stat().st_size for name in whole_plan.checkpoint.companions) if sheets else 0
    adapter = 4 * options.rank * module_sides * ("adapter" in options.emit)
    tail = 4 * options.dropped * sides * ("tail" in options.emit)
    return parts + base + adapter + tail


def _job(whole_plan: Plan, options: TruncateRequest, environment: manifest.Environment) -> dict[str, Any]:
    """All inputs that determine the bytes of the output: a run resumes only the same job."""
    headers = [[file, shard.identity.size] for file, shard in whole_plan.checkpoint.shards.items()]
    return {
        "command": "truncate",
        "environment": asdict(environment),
        "inputs": headers,
        "options": asdict(recorded(options)),
        "source": {"commit": whole_plan.source.commit, "repo": whole_plan.source.repo},
        "targets": [asdict(target) for target in whole_plan.selection.targets],
    }


def _write_parts(
    whole_plan: Plan,
    options: TruncateRequest,
    sheets: list[Sheet],
    staging: Staging,
    measured: list[MeasuredTarget],
    watcher: Watcher,
) -> WrittenBase[SumsByTarget]:
    """Write base, adapter and tail; returns the written base."""
    written: WrittenBase[SumsByTarget] = WrittenBase([], {})
    if sheets:
        folder = staging.out / "base"
        make_folder(folder)
        shares = shares_of(whole_plan.checkpoint, measured)
        rewriter = Truncation(whole_plan.checkpoint, staging, shares, ROUNDINGS[options.rounding])
        written = write_base(whole_plan.checkpoint, rewriter, sheets, folder, options.num_workers, watcher)
        copy_companions(whole_plan.checkpoint, folder, options.dtype)
        write_index(whole_plan.checkpoint, sheets, folder)
    if "adapter" in options.emit:
        write_adapter(whole_plan, options, staging, measured, watcher)
    if "tail" in options.emit:
        write_tail(whole_plan, staging, measured, watcher)
    return written


def _notes(whole_plan: Plan, options: TruncateRequest) -> tuple[str, ...]:
    """Notes on how other tools read the output."""
    notes = [whole_plan.names.note] if whole_plan.names.note else []
    modules, config = [target.module for target in whole_plan.selection.modules], whole_plan.checkpoint.config
    has_conv1d = any(target.matrix.is_transposed for target in whole_plan.selection.modules)
    if {"adapter", "tail"} & set(options.emit):
        notes += peft.refusals(modules, config)
    if "adapter" in options.emit:
        notes += peft.difficulties(modules, config, has_conv1d=has_conv1d)
    if "adapter" in options.emit and whole_plan.selection.experts:
        num_experts = len(whole_plan.selection.experts)
        without = (
            f"adapter/ does not hold these {num_experts} matrices" if modules else "there is no adapter/"
        )
        notes.append(f"PEFT has no KaSA for fused experts: {without}")
    if (
        "adapter" in options.emit
        and modules
        and (options.dropped != options.rank or options.compat != "peft")
    ):
        notes.append(
            f"PEFT drops the {options.rank} smallest components of any base that it loads this adapter on: "
            "its base then differs from base/; load tail/ on the original instead where that matters"
        )
    if options.compat == "reference":
        notes.append(
            "compat reference follows the published code, whose rule is in_features - r: "
            "wide layers lose fewer components, or none"
        )
    if "tail" in options.emit and not any(target.dropped for target in whole_plan.selection.targets):
        notes.append("no component is dropped, so there is no tail/")
    return tuple(notes)


def _report(
    where: ModelLocation,
    output: Path,
    options: TruncateRequest,
    whole_plan: Plan,
    result: Truncated,
    sealed: bytes,
) -> TruncateReport:
    rows = tuple(_row(measurement, result) for measurement in result.measured)
    tied = [row.name for row in rows if row.is_tied]
    notes = [*_notes(whole_plan, options)]
    if tied:
        notes.append(
            f"equal singular values lie on both sides of the truncation in {len(tied)} tensors ({tied[0]}, …): "
            "the choice among them is arbitrary"
        )
    return TruncateReport(
        command="truncate",
        model=where.model,
        model_class=whole_plan.names.model_class,
        rank=options.rank,
        truncation_rank=options.dropped,
        alpha=options.lora_alpha,
        dtype=options.dtype,
        rounding=options.rounding,
        compat=options.compat,
        tensors=rows,
        skipped=whole_plan.selection.skipped,
        totals=_totals(rows, result, options),
        output=_output(output, sealed),
        notes=tuple(notes),
    )


def _planned(target: Target) -> ToTruncate:
    matrix = target.matrix
    is_transposed = matrix.is_transposed
    return ToTruncate(target.name, target.module, target.shape, matrix.dtype, is_transposed, target.dropped)


def _row(measurement: MeasuredTarget, result: Truncated) -> TensorRow:
    spectral = {name: value for name, value in asdict(measurement.facts).items() if name != "angle"}
    outcome, matrix = result.outcomes.get(measurement.target.name), measurement.target.matrix
    return TensorRow(
        name=measurement.target.name,
        module=measurement.target.module,
        shape=measurement.target.shape,
        dtype=matrix.dtype,
        stored_dtype=result.dtypes.get(matrix.pieces[0].name, matrix.dtype),
        truncation_rank=measurement.target.dropped,
        **spectral,
        **(asdict(outcome) if outcome else {field.name: None for field in fields(Outcome)}),
    )


def _totals(rows: Sequence[TensorRow], result: Truncated, options: TruncateRequest) -> TruncateTotals:
    realised = [row.realised for row in rows if row.realised is not None]
    return {
        "tensors_operated": len(rows),
        "tensors_copied": sum(tensor.checks is None for tensor in result.base.tensors),
        "decompositions": sum(measurement.is_new for measurement in result.measured),
        "decompositions_reused": sum(not measurement.is_new for measurement in result.measured),
        "realised_min": min(realised, default=None),
        "realised_median": statistics.median(realised) if realised else None,
        "min_realised": options.min_realised,
        "below_min_realised": sum(value < options.min_realised for value in realised),
    }


def _output(output: Path, sealed: bytes) -> TruncateOutput:
    parts = {part: str(output / part) for part in PARTS if (output / part).is_dir()}
    digest = hashlib.sha256(sealed).hexdigest()
    return cast("TruncateOutput", {"directory": str(output), **parts, "manifest_sha256": digest})
