"""Model card and manifest of a merge. The manifest is written last."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kasa_cli.checkpoint import (
    CARD,
    InputTensor,
    Merged,
    MergedAdapter,
    MergeManifest,
    MergeOptions,
    Sheet,
    SourceRecord,
    StoredTensor,
    TensorRecord,
    model_card,
    numeric_environment,
)
from kasa_cli.files import MANIFEST, write_file
from kasa_cli.pipeline.adapter_on_base import provenance
from kasa_cli.pipeline.base_writer import WrittenBase, WrittenTensor
from kasa_cli.pipeline.file_records import file_records
from kasa_cli.pipeline.merging.case import MergeCase
from kasa_cli.pipeline.workers import RunOptions
from kasa_cli.report import AdapterRow


def recorded(case: MergeCase, running: RunOptions) -> MergeManifest:
    """The manifest before any tensor is written: all inputs, besides the base, that determine the bytes; no path."""
    options = case.options
    adapters = [
        MergedAdapter(row.kind, row.weight, row.sha256, row.tensors_consumed, row.tensors_total)
        for row in case.adapters
    ]
    return MergeManifest(
        adapters=tuple(adapters),
        base_is=case.base_is,
        environment=numeric_environment(running.threads_per_worker, "cpu"),
        merged_before=tuple(sorted(provenance.merged_before(case.base))),
        model_class=case.names.model_class,
        options=MergeOptions(options.dtype, options.max_shard_size, options.rounding, options.untie),
        source=SourceRecord(case.source.commit, case.source.repo),
    )


def write_records(
    case: MergeCase,
    folder: Path,
    record: MergeManifest,
    sheets: Sequence[Sheet],
    written: WrittenBase[Merged],
    num_workers: int,
) -> bytes:
    """Write the model card, then the manifest; returns its bytes. A manifest exists only in a complete output."""
    base = case.checkpoint
    source_card = model_card.source_facts(base.root, base.companions)
    text = model_card.card(case.source.repo, source_card, "A merged model", _card_body(case.adapters))
    write_file(folder / CARD, [text])
    manifest = replace(
        record,
        files=file_records(folder, num_workers, written.header_sha256),
        left_out={left.name: left.reason for left in base.left_out},
        tensors=_tensor_records(sheets, written.tensors),
    )
    sealed = manifest.sealed()
    write_file(folder / MANIFEST, [sealed])
    return sealed


def _tensor_records(
    sheets: Sequence[Sheet], written: Sequence[WrittenTensor[Merged]]
) -> dict[str, TensorRecord]:
    shapes = {name: entry.shape for sheet in sheets for name, entry in sheet.layout.tensors.items()}
    sources = {name: source for sheet in sheets for name, source in sheet.sources.items()}
    return {
        tensor.name: TensorRecord(
            role="merged" if tensor.checks else "copied",
            dtype=tensor.dtype,
            shape=shapes[tensor.name],
            stored=StoredTensor(tensor.file, tensor.blake3, sources.get(tensor.name)),
            before=InputTensor(tensor.checks.input_blake3) if tensor.checks else None,
            merged=tensor.checks,
        )
        for tensor in written
    }


def _card_body(rows: Sequence[AdapterRow]) -> str:
    lines = [f"- {row.kind}, weight {row.weight:g}, {row.tensors_total} tensors" for row in rows]
    head = (
        f"Made by kasa: {len(rows)} adapter{'s' if len(rows) > 1 else ''} merged, every tensor rounded once."
    )
    tail = f"- `{MANIFEST}`: the origin and the hashes of every tensor; `kasa verify` checks it."
    return "\n".join([head, "", *lines, tail])
